"""Kernels of `implicit_reward`; `paired_preference_loss` builds on them. Launchers: _reward_launch.py.

A row of C*H*W elements is cut into chunks, a program each; a second launch adds a row's chunks in one order.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from ._dispatch import jit, tl
from ._strides import address
from ._targets import row_schedule, target_block


@jit
def chunk_sums(
    pred_ptr,
    target_ptr,
    ref_ptr,
    keyed,
    row,
    chunk,
    n_pairs,
    n_elements,
    chunk_size,
    sizes,
    pred_strides,
    target_strides,
    ref_strides,
    HAS_REF: tl.constexpr,
    CROSS: tl.constexpr,
    KEYED: tl.constexpr,
    VELOCITY: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """A chunk of a row: the reference's squared error minus the policy's, the policy's, delta_w * delta_l; three sums.

    keyed: as in `row_schedule`; sizes and strides: as in `address`.
    """
    schedule = row_schedule(keyed, row, KEYED, VELOCITY)
    is_winner = row < n_pairs
    loser = tl.where(is_winner, row + n_pairs, row)
    schedule_l = row_schedule(keyed, loser, KEYED and CROSS, VELOCITY and CROSS)
    reward = tl.zeros((BLOCK_SIZE,), tl.float32)
    error = tl.zeros((BLOCK_SIZE,), tl.float32)
    cross = tl.zeros((BLOCK_SIZE,), tl.float32)
    start = chunk * chunk_size
    for first in range(start, start + chunk_size, BLOCK_SIZE):
        offset = first + tl.arange(0, BLOCK_SIZE)
        mask = (offset < n_elements) & (offset < start + chunk_size)  # not a minimum: both bounds are multiples of 16
        p = tl.load(pred_ptr + address(offset, row, sizes, pred_strides, STRIDED), mask=mask, other=0.0).to(tl.float32)
        place = address(offset, row, sizes, target_strides, STRIDED)
        t = target_block(target_ptr, place, mask, schedule, first, KEYED, VELOCITY, BLOCK_SIZE)
        delta = tl.where(mask, p - t, 0.0)
        error += delta * delta
        if HAS_REF:
            place = address(offset, row, sizes, ref_strides, STRIDED)
            r = tl.load(ref_ptr + place, mask=mask, other=0.0).to(tl.float32)
            reward += tl.where(mask, (r - p) * ((r - t) + delta), 0.0)
        if CROSS:
            in_pair = mask & is_winner
            place = address(offset, loser, sizes, pred_strides, STRIDED)
            p_l = tl.load(pred_ptr + place, mask=in_pair, other=0.0).to(tl.float32)
            place = address(offset, loser, sizes, target_strides, STRIDED)
            t_l = target_block(target_ptr, place, in_pair, schedule_l, first, KEYED, VELOCITY, BLOCK_SIZE)
            cross += delta * (p_l - t_l)
    return tl.sum(reward, axis=0), tl.sum(error, axis=0), tl.sum(cross, axis=0)


@jit
def _implicit_reward_chunk_kernel(
    pred_ptr,
    target_ptr,
    ref_ptr,
    keys_ptr,
    timesteps_ptr,
    alphas_ptr,
    partial_ptr,
    n_rows,
    n_chunks,
    n_elements,
    chunk_size,
    n_timesteps,
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
    CROSS: tl.constexpr,
    KEYED: tl.constexpr,
    VELOCITY: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Stage one, a program per row and chunk: sums into partial (3, N, chunks), reward, error, cross."""
    program = tl.program_id(0).to(tl.int64)
    reward, error, cross = chunk_sums(
        pred_ptr,
        target_ptr,
        ref_ptr,
        (keys_ptr, timesteps_ptr, alphas_ptr, n_timesteps),
        program // n_chunks,
        program % n_chunks,
        n_rows // 2,
        n_elements,
        chunk_size,
        (size_1, size_2),
        (pred_row, pred_0, pred_1, pred_2),
        (target_row, target_0, target_1, target_2),
        (ref_row, ref_0, ref_1, ref_2),
        HAS_REF,
        CROSS,
        KEYED,
        VELOCITY,
        STRIDED,
        BLOCK_SIZE,
    )
    plane = tl.cast(n_rows, tl.int64) * n_chunks
    if HAS_REF:
        tl.store(partial_ptr + program, reward)
    tl.store(partial_ptr + plane + program, error)
    if CROSS:
        tl.store(partial_ptr + 2 * plane + program, cross)


@jit
def _implicit_reward_row_kernel(
    partial_ptr,
    ref_error_ptr,
    reward_ptr,
    error_ptr,
    cross_ptr,
    n_rows,
    n_chunks,
    n_elements,
    ref_error_stride,
    HAS_REF: tl.constexpr,
    CROSS: tl.constexpr,
    HAS_REF_ERROR: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Stage two, a program per row: the three means."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_CHUNKS)
    mask = chunk < n_chunks
    place = partial_ptr + row * n_chunks + chunk
    plane = tl.cast(n_rows, tl.int64) * n_chunks
    scale = 1.0 / tl.cast(n_elements, tl.float32)
    error = tl.sum(tl.load(place + plane, mask=mask, other=0.0), axis=0) * scale
    if HAS_REF:
        reward = tl.sum(tl.load(place, mask=mask, other=0.0), axis=0) * scale
    elif HAS_REF_ERROR:
        reward = tl.load(ref_error_ptr + row * ref_error_stride).to(tl.float32) - error
    else:
        reward = -error
    tl.store(reward_ptr + row, reward)
    tl.store(error_ptr + row, error)
    if CROSS:
        is_winner = (row < n_rows // 2) & mask
        cross = tl.sum(tl.load(place + 2 * plane, mask=is_winner, other=0.0), axis=0) * scale
        tl.store(cross_ptr + row, cross, mask=row < n_rows // 2)


@jit
def _implicit_reward_bwd_kernel(
    pred_ptr,
    target_ptr,
    out_ptr,
    keys_ptr,
    timesteps_ptr,
    alphas_ptr,
    grad_ptr,
    factor_ptr,
    n_chunks,
    grad_stride,
    n_elements,
    chunk_size,
    n_timesteps,
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
    out_row,
    out_0,
    out_1,
    out_2,
    HAS_FACTOR: tl.constexpr,
    KEYED: tl.constexpr,
    VELOCITY: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """grad_pred = -2/(C*H*W) * (pred - target) * grad, times a scalar factor; a program per row and chunk."""
    program = tl.program_id(0).to(tl.int64)
    row = program // n_chunks
    sizes = (size_1, size_2)
    schedule = row_schedule((keys_ptr, timesteps_ptr, alphas_ptr, n_timesteps), row, KEYED, VELOCITY)
    scale = tl.load(grad_ptr + row * grad_stride).to(tl.float32) * (-2.0 / tl.cast(n_elements, tl.float32))
    if HAS_FACTOR:
        scale *= tl.load(factor_ptr)
    start = program % n_chunks * chunk_size
    for first in range(start, start + chunk_size, BLOCK_SIZE):
        offset = first + tl.arange(0, BLOCK_SIZE)
        mask = (offset < n_elements) & (offset < start + chunk_size)
        place = address(offset, row, sizes, (pred_row, pred_0, pred_1, pred_2), STRIDED)
        p = tl.load(pred_ptr + place, mask=mask, other=0.0).to(tl.float32)
        place = address(offset, row, sizes, (target_row, target_0, target_1, target_2), STRIDED)
        t = target_block(target_ptr, place, mask, schedule, first, KEYED, VELOCITY, BLOCK_SIZE)
        place = address(offset, row, sizes, (out_row, out_0, out_1, out_2), STRIDED)
        tl.store(out_ptr + place, (scale * (p - t)).to(out_ptr.dtype.element_ty), mask=mask)
