"""The comparison: its arms differ in what they say, its statistics are right, and finished rows are kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import compare  # noqa: E402
import compare_report  # noqa: E402

PLAN, ARMS = compare.read_plan()


def row(arm: str, seed: int, share: float, distance: float = 5.0, top5: float = 0.4) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "style_share": share, "style_distance": distance, "top5": top5}


def test_every_arm_is_a_valid_recipe_and_no_two_are_the_same() -> None:
    configs = [arm.config(PLAN, 0, Path("runs")) for arm in ARMS.values()]
    assert len({compare.fingerprint(config) for config in configs}) == len(ARMS)
    assert {arm.panel for arm in ARMS.values()} == set(PLAN["panels"])


def test_the_same_budget_of_pairs_for_all_and_the_same_base() -> None:
    for arm in ARMS.values():
        config, first = arm.config(PLAN, 1, Path("runs")), ARMS["sft"].config(PLAN, 1, Path("runs"))
        for key in ("steps", "batch_size", "model", "store", "learning_rate", "lora_rank", "timestep_range", "seed"):
            assert getattr(config, key) == getattr(first, key), (arm.name, key)


def test_what_the_contrasts_and_the_short_form_name_exists() -> None:
    named = {name for pair in PLAN["contrasts"] for name in pair} | set(PLAN["short"]["arms"])
    assert named <= set(ARMS)


def test_noisy_arms_differ_from_their_clean_twins_in_the_labels_alone() -> None:
    for name in ("sft", "dpo", "dpo_shared_t", "rpo"):
        clean, noisy = (ARMS[arm].config(PLAN, 0, Path("runs")).model_dump() for arm in (name, f"{name}_noise"))
        assert {key for key in clean if clean[key] != noisy[key]} == {"name", "label_noise"}


def test_fingerprint_ignores_places_and_sees_settings() -> None:
    here, there = (ARMS["rpo"].config(PLAN, 0, Path(runs)) for runs in ("runs", "elsewhere"))
    assert compare.fingerprint(here) == compare.fingerprint(there)
    assert compare.fingerprint(here) != compare.fingerprint(ARMS["rpo"].config(PLAN, 1, Path("runs")))


def test_interval_by_hand() -> None:
    found = compare_report.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.half == pytest.approx(4.302653 / 3**0.5)  # t(0.975, 2) = 4.302653, s = 1
    assert found.sign == 0
    assert compare_report.interval([2.9, 3.0, 3.1]).sign == 1
    assert compare_report.interval([-2.9, -3.0, -3.1]).sign == -1
    assert compare_report.interval([5.0]).sign == 0


def test_differences_are_paired_by_seed() -> None:
    rows = [row("rpo", seed, 0.5 + 0.1 * seed) for seed in range(4)]
    rows += [row("dpo", seed, 0.4 + 0.1 * seed) for seed in range(3)]
    found = compare_report.paired(rows, "rpo", "dpo", "style_share")
    assert found is not None and found.n == 3
    assert found.mean == pytest.approx(0.1) and found.half == pytest.approx(0.0, abs=1e-9)


def test_a_smaller_distance_is_named_as_the_better_one() -> None:
    rows = [row("rpo", s, 0.9, 4.0 + 0.01 * s) for s in range(3)] + [row("dpo", s, 0.9, 6.0) for s in range(3)]
    table = compare_report.contrast_table({"contrasts": [["rpo", "dpo"], ["dpo", "rpo"]]}, rows)
    first, second = table.splitlines()[2:]
    assert "**-1.99 ± 0.02** (RPO)" in first and "**+1.99 ± 0.02** (RPO)" in second
    assert "+0.00 ± 0.00" in first and "**+0.00" not in first


def test_rows_that_are_there_are_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []
    figures = {"style_share": 0.5, "style_distance": 9.0, "top1": 0.1, "top5": 0.3, "distance_floor": 3.0}

    def run_arm(config: Any) -> dict[str, Any]:
        ran.append(config.name)
        return figures

    monkeypatch.setattr(compare, "run_arm", run_arm)
    monkeypatch.setattr(compare, "base_row", lambda *_: figures)
    monkeypatch.setattr(compare, "world_fingerprint", lambda: "world")
    out, arms = tmp_path / "compare.csv", [ARMS["sft"], ARMS["dpo"]]
    compare.compare(PLAN, arms, [0, 1], tmp_path, out)
    assert ran == ["sft-seed0", "dpo-seed0", "sft-seed1", "dpo-seed1"]
    kept = [line for line in common.read_csv(out) if (line["arm"], line["seed"]) != ("dpo", "0")]
    common.write_csv(out, kept)
    rows = compare.compare(PLAN, arms, [0, 1], tmp_path, out)
    assert ran[4:] == ["dpo-seed0"] and len(rows) == 5
    monkeypatch.setattr(compare, "world_fingerprint", lambda: "another world")
    assert len(compare.compare(PLAN, arms, [0, 1], tmp_path, out)) == 5
    assert len(ran) == 9


def test_fill_replaces_what_is_between_the_markers_and_refuses_a_document_without(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- t -->\nold\n<!-- end of t -->\nb\n")
    common.fill(page, "t", "new")
    assert page.read_text() == "a\n<!-- t -->\nnew\n<!-- end of t -->\nb\n"
    with pytest.raises(ValueError, match="must hold '<!-- u -->'"):
        common.fill(page, "u", "new")
