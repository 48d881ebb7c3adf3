"""The DPO form of `paired_preference_loss` in one launch: the last program of a row adds up its chunks, the last of all
rows takes the loss and its derivatives."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.last import counters, is_last
from ..common.launch import Launch, remembered
from ..dpo_loss.triton import solve
from ..implicit_reward.targets import Source
from ..implicit_reward.triton import (
    Form,
    block_chunks,
    chunk_sums,
    dense,
    given,
    row_means,
    store_sums,
    strides,
    walk,
)


@jit
def _paired_dpo_kernel(
    pred_ptr,
    target_ptr,
    ref_ptr,
    keys_ptr,
    p_ptr,
    q_ptr,
    ref_error_ptr,
    partial_ptr,
    counter_ptr,
    reward_ptr,
    slope_ptr,
    loss_ptr,
    effective_ptr,
    accuracy_ptr,
    n_pairs,
    n_chunks,
    beta,
    label_smoothing,
    ref_error_stride,
    n_elements,
    chunk_size,
    size_1,
    size_2,
    pred_row,
    pred_0,
    pred_1,
    pred_2,
    target_row,
    target_0,
    target_1,
    target_2,
    ref_row,
    ref_0,
    ref_1,
    ref_2,
    HAS_REF: tl.constexpr,
    HAS_REF_ERROR: tl.constexpr,
    KEYED: tl.constexpr,
    VELOCITY: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per row and chunk; reward (2N,) and slope = dL/dreward (2N,), winners first."""
    program = tl.program_id(0).to(tl.int64)
    row = program // n_chunks
    n_rows = 2 * n_pairs
    sums = chunk_sums(
        pred_ptr,
        target_ptr,
        ref_ptr,
        (keys_ptr, p_ptr, q_ptr),
        row,
        program % n_chunks,
        n_pairs,
        n_elements,
        chunk_size,
        (size_1, size_2),
        (pred_row, pred_0, pred_1, pred_2),
        (target_row, target_0, target_1, target_2),
        (ref_row, ref_0, ref_1, ref_2),
        HAS_REF,
        False,
        KEYED,
        VELOCITY,
        STRIDED,
        BLOCK_SIZE,
    )
    store_sums(sums, partial_ptr, program, tl.cast(n_rows, tl.int64) * n_chunks, HAS_REF, False)
    if is_last(counter_ptr + 1 + row, n_chunks):
        reward, _, _ = row_means(
            partial_ptr,
            row,
            n_rows,
            n_chunks,
            n_elements,
            ref_error_ptr,
            ref_error_stride,
            HAS_REF,
            HAS_REF_ERROR,
            False,
            BLOCK_CHUNKS,
        )
        tl.store(reward_ptr + row, reward)
        if is_last(counter_ptr, n_rows):
            rewards = (reward_ptr, 1), (reward_ptr + n_pairs, 1)
            slopes = slope_ptr, slope_ptr + n_pairs
            loss, accuracy = solve(rewards, slopes, n_pairs, beta, label_smoothing, BLOCK)
            tl.store(loss_ptr, loss)
            tl.store(effective_ptr, 1.0)  # each winner meets one loser
            tl.store(accuracy_ptr, accuracy)


def block_pairs(num_warps: int) -> int:
    """Pairs at a time: two a thread, so that the end of a program takes no more registers than its beginning."""
    return 64 * num_warps


class _Plan(NamedTuple):
    launch: Launch
    rows: int
    partial: int  # numbers of scratch


@remembered
def _plan(shape: tuple[int, ...], forms: tuple[Form | None, ...], beta: float, label_smoothing: float) -> _Plan:
    """forms: of pred, target, keys, p, q, ref_pred, ref_error."""
    pred, target, keys, p, _, ref_pred, ref_error = forms
    assert pred is not None
    way = walk(shape, pred[1], strides(target), strides(ref_pred), keys is not None, p is not None)
    n_rows, n_chunks = shape[0], way.n_chunks
    of_error = 0 if ref_error is None else ref_error[1][0]
    launch = Launch(
        _paired_dpo_kernel,
        (n_rows * n_chunks,),
        (n_rows // 2, n_chunks, beta, label_smoothing, of_error, *way.numbers),
        {
            "HAS_REF": ref_pred is not None,
            "HAS_REF_ERROR": ref_error is not None,
            **way.flags,
            "BLOCK_CHUNKS": block_chunks(n_chunks),
            "BLOCK": block_pairs(way.num_warps),
        },
        way.num_warps,
    )
    return _Plan(launch, n_rows, 2 * n_rows * n_chunks)


def launch(
    pred: Tensor,
    source: Source,
    ref_pred: Tensor | None,
    ref_error: Tensor | None,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, reward (2N,), dL/dreward (2N,))."""
    target, keys, p, q = dense(source)
    plan = _plan(pred.shape, given(pred, target, keys, p, q, ref_pred, ref_error), beta, label_smoothing)
    device, n_rows = pred.device, plan.rows
    reward = torch.empty(n_rows, dtype=torch.float32, device=device)
    slope = torch.empty(n_rows, dtype=torch.float32, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    effective = torch.empty((), dtype=torch.float32, device=device)
    accuracy = torch.empty((), dtype=torch.float32, device=device)
    plan.launch(
        pred,
        pred if target is None else target,
        pred if ref_pred is None else ref_pred,
        pred if keys is None else keys,
        pred if p is None else p,
        pred if q is None else q,
        pred if ref_error is None else ref_error,
        torch.empty(plan.partial, dtype=torch.float32, device=device),
        counters(device, n_rows + 1),
        reward,
        slope,
        loss,
        effective,
        accuracy,
    )
    return loss, effective, accuracy, reward, slope
