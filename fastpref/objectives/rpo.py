"""Diffusion-RPO (arXiv 2406.06382): every winner of a contrast group against every loser, weighted by relatedness."""

from __future__ import annotations

from typing import Literal

import torch

from fastpref.objectives.types import PairRewards, Solution
from fastpref_kernels import rpo_loss

Weight = Literal["outside", "inside", "uniform"]


def solve_rpo(
    rewards: PairRewards,
    emb_w: torch.Tensor,
    emb_l: torch.Tensor,
    *,
    beta: float,
    temperature: float,
    weight: Weight,
    group_size: int,
) -> Solution:
    """The loss over N pairs in contrast groups of ``group_size`` consecutive ones, and dL/dreward.

    ``emb_w`` and ``emb_l`` are ``(N, E)``; they are normalised in the kernel and get no gradient.
    """
    assert rewards.reward_l is not None
    with torch.enable_grad():
        winner = rewards.reward_w.detach().requires_grad_()
        loser = rewards.reward_l.detach().requires_grad_()
        result = rpo_loss(
            winner, loser, emb_w, emb_l, beta=beta, temperature=temperature, weight=weight, group_size=group_size
        )
        grad_w, grad_l = torch.autograd.grad(result.loss, (winner, loser))
    return Solution(result.loss.detach(), grad_w, grad_l, result.effective_contrasts.detach())


def combine_embeddings(
    kind: Literal["text", "image", "text+image"], text: torch.Tensor | None, image: torch.Tensor | None
) -> torch.Tensor:
    """One unit row a sample from unit text and image rows; text+image concatenates and renormalises."""
    if kind == "text":
        rows = text
    elif kind == "image":
        rows = image
    else:
        assert text is not None and image is not None
        rows = torch.cat([text, image], dim=-1)
    assert rows is not None
    return torch.nn.functional.normalize(rows, dim=-1)
