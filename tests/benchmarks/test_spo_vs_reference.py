"""Ours and the literal order of work do the same SPO round: same pairs, same losses, and the counts of the issue."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import spo_vs_reference as bench  # noqa: E402
import spo_vs_reference_report as report  # noqa: E402

from fastpref.errors import UserError  # noqa: E402

PROMPTS = 2


Outcomes = tuple[bench.Outcome, bench.Outcome, list[list[torch.Tensor]]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, one_level_unet: Path) -> Outcomes:
    """A round of either side in fp64, away from the reference, and the LoRA's weights after each."""
    folder = tmp_path_factory.mktemp("tiny")
    small = [f"unet={one_level_unet}", "precision=fp64", "batch_size=4", "rollout_batch_size=1", "decode_batch_size=3"]
    config = bench.tiny_config(folder, *small)
    both = bench.Bench(config, PROMPTS, folder, std=0.2)
    found, weights = [], []
    trained = (both.literal.trained, both.trainer.policy.trainable.values())
    for run, parameters in zip((both.other, both.ours), trained, strict=True):
        found.append(run())
        weights.append([parameter.detach().clone() for parameter in parameters])
    return found[0], found[1], weights


def test_both_train_on_the_same_pairs_to_the_same_losses_and_weights(outcomes: Any) -> None:
    literal, ours, weights = outcomes
    assert len(ours.losses) == len(literal.losses) >= 2 and len(ours.pairs) >= 8
    assert any(abs(loss - math.log(2)) > 1e-3 for loss in ours.losses)
    assert bench.difference(ours, literal) < 1e-8
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_counts_are_those_of_the_issue(outcomes: Any) -> None:
    literal, ours, _ = outcomes
    for side, text, forwards in ((literal, 64, 4), (ours, 1, 2)):
        rows, pairs = side.clock.rows, len(side.pairs)
        assert rows["UNet of the rollout"] == 130 * PROMPTS
        assert rows["VAE decode"] == rows["preference model, image"] == 64 * PROMPTS
        assert rows["preference model, text"] == text * PROMPTS
        for name in ("policy forward", "reference forward", "backward"):
            assert rows[name] == forwards * pairs, name
    assert literal.clock.rows["text encoders"] == PROMPTS
    assert ours.clock.rows["text encoders"] == PROMPTS + 1  # and the empty prompt


def test_other_work_is_void(outcomes: Any) -> None:
    literal, ours, _ = outcomes
    with pytest.raises(UserError, match="void: the two sides keep other pairs"):
        bench.difference(dataclasses.replace(ours, pairs=ours.pairs[1:]), literal)
    with pytest.raises(UserError, match="void: the two sides keep other pairs"):
        bench.difference(dataclasses.replace(ours, sides=ours.sides.flip(0)), literal)
    with pytest.raises(UserError, match=r"void: the losses of the two sides differ by 2\.0e-05"):
        bench.difference(dataclasses.replace(ours, losses=[loss + 2e-5 for loss in literal.losses]), literal)


def rows() -> list[dict[str, Any]]:
    """Three repeats of made-up times; a UNet row takes 1 ms without LoRA and 2 ms with it, the rest is free."""
    found: list[dict[str, Any]] = []
    for repeat in range(3):
        for side, rollout, training in (("literal", 260, 40), ("ours", 130, 20)):
            row = {"repeat": str(repeat), "side": side, "prompts": "1", "pairs": "10", "batches": "1"}
            row |= {f"seconds in {name}": "0.01" for name in report.SPANS} | {
                f"rows {name}": "0" for name in report.SPANS
            }
            row |= {"rows UNet of the rollout": "130", "rows policy forward": str(training)}
            scale = 1 + repeat  # a machine that gets slower
            row |= {"seconds rollout": str(rollout * 1e-3 * scale), "seconds scoring": "0.05"}
            row |= {"seconds training": str(training * 2e-3 * scale), "seconds total": str(0.5 * scale)}
            more = {"model": "tiny", "threads": "1", "torch": "2", "commit": "0", "loss difference": "1e-7"}
            found.append(row | more)
        parts = {name: "0" for _, *names in report.SPANS.values() for name in names if name}
        parts |= {"UNet, LoRA beside": "2", "UNet, LoRA merged": "1", "UNet forward + backward": "4"}
        found.append({"repeat": str(repeat), "side": "parts"} | {f"ms {name}": value for name, value in parts.items()})
    return found


def test_prediction_and_ratios_by_hand() -> None:
    assert report.predicted(rows(), "literal", "rollout") == pytest.approx(0.260)
    assert report.predicted(rows(), "ours", "total") == pytest.approx(0.130 + 0.080)
    assert report.predicted_ratio(rows()) == pytest.approx((0.260 + 0.160) / 0.210)
    assert report.ratios(rows(), "training") == pytest.approx([2.0, 2.0, 2.0])
    assert report.achieved(rows()) == pytest.approx(0.5)
    assert report.rest(rows(), "ours") == pytest.approx(2 * 0.5 - 0.01 * len(report.SPANS))
    text = report.report(rows())
    assert "Training phase 2.00× faster (at least 1.8: met)" in text
    assert "50 % of what the parts and the counts predict (at least 90 %: missed)" in text
    assert "| policy forward, a kept pair | 4 | 2 |" in text


def test_the_public_code_is_looked_at_and_not_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file.*a checkout of RockeyCoss/SPO with .*--config FILE"):
        bench.refuse_public_code(tmp_path)
    for name, pieces in bench.PUBLIC_CODE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(pieces))
    with pytest.raises(UserError, match=r"cannot run beside this package: it imports CLIPVisionTransformer"):
        bench.refuse_public_code(tmp_path)
    changed = next(iter(bench.PUBLIC_CODE))
    (tmp_path / changed).write_text("")
    with pytest.raises(UserError, match="it has changed: 'noise_ref_pred_1' is not in it"):
        bench.refuse_public_code(tmp_path)


def test_a_scorer_that_nobody_trained_is_asked_for_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no preference model to score with.*fastpref train configs/emoji_spm.yaml"):
        bench.emoji_config(tmp_path / "step_preference_model")
