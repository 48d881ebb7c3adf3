"""Kernel of `dpo_loss`, and what it shares with that of `rpo_loss`.

Rewards are read from memory, or added up from the chunks that the reward kernel left (`rewards_of`), which saves
`paired_preference_loss` a launch.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from ._dispatch import jit, tl


@jit
def log_sigmoid_and_slope(u):
    """(log sigmoid(u), sigmoid(-u)) without overflow; the second is the derivative of the first."""
    e = tl.exp(-tl.abs(u))
    return tl.minimum(u, 0.0) - tl.log(1.0 + e), tl.where(u >= 0.0, e, 1.0) / (1.0 + e)


@jit
def won(w, l):  # noqa: E741
    """1 where w > l, a half where they are equal, else 0, as with NaN."""
    return tl.where(w > l, 1.0, tl.where(w == l, 0.5, 0.0))


@jit
def rewards_of(reward, row, BLOCK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr):
    """Rewards of some rows: sum over chunks of value[row, chunk] * scale; every row is valid.

    reward: (value_ptr, row stride, number of chunks, scale). A reward that is there already is one chunk, scale 1.
    """
    chunks = tl.zeros((BLOCK, BLOCK_CHUNKS), tl.float32)
    for first in range(0, reward[2], BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        place = reward[0] + row.to(tl.int64)[:, None] * reward[1] + chunk[None, :]
        chunks += tl.load(place, mask=(chunk < reward[2])[None, :], other=0.0)
    return tl.sum(chunks, axis=1) * reward[3]


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
