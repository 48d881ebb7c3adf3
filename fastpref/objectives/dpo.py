"""Diffusion-DPO (arXiv 2311.12908, eq. 14): L = -mean_i log σ(β/2 · (reward(w_i) - reward(l_i))).

A tie kept with label one half counts half in either direction: -½ log σ(u) - ½ log σ(-u).
"""

from __future__ import annotations

import torch

from fastpref.objectives.types import PairRewards, Solution
from fastpref_kernels import dpo_loss


def solve_dpo(rewards: PairRewards, *, beta: float, label_smoothing: float = 0.0) -> Solution:
    """The loss over N pairs and its gradient with respect to the N + N rewards."""
    assert rewards.reward_l is not None
    with torch.enable_grad():
        winner = rewards.reward_w.detach().requires_grad_()
        loser = rewards.reward_l.detach().requires_grad_()
        if rewards.label is not None and bool((rewards.label == 0.5).any()):
            loss = _with_ties(winner, loser, rewards.label == 0.5, beta, label_smoothing)
        else:
            loss = dpo_loss(winner, loser, beta=beta, label_smoothing=label_smoothing).loss
        grad_w, grad_l = torch.autograd.grad(loss, (winner, loser))
    return Solution(loss.detach(), grad_w, grad_l)


def _with_ties(
    winner: torch.Tensor, loser: torch.Tensor, tie: torch.Tensor, beta: float, label_smoothing: float
) -> torch.Tensor:
    total = winner.new_zeros(())
    if not bool(tie.all()):
        total = dpo_loss(winner[~tie], loser[~tie], beta=beta, label_smoothing=label_smoothing).loss * (~tie).sum()
    for first, second in ((winner, loser), (loser, winner)):
        total = total + dpo_loss(first[tie], second[tie], beta=beta).loss * (0.5 * tie.sum())
    return total / len(tie)
