"""Training is a function of the recipe, not of the layout: two processes under every engine against one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from ranks import Task
from safetensors.torch import load_file

from fastpref.config import Config, load_config

STEPS = 20
SCORER = """
def bright(images, prompts, t):
    return 1500 * images.mean(dim=(1, 2, 3)) + 800 * images.std(dim=(1, 2, 3))
"""
METHODS = {
    "dpo": ["method=dpo", "micro_batch_size=4"],
    "rpo": ["method=rpo", "group_size=4", "temperature=0.3", "micro_batch_size=2", "ema_decay=0.9"],
    "spo": [
        *("method=spo", "scorer=tiny_scorers:bright", "resolution=16", "sample_steps=4", "plain_steps=2"),
        *("candidates=3", "guidance_scale=1.0", "rollout_prompts=4", "rollout_batch_size=2", "batch_size=5"),
        *("micro_batch_size=2", "score_threshold=0.05", "beta=10"),
    ],
}
LAYOUTS = {
    "2x4": [],
    "ZeRO-1": ["engine=deepspeed", "zero_stage=1"],
    "ZeRO-2": ["engine=deepspeed", "zero_stage=2"],
    "ZeRO-3": ["engine=deepspeed", "zero_stage=3"],
}
FIGURES = ("loss", "grad_norm", "margin", "accuracy", "effective_contrasts", "pairs_kept", "reward_winner")
COUNTS = ("samples_seen", "unet_forwards", "unet_backwards", "vae_decodes", "scorer_forwards")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the runs go, with a scorer on Python's path and one thread everywhere."""
    place, before = tmp_path_factory.mktemp("ranks"), torch.get_num_threads()
    (place / "tiny_scorers.py").write_text(SCORER)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        patch.setenv("PYTHONPATH", ":".join([str(place), *filter(None, sys.path)]))
        yield place
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(folder: Path, sdxl: Path, sdxl_store: Path, few_records: Path) -> Callable[..., Config]:
    base = [
        *(f"model={sdxl}", f"store={sdxl_store}", f"records={few_records}", f"output_dir={folder}/runs"),
        *("batch_size=8", "beta=200", "lora_rank=4", "lora_targets=[to_q, to_v]", "learning_rate=0.001"),
        *("evaluate=false", "tracker=none", "checkpoint_every=10", f"steps={STEPS}", "keep_best=loss"),
    ]
    return lambda name, *more: load_config("", [*base, f"name={name}", *more])


def lines(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(config.run_dir / "pytorch_lora_weights.safetensors")


def summary(config: Config) -> dict[str, Any]:
    return json.loads((config.run_dir / "summary.json").read_text())


def difference(a: Config, b: Config, *, rounded: bool = False) -> float:
    """The largest of all figures of all steps and of all weights.

    ``rounded`` leaves out the accuracy, a count of signs: here some margins are as small as fp32's rounding.
    """
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    found = [float((left[name] - right[name]).abs().max()) for name in left]
    for mine, other in zip(lines(a), lines(b), strict=True):
        for name in (name for name in FIGURES if not (rounded and name == "accuracy")):
            assert (mine.get(name) is None) == (other.get(name) is None), name
            if mine.get(name) is not None:
                found.append(abs(mine[name] - other[name]) / max(1.0, abs(mine[name])))
    return max(found)


def same(a: Config, b: Config) -> bool:
    left, right = weights(a), weights(b)
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def runs(folder: Path, recipe: Callable[..., Config]) -> dict[str, Config]:
    """Every method in every layout, in float64; RPO in fp32 too, whole and cut after ten steps."""
    made = {}
    for method, settings in METHODS.items():
        for layout, engine in LAYOUTS.items():
            name = f"{method}-{layout}"
            made[name] = recipe(name, "precision=fp64", *settings, *engine)
    for layout, engine in LAYOUTS.items():
        made[f"whole-{layout}"] = recipe(f"whole-{layout}", *METHODS["rpo"], *engine)
        made[f"cut-{layout}"] = recipe(f"cut-{layout}", *METHODS["rpo"], *engine, "steps=10")
    made["nan"] = recipe("nan", *METHODS["dpo"], *LAYOUTS["ZeRO-2"], "steps=4")
    faults = {"nan": "nan"}
    tasks = [Task(config, fault=faults.get(name, "")) for name, config in made.items()]
    results = ranks.finish(ranks.start([ranks.__file__, *ranks.recipe_files(tasks, folder)]), timeout=900)
    assert [code for code, _ in results] == [0, 0], results[0][1] + results[1][1]
    return made


@pytest.fixture(scope="module")
def alone(recipe: Callable[..., Config]) -> dict[str, Config]:
    """The same in one process: the whole batch at once, and accumulated."""
    made = {}
    for method, settings in METHODS.items():
        whole = ["micro_batch_size=null"]
        made[method] = recipe(f"{method}-alone", "precision=fp64", *settings, *whole)
        made[f"{method} accumulated"] = recipe(f"{method}-accumulated", "precision=fp64", *settings)
    made["fp32"] = recipe("fp32-alone", *METHODS["rpo"])
    for config in made.values():
        ranks.train(config)
    return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["accumulated", *LAYOUTS])
def test_twenty_steps_are_those_of_one_process(
    runs: dict[str, Config], alone: dict[str, Config], method: str, layout: str
) -> None:
    """1×8, 1×4 accumulated, 2×4 and ZeRO 1, 2, 3: 1e-9 in float64, for every figure of every step and the weights."""
    other = alone[f"{method} accumulated"] if layout == "accumulated" else runs[f"{method}-{layout}"]
    assert next(iter(weights(other).values())).dtype == torch.float64
    assert difference(alone[method], other) < 1e-9
    assert len(lines(other)) == STEPS
    counted = {name: summary(alone[method])[name] for name in COUNTS}
    if layout == "accumulated":
        return
    assert summary(other)["world_size"] == 2
    mine, one = (summary(config)["best_checkpoint"] for config in (other, alone[method]))
    assert mine["step"] == one["step"] and abs(mine["value"] - one["value"]) < 1e-9
    if method != "rpo":  # which scores its batch twice where it is cut
        assert {name: summary(other)[name] for name in COUNTS} == counted


def test_fp32_differences_between_layouts_are_printed_and_small(
    runs: dict[str, Config], alone: dict[str, Config], capsys: pytest.CaptureFixture[str]
) -> None:
    for layout in LAYOUTS:
        off = difference(alone["fp32"], runs[f"whole-{layout}"], rounded=True)
        with capsys.disabled():
            print(f"\nRPO in fp32, {STEPS} steps, one process against {layout}: {off:.1e}")
        assert off < 1e-4


def test_a_gradient_that_is_not_finite_in_one_rank_is_skipped_by_all(
    runs: dict[str, Config], recipe: Callable[..., Config]
) -> None:
    single = recipe("nan-alone", *METHODS["dpo"], "steps=4")
    ranks.train(single, fault="nan")
    for config, step in ((runs["nan"], 3), (single, 2)):  # the third of one backward a step, and of two
        norms = [line["grad_norm"] for line in lines(config)]
        assert [place for place, norm in enumerate(norms, 1) if norm is None] == [step]
        assert all(torch.isfinite(value).all() for value in weights(config).values())
        assert summary(config)["skipped_steps"] == 1


RESUMED = {
    "2 ranks again": ("2x4", "2x4", True),
    "ZeRO-1 again": ("ZeRO-1", "ZeRO-1", True),
    "ZeRO-2 again": ("ZeRO-2", "ZeRO-2", True),
    "ZeRO-3 again": ("ZeRO-3", "ZeRO-3", True),
    "ZeRO-2 to ZeRO-3": ("ZeRO-2", "ZeRO-3", False),
    "ZeRO-3 to ZeRO-1": ("ZeRO-3", "ZeRO-1", False),
    "2 ranks to ZeRO-2": ("2x4", "ZeRO-2", False),
}


@pytest.fixture(scope="module")
def resumed(folder: Path, recipe: Callable[..., Config], runs: dict[str, Config]) -> dict[str, Config]:
    """What was cut after ten steps gone on with, in new processes; and a run whose second checkpoint has no room."""
    made = {
        name: recipe(name.replace(" ", "-"), *METHODS["rpo"], *LAYOUTS[to], "resume=auto")
        for name, (_, to, _) in RESUMED.items()
    }
    tasks = [Task(config, runs[f"cut-{RESUMED[name][0]}"].run_dir) for name, config in made.items()]
    made["no space"] = recipe("no-space", *METHODS["dpo"], *LAYOUTS["ZeRO-1"], "checkpoint_every=2", "steps=6")
    tasks.append(Task(made["no space"], fault="no space"))
    results = ranks.finish(ranks.start([ranks.__file__, *ranks.recipe_files(tasks, folder)]), timeout=900)
    assert [code for code, _ in results] == [0, 0], results[0][1] + results[1][1]
    return made


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_is_exact_on_the_same_layout_and_close_on_another(
    resumed: dict[str, Config], runs: dict[str, Config], name: str
) -> None:
    _, to, exact = RESUMED[name]
    whole = runs[f"whole-{to}"]
    off = difference(resumed[name], whole, rounded=not exact)
    assert (off == 0 and same(resumed[name], whole)) if exact else 0 < off < 1e-4
    assert summary(resumed[name])["unet_forwards"] == summary(whole)["unet_forwards"]
    mine, other = (summary(config)["best_checkpoint"] for config in (resumed[name], whole))
    assert mine == other if exact else mine["step"] == other["step"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_best_checkpoint_is_exported_from_any_layout(runs: dict[str, Config], layout: str) -> None:
    """Here that of step 10, whose averages a run of ten steps ends with."""
    whole, cut = runs[f"whole-{layout}"].run_dir / "best", runs[f"cut-{layout}"].run_dir
    best, last = (load_file(place / "pytorch_lora_weights.safetensors") for place in (whole, cut))
    assert summary(runs[f"whole-{layout}"])["best_checkpoint"]["step"] == 10
    assert best.keys() == last.keys() and all(torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize("layout", ["2x4", "ZeRO-3"])
def test_two_ranks_go_on_as_one(
    runs: dict[str, Config],
    alone: dict[str, Config],
    recipe: Callable[..., Config],
    layout: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = recipe(f"{layout}-to-one", *METHODS["rpo"], "resume=auto")
    ranks.train(config, runs[f"cut-{layout}"].run_dir)
    assert 0 < difference(config, alone["fp32"], rounded=True) < 1e-4
    assert "going on as 1 rank: equal to rounding" in " ".join(capfd.readouterr().err.split())


def test_a_disk_that_fills_in_one_rank_leaves_the_checkpoint_before(resumed: dict[str, Config], folder: Path) -> None:
    config = resumed["no space"]
    for rank in (0, 1):
        said = (folder / f"no-space.rank{rank}.error").read_text()
        assert said.startswith("rank 1: cannot write the file") and "No space left" in said and "\n" not in said
    (kept,) = (config.run_dir / "checkpoints").iterdir()
    assert kept.name == "step-000002"


def test_the_launchers_start_it(folder: Path, recipe: Callable[..., Config], runs: dict[str, Config]) -> None:
    """``deepspeed --module fastpref.cli`` trains as the processes above; the JSON decides what the recipe does not."""
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}))
    config = recipe("launched", *METHODS["dpo"], "precision=fp64", "steps=3", "engine=deepspeed")
    (file,) = ranks.recipe_files([Task(config)], folder)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]
    command = [*launcher, str(ranks.free_port()), "--module", "fastpref.cli", "train", file]
    result = subprocess.run([*command, f"deepspeed={folder}/zero.json"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line["loss"] for line in lines(config)] == [line["loss"] for line in lines(runs["dpo-ZeRO-2"])[:3]]
    assert result.stdout.count("3 steps of dpo") == 1
