"""Diffusion-SDPO's safeguard (arXiv 2511.03317), one λ a pair, so that it does not depend on the micro-batch."""

from __future__ import annotations

import torch

from fastpref.objectives.types import PairRewards, Solution


def safeguard_losers(solution: Solution, rewards: PairRewards, mu: float) -> Solution:
    """Scale each loser's gradient so that, to first order, it cannot raise its winner's error.

    With δ = pred - target, a_i = -∂L/∂reward(w_i) and b_i = ∂L/∂reward(l_i):
    ``λ_i = min(1, (1-μ)·a_i·‖δ_w‖² / (b_i·δ_w·δ_l))``, and 1 where the product in the denominator is not positive.
    The loss value is unchanged.
    """
    assert solution.grad_l is not None and rewards.cross is not None
    against = solution.grad_l * rewards.cross
    with_it = (1.0 - mu) * -solution.grad_w * rewards.error_w
    tiny = torch.finfo(against.dtype).tiny
    scale = torch.where(against > 0, (with_it / against.clamp_min(tiny)).clamp(0.0, 1.0), torch.ones_like(against))
    return solution._replace(grad_l=solution.grad_l * scale)
