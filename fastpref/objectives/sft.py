"""SFT: the denoising error of the winners, L = mean_i err_θ(w_i)."""

from __future__ import annotations

import torch

from fastpref.objectives.types import PairRewards, Solution


def solve_sft(rewards: PairRewards) -> Solution:
    """The loss and dL/dreward; an error is a constant minus a reward, so the gradient is -1/N."""
    error = rewards.error_w
    return Solution(error.mean(), torch.full_like(error, -1.0 / len(error)), None)
