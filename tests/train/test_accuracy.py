"""Accuracy, wherever it is computed: a pair whose two numbers are equal counts one half, as in diffusers' scripts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config
from fastpref.evaluate import pair_accuracy
from fastpref.objectives import PairRewards
from fastpref.train.figures import step_figures, won
from fastpref.train.step_preference import _figures
from fastpref.train.stepwise import StepwiseTrainer

WINNER, LOSER = torch.tensor([2.0, 1.0, 0.0, 1.0, -3.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0])
ACCURACY = (1 + 2 / 2) / 5  # one won, two ties, two lost


def test_a_tie_is_half_a_win_and_nan_is_none() -> None:
    assert won(WINNER, LOSER).tolist() == [1.0, 0.5, 0.0, 0.5, 0.0]
    diffusers = ((WINNER - LOSER).sign() / 2 + 0.5).double()
    assert torch.equal(won(WINNER, LOSER), diffusers)
    assert won(torch.tensor([math.nan, 1.0, math.inf]), torch.tensor([1.0, math.nan, math.inf])).tolist() == [0, 0, 0.5]


def test_offline_and_stepwise_figures() -> None:
    errors, zero = torch.ones(5), torch.zeros(())
    offline = step_figures(PairRewards(WINNER, LOSER, errors, errors), zero, zero, None)
    trainer: Any = StepwiseTrainer.__new__(StepwiseTrainer)
    trainer.config = Config(method="spo")
    stepwise = trainer._figures(zero, zero, torch.stack([WINNER, LOSER]).exp())
    assert offline["accuracy"] == stepwise["accuracy"] == ACCURACY


@pytest.mark.parametrize("label", [1.0, 0.0])
def test_preference_models_count_equal_scores_half_and_undecided_labels_not_at_all(label: float) -> None:
    """The last pair has no winner; label 0 says that the loser is the better one."""
    winner, loser = WINNER.clone(), LOSER.clone()
    winner[2] = 1.5 if label == 0 else 0.0  # of the first four one is won either way, two tie
    expected = {1.0: (1 + 2 / 2) / 4, 0.0: (0 + 2 / 2) / 4}[label]
    assert _figures(torch.stack([winner, loser, torch.tensor([label] * 4 + [0.5])]))["accuracy"] == expected


def test_held_out_pairs(one_level_config: Callable[..., Config], clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def margins(_: Any, pairs: list[Any], timesteps: list[int]) -> dict[int, list[float]]:
        return {t: [0.0] * len(pairs) if t else [1.0, -1.0, 0.0][: len(pairs)] for t in timesteps}

    monkeypatch.setattr(pair_accuracy._Judge, "margins", margins)
    config = one_level_config("method=spm", "train=full", f"clip={clip}", "eval_prompts=3", "eval_timesteps=[0,501]")
    found = pair_accuracy.evaluate_pair_accuracy(config)
    assert found["details"]["pairs"] == 3 and found["pair_accuracy"] == {"0": 0.5, "501": 0.5}
