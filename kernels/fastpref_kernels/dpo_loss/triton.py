"""Kernel and launcher of `dpo_loss`; what `paired_preference_loss` does with its rewards too."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.launch import Launch, remembered
from ..common.pairwise import log_sigmoid_and_slope, won

BLOCK = 512  # pairs


@jit
def solve(rewards, slopes, n_pairs, beta, label_smoothing, BLOCK: tl.constexpr):
    """(mean loss, share of pairs won), one program for all pairs, so a mean has one order; stores dL/dreward.

    rewards: (pointer, stride) of winners and of losers; slopes: their pointers, dense.
    """
    loss = tl.zeros((BLOCK,), tl.float32)
    hits = tl.zeros((BLOCK,), tl.float32)
    scale = 0.5 * beta / tl.cast(n_pairs, tl.float32)
    for start in range(0, n_pairs, BLOCK):
        i = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = i < n_pairs
        w = tl.load(rewards[0][0] + i * rewards[0][1], mask=mask, other=0.0)
        l = tl.load(rewards[1][0] + i * rewards[1][1], mask=mask, other=0.0)  # noqa: E741
        u = (w - l) * (0.5 * beta)
        kept, kept_slope = log_sigmoid_and_slope(u)
        flipped, flipped_slope = log_sigmoid_and_slope(-u)
        term = -(1.0 - label_smoothing) * kept - label_smoothing * flipped
        slope = (label_smoothing * flipped_slope - (1.0 - label_smoothing) * kept_slope) * scale
        loss += tl.where(mask, term, 0.0)
        hits += tl.where(mask, won(w, l), 0.0)
        tl.store(slopes[0] + i, slope, mask=mask)
        tl.store(slopes[1] + i, -slope, mask=mask)
    return tl.sum(loss, axis=0) / n_pairs, tl.sum(hits, axis=0) / n_pairs


@jit
def _dpo_loss_kernel(
    reward_w_ptr,
    reward_l_ptr,
    loss_ptr,
    effective_ptr,
    accuracy_ptr,
    grad_w_ptr,
    grad_l_ptr,
    n_pairs,
    w_stride,
    l_stride,
    beta,
    label_smoothing,
    BLOCK: tl.constexpr,
):
    """One program: loss, effective contrasts, accuracy, dL/dreward."""
    rewards = (reward_w_ptr, w_stride), (reward_l_ptr, l_stride)
    loss, accuracy = solve(rewards, (grad_w_ptr, grad_l_ptr), n_pairs, beta, label_smoothing, BLOCK)
    tl.store(loss_ptr, loss)
    tl.store(effective_ptr, 1.0)  # each winner meets one loser
    tl.store(accuracy_ptr, accuracy)


@remembered
def _plan(n_pairs: int, w_stride: int, l_stride: int, beta: float, label_smoothing: float) -> Launch:
    numbers = n_pairs, w_stride, l_stride, beta, label_smoothing
    return Launch(_dpo_loss_kernel, (1,), numbers, {"BLOCK": BLOCK}, 4)


def launch(
    reward_w: Tensor, reward_l: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, dL/dreward_w (N,), dL/dreward_l (N,)) in one launch."""
    n_pairs, device = reward_w.shape[0], reward_w.device
    loss = torch.empty((), dtype=torch.float32, device=device)
    effective = torch.empty((), dtype=torch.float32, device=device)
    accuracy = torch.empty((), dtype=torch.float32, device=device)
    grad_w = torch.empty(n_pairs, dtype=torch.float32, device=device)
    grad_l = torch.empty(n_pairs, dtype=torch.float32, device=device)
    _plan(n_pairs, reward_w.stride(0), reward_l.stride(0), beta, label_smoothing)(
        reward_w, reward_l, loss, effective, accuracy, grad_w, grad_l
    )
    return loss, effective, accuracy, grad_w, grad_l
