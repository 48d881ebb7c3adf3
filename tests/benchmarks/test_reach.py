"""What an arm is said to have reached, and when; what its rows count; and that finished checkpoints are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import reach  # noqa: E402
import reach_report  # noqa: E402

from fastpref.config import Config, load_config  # noqa: E402
from fastpref.models.work import Work  # noqa: E402
from fastpref.train.checkpoint import load_checkpoint  # noqa: E402

PLAN, ARMS, SCORERS = reach.read_plan()


def point(step: int, look: float, confirmed: float | str = "") -> dict[str, Any]:
    return {"step": str(step), "look_share": str(look), "confirmed_share": confirmed}


def walk(looks: dict[int, tuple[float, float]], bars: list[float], every: int, budget: int) -> list[int]:
    """The checkpoints an arm is trained to, with a confirmation wherever the benchmark asks for one."""
    curve: list[dict[str, Any]] = []
    while (step := reach.next_step(curve, bars, every, budget)) is not None:
        look, confirmed = looks[step]
        bar = reach.open_bar(curve, bars)
        assert bar is not None
        curve.append(point(step, look, confirmed if look >= bar else ""))
    return [int(row["step"]) for row in curve]


def test_an_arm_stops_where_the_bar_is_passed_and_confirmed() -> None:
    looks = {2: (0.6, 0.6), 4: (0.85, 0.7), 6: (0.82, 0.81), 8: (0.9, 0.9)}
    assert walk(looks, [0.8], 2, 60) == [2, 4, 6]  # at 4 the few prompts flattered
    assert walk({2: (0.9, 0.9)}, [0.8], 2, 60) == [2]


def test_an_arm_goes_on_to_its_last_bar_and_passes_two_at_once() -> None:
    looks = {4: (0.81, 0.82), 8: (0.7, 0.7), 12: (0.95, 0.89), 16: (0.91, 0.93), 20: (1.0, 1.0)}
    assert walk(looks, [0.8, 0.9], 4, 60) == [4, 8, 12, 16]
    assert walk({4: (0.97, 0.95)}, [0.8, 0.9], 4, 60) == [4]


def test_an_arm_ends_with_its_budget_and_goes_on_if_that_is_raised() -> None:
    looks = {step: (0.7, 0.7) for step in range(1, 30)}
    assert walk(looks, [0.8], 4, 10) == [4, 8, 10]
    curve = [point(4, 0.7), point(8, 0.7), point(10, 0.7)]
    assert reach.next_step(curve, [0.8], 4, 10) is None
    assert reach.next_step(curve, [0.8], 4, 20) == 12


def state(work: Work, **totals: float) -> dict[str, Any]:
    return {"counts": list(vars(work).values()), "seconds": 12.3456, "trainer": {"totals": totals} if totals else {}}


def test_rows_are_split_by_what_they_were_for() -> None:
    dpo = reach.spent(load_config("", ["method=dpo", "batch_size=16"]), 5, state(Work(320, 0, 160)))
    assert (dpo["policy_rows"], dpo["reference_rows"], dpo["rollout_rows"], dpo["backward_rows"]) == (160, 160, 0, 160)
    assert (dpo["samples"], dpo["seconds"], dpo["latent_reward_rows"]) == (80, 12.346, 0)
    counts = {"rollout_unet_forwards": 2080, "transitions": 150}
    spo = reach.spent(load_config("", ["method=spo"]), 9, state(Work(2680, 0, 300, 0, 1024, 17, 1024), **counts))
    assert [spo[name] for name in reach_report.UNET] == [300, 300, 2080, 300]
    assert (spo["samples"], spo["decoded"], spo["latent_reward_rows"]) == (150, 1024, 0)
    lpo = reach.spent(load_config("", ["method=lpo"]), 9, state(Work(1240, 0, 300, 0, 0, 17, 2560), **counts))
    assert lpo["latent_reward_rows"] == 2560


def test_what_the_plan_compares_is_comparable() -> None:
    configs = {name: arm.config(PLAN, 1, Path("runs")) for name, arm in ARMS.items()}
    assert list(configs) == ["dpo", "rpo", "spo", "lpo"] and PLAN["bar"] == 0.8
    for name, config in configs.items():
        for key in ("model", "seed", "guidance_scale", "sample_steps", "eval_records", "clip", "lora_rank"):
            assert getattr(config, key) == getattr(configs["dpo"], key), (name, key)
        assert config.method == name and config.micro_batch == config.batch_size
        assert config.checkpoint_every == config.steps  # a stage ends with the only checkpoint that it writes
    for name, method in (("spm", "spm"), ("lrm", "lrm")):
        scorer = SCORERS[name].config(PLAN, 1, Path("runs"))
        assert scorer.method == method and scorer.seed == 1 and scorer.steps > 1
    assert configs["spo"].scorer == "runs/spm-seed1/step_preference_model"
    assert ARMS["spo"].bars(PLAN) == [0.8, 0.9] and ARMS["dpo"].bars(PLAN) == [0.8]


def test_a_fingerprint_ignores_places_and_a_budget_that_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "world_fingerprint", lambda: "world")
    here, there = (ARMS["dpo"].config(PLAN, 0, Path(runs)) for runs in ("runs", "elsewhere"))
    longer = there.model_copy(update={"steps": 999})
    assert reach.fingerprint(here, "a") == reach.fingerprint(longer, "a") != reach.fingerprint(here, "b")
    assert reach.fingerprint(here) != reach.fingerprint(here.model_copy(update={"beta": 11.0}))
    falling = [config.model_copy(update={"lr_scheduler": "linear"}) for config in (here, longer)]
    assert reach.fingerprint(falling[0]) != reach.fingerprint(falling[1])


def test_a_staged_training_is_the_uninterrupted_one(sdxl_config: Any) -> None:
    import torch

    def config(name: str, *more: str) -> Config:
        settings = ["method=dpo", "steps=6", "checkpoint_every=6", "resume=auto", "lr_scheduler=linear"]
        found: Config = sdxl_config(*settings, f"name={name}", *more)
        return found

    staged = reach.StagedRun(config("staged"), "mark")
    spent = [staged.train_to(step) for step in (1, 3)]
    assert [[row[name] for name in reach_report.UNET] for row in spent] == [[16, 16, 0, 16], [48, 48, 0, 48]]
    assert 0 < spent[0]["seconds"] < spent[1]["seconds"]
    job, run_dir = reach.open_job(config("whole", "checkpoint_every=3", "keep_checkpoints=9"), "mark")
    job.run(run_dir)
    whole, part = (load_checkpoint(run / "checkpoints" / "step-000003") for run in (run_dir, staged.run_dir))
    assert whole.values["counts"] == part.values["counts"]
    assert whole.tensors.keys() == part.tensors.keys()
    assert all(torch.equal(whole.tensors[name], part.tensors[name]) for name in whole.tensors)
    assert reach.StagedRun(config("staged"), "mark").train_to(4)["policy_rows"] == 64  # after a kill
    fresh = reach.StagedRun(config("staged"), "another mark")
    assert not (fresh.run_dir / "checkpoints").exists()


def test_what_is_there_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []

    class Staged:
        def __init__(self, config: Config, mark: str) -> None:
            self.config, self.run_dir = config, config.run_dir

        def train_to(self, step: int) -> dict[str, Any]:
            ran.append(f"{self.config.name}@{step}")
            return {"step": step, "budget": 24, "seconds": 10.0 * step} | dict.fromkeys(reach_report.UNET, 100 * step)

    def judge(config: Config, plan: Any, tag: str, bar: float, lora: Any = None) -> dict[str, Any]:
        share = 0.95 if tag == "step-000004" else 0.5
        more = {"confirmed_share": share, "confirmed_top5": 0.4} if share >= bar else {}
        return {"look_share": share, "look_top5": 0.4, **more}

    def scorer(config: Config, mark: str) -> dict[str, Any]:
        ran.append(config.name)
        config.run_dir.mkdir(parents=True)
        (config.run_dir / reach.MARK).write_text(mark)
        return {"step": 7, "seconds": 100.0, "frozen_rows": 5000, "latent_reward_rows": 0, "backward_rows": 0}

    replaced = {"StagedRun": Staged, "judge": judge, "train_scorer": scorer, "provenance": dict}
    for name, value in replaced.items():
        monkeypatch.setattr(reach, name, value)
    monkeypatch.setattr(reach, "world_fingerprint", lambda: "world")
    out = tmp_path / "reach.csv"
    reach.reach(["dpo", "spo"], [0], tmp_path, out)
    assert ran == ["spm-seed0", "dpo-seed0@2", "dpo-seed0@4", "spo-seed0@2", "spo-seed0@4"]
    reach.reach(["dpo", "spo"], [0], tmp_path, out)
    assert len(ran) == 5
    common.write_csv(out, [row for row in common.read_csv(out) if (row["arm"], row["step"]) != ("dpo", "4")])
    reach.reach(["dpo", "spo"], [0], tmp_path, out)
    assert ran[5:] == ["dpo-seed0@4"]
    text = reach_report.report(PLAN, common.read_csv(out))
    assert "| SPO | 1 of 1 | 4 | 400 / 400 / 400 / 400 | 0 | 5000 | 6600 | 40 | 100 | 140 | 1.00 |" in text
    assert "SPO takes 4.12 times the UNet rows of DPO and 3.5 times its seconds" in text
    assert "SPO: a share of 0.9 in 1 of 1 seeds within 24 steps" in text and "(least 1.00, needed 0.9): met." in text
    monkeypatch.setattr(reach, "world_fingerprint", lambda: "another world")
    reach.reach(["dpo"], [0], tmp_path, out)
    assert ran[6:] == ["dpo-seed0@2", "dpo-seed0@4"]


def test_an_arm_that_does_not_get_there_says_so(tmp_path: Path) -> None:
    base = {"arm": "base", "seed": "0", "step": "0", "look_share": "0.5", "confirmed_share": "0.5"}
    rows = [base | {"confirmed_top5": "0.4"}]
    for step, share in ((4, 0.6), (8, 0.75)):
        rows.append(
            {"arm": "lpo", "seed": "0", "budget": "12", "seconds": "1", "policy_rows": "50", **point(step, share)}
        )
    text = reach_report.report(PLAN, rows)
    assert "| LPO | 0 of 1 | not in 12 steps (best 0.75) |" in text
    rows += [{"arm": "spo", "seed": "0", "budget": "24", "seconds": "1", "confirmed_top5": "0.3"}]
    rows[-1] |= point(4, 0.95, "0.95") | {"policy_rows": "100"}
    text = reach_report.report(PLAN, rows)
    assert "retrieval 0.75 of the base's (least 0.75, needed 0.9): missed." in text
    reach_report.plot(PLAN, rows, tmp_path / "reach.png")
    assert (tmp_path / "reach.png").stat().st_size > 10_000
    assert json.dumps(PLAN)  # plain values, which go into fingerprints
