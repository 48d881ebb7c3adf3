"""Kernel and launcher of `dpo_loss`; its second stage in `paired_preference_loss` too."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.pairwise import Rewards, chunk_block, log_sigmoid_and_slope, rewards_of, won


def blocks(n_chunks: int) -> dict[str, int]:
    return {"BLOCK": 32 if n_chunks > 1 else 512, "BLOCK_CHUNKS": chunk_block(n_chunks)}


@jit
def _dpo_loss_kernel(
    reward_w_ptr,
    reward_l_ptr,
    reward_ptr,
    loss_ptr,
    effective_ptr,
    accuracy_ptr,
    grad_w_ptr,
    grad_l_ptr,
    n_pairs,
    n_chunks,
    w_stride,
    l_stride,
    reward_scale,
    beta,
    label_smoothing,
    BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """One program for all pairs, so the mean has one order: rewards (2N,), loss, accuracy, dL/dreward."""
    reward_w = (reward_w_ptr, w_stride, n_chunks, reward_scale)
    reward_l = (reward_l_ptr, l_stride, n_chunks, reward_scale)
    loss = tl.zeros((BLOCK,), tl.float32)
    hits = tl.zeros((BLOCK,), tl.float32)
    scale = 0.5 * beta / tl.cast(n_pairs, tl.float32)
    for start in range(0, n_pairs, BLOCK):
        i = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = i < n_pairs
        i = tl.minimum(i, n_pairs - 1)  # lanes past the end repeat the last pair and store nothing
        w = rewards_of(reward_w, i, BLOCK, BLOCK_CHUNKS)
        l = rewards_of(reward_l, i, BLOCK, BLOCK_CHUNKS)  # noqa: E741
        u = (w - l) * (0.5 * beta)
        kept, kept_slope = log_sigmoid_and_slope(u)
        flipped, flipped_slope = log_sigmoid_and_slope(-u)
        term = -(1.0 - label_smoothing) * kept - label_smoothing * flipped
        slope = (label_smoothing * flipped_slope - (1.0 - label_smoothing) * kept_slope) * scale
        loss += tl.where(mask, term, 0.0)
        hits += tl.where(mask, won(w, l), 0.0)
        tl.store(reward_ptr + i, w, mask=mask)
        tl.store(reward_ptr + n_pairs + i, l, mask=mask)
        tl.store(grad_w_ptr + i, slope, mask=mask)
        tl.store(grad_l_ptr + i, -slope, mask=mask)
    tl.store(loss_ptr, tl.sum(loss, axis=0) / n_pairs)
    tl.store(effective_ptr, 1.0)  # each winner meets one loser
    tl.store(accuracy_ptr, tl.sum(hits, axis=0) / n_pairs)


def launch(
    reward_w: Rewards, reward_l: Rewards, grad_w: Tensor, grad_l: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, rewards (2N,)) in one launch; fills grad_w (N,) and grad_l (N,)."""
    n_pairs, n_chunks = grad_w.shape[0], reward_w.values.shape[1]
    loss, effective, accuracy = (torch.empty((), dtype=torch.float32, device=grad_w.device) for _ in range(3))
    rewards = torch.empty(2 * n_pairs, dtype=torch.float32, device=grad_w.device)
    _dpo_loss_kernel[(1,)](
        reward_w.values,
        reward_l.values,
        rewards,
        loss,
        effective,
        accuracy,
        grad_w,
        grad_l,
        n_pairs,
        n_chunks,
        reward_w.values.stride(0),
        reward_l.values.stride(0),
        reward_w.scale,
        beta,
        label_smoothing,
        **blocks(n_chunks),
    )
    return loss, effective, accuracy, rewards
