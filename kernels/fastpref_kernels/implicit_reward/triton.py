"""Kernels and launchers of `implicit_reward`; `paired_preference_loss` builds on them.

A row of C*H*W elements is cut into chunks, a program each; a second launch adds a row's chunks in one order.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.strides import address, layout_of
from .targets import Source, row_coefficients, target_block

_FEW, _MANY = 66, 1024  # chunks of a row: two rows fill 132 multiprocessors; one block of the second stage holds them


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

    keyed: as in `row_coefficients`; sizes and strides: as in `address`.
    """
    of_row = row_coefficients(keyed, row, KEYED, VELOCITY)
    is_winner = row < n_pairs
    loser = tl.where(is_winner, row + n_pairs, row)
    of_loser = row_coefficients(keyed, loser, KEYED and CROSS, VELOCITY and CROSS)
    reward = tl.zeros((BLOCK_SIZE,), tl.float32)
    error = tl.zeros((BLOCK_SIZE,), tl.float32)
    cross = tl.zeros((BLOCK_SIZE,), tl.float32)
    start = chunk * chunk_size
    for first in range(start, start + chunk_size, BLOCK_SIZE):
        offset = first + tl.arange(0, BLOCK_SIZE)
        mask = (offset < n_elements) & (offset < start + chunk_size)  # not a minimum: both bounds are multiples of 16
        p = tl.load(pred_ptr + address(offset, row, sizes, pred_strides, STRIDED), mask=mask, other=0.0).to(tl.float32)
        place = address(offset, row, sizes, target_strides, STRIDED)
        t = target_block(target_ptr, place, mask, of_row, first, KEYED, VELOCITY, BLOCK_SIZE)
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
            t_l = target_block(target_ptr, place, in_pair, of_loser, first, KEYED, VELOCITY, BLOCK_SIZE)
            cross += delta * (p_l - t_l)
    return tl.sum(reward, axis=0), tl.sum(error, axis=0), tl.sum(cross, axis=0)


@jit
def _implicit_reward_chunk_kernel(
    pred_ptr,
    target_ptr,
    ref_ptr,
    keys_ptr,
    p_ptr,
    q_ptr,
    partial_ptr,
    n_rows,
    n_chunks,
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
        (keys_ptr, p_ptr, q_ptr),
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
    p_ptr,
    q_ptr,
    grad_ptr,
    factor_ptr,
    n_chunks,
    grad_stride,
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
    of_row = row_coefficients((keys_ptr, p_ptr, q_ptr), row, KEYED, VELOCITY)
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
        t = target_block(target_ptr, place, mask, of_row, first, KEYED, VELOCITY, BLOCK_SIZE)
        place = address(offset, row, sizes, (out_row, out_0, out_1, out_2), STRIDED)
        tl.store(out_ptr + place, (scale * (p - t)).to(out_ptr.dtype.element_ty), mask=mask)


def split(n_elements: int) -> tuple[int, int]:
    """(chunks, elements of a chunk) of a row; a chunk is a multiple of 16 elements, so that it starts aligned."""
    if n_elements <= _MANY * 1024:
        size = min(1024, max(128, n_elements // _FEW // 16 * 16))
    else:
        size = -(-n_elements // (_MANY * 1024)) * 1024
    return -(-n_elements // size), size


def block(chunk_size: int, strided: bool, cross: bool = False) -> dict[str, int]:
    """BLOCK_SIZE and num_warps. Dense rows: eight elements a thread, which at 16 bits is one 16-byte access; strided
    ones: four, the elements of one Philox block, since each also needs its address in registers."""
    if strided:
        return {"BLOCK_SIZE": 512, "num_warps": 4}
    size = 256 if chunk_size <= 256 or cross else 1024  # cross in 1024 spills on sm_100
    return {"BLOCK_SIZE": size, "num_warps": size // 256}


def block_chunks(n_chunks: int) -> int:
    """Block of the second stage."""
    return 128 if n_chunks <= 128 else _MANY


class Arguments(NamedTuple):
    """What the forward and the backward kernel are given alike."""

    pointers: tuple[Tensor, ...]  # pred, target, third, keys, p, q
    numbers: tuple[int, ...]  # n_elements, chunk_size, ... to the last stride
    flags: dict[str, Any]
    n_chunks: int


def arguments(pred: Tensor, source: Source, third: Tensor | None, cross: bool = False) -> Arguments:
    """third: ref_pred or grad_pred. A pointer that a kernel does not use is pred's."""
    n_elements = pred[0].numel()
    n_chunks, chunk_size = split(n_elements)
    layout = layout_of("implicit_reward", pred, source.tensor, third)
    keyed = [None if x is None else x.contiguous() for x in source[1:]]
    pointers = (pred, source.tensor, third, *keyed)
    flags = {
        "KEYED": source.keys is not None,
        "VELOCITY": source.p is not None,
        "STRIDED": not layout.flat,
        **block(chunk_size, not layout.flat, cross),
    }
    numbers = (n_elements, chunk_size, *layout.sizes, *(s for row in layout.strides for s in row))
    return Arguments(tuple(pred if x is None else x for x in pointers), numbers, flags, n_chunks)


def launch_forward(
    pred: Tensor, source: Source, ref_pred: Tensor | None, ref_error: Tensor | None, cross: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(reward (N,), error (N,), cross (N/2,) or (0,)) in two launches."""
    n_rows, (pointers, numbers, flags, n_chunks) = pred.shape[0], arguments(pred, source, ref_pred, cross)
    partial = torch.empty(3, n_rows, n_chunks, dtype=torch.float32, device=pred.device)
    reward, error = (torch.empty(n_rows, dtype=torch.float32, device=pred.device) for _ in range(2))
    inner = torch.empty(n_rows // 2 if cross else 0, dtype=torch.float32, device=pred.device)
    chosen = {"HAS_REF": ref_pred is not None, "CROSS": cross}
    _implicit_reward_chunk_kernel[(n_rows * n_chunks,)](
        *pointers, partial, n_rows, n_chunks, *numbers, **chosen, **flags
    )
    _implicit_reward_row_kernel[(n_rows,)](
        partial,
        partial if ref_error is None else ref_error,
        reward,
        error,
        inner,
        n_rows,
        n_chunks,
        numbers[0],
        0 if ref_error is None else ref_error.stride(0),
        **chosen,
        HAS_REF_ERROR=ref_error is not None,
        BLOCK_CHUNKS=block_chunks(n_chunks),
    )
    return reward, error, inner


def launch_backward(grad: Tensor, factor: Tensor | None, pred: Tensor, source: Source) -> Tensor:
    """-2/(C*H*W) * (pred - target) * grad * factor in one launch; in pred's dtype and memory order."""
    grad_pred = torch.empty_like(pred)
    pointers, numbers, flags, n_chunks = arguments(pred, source, grad_pred)
    _implicit_reward_bwd_kernel[(pred.shape[0] * n_chunks,)](
        *pointers,
        grad,
        grad if factor is None else factor,
        n_chunks,
        grad.stride(0),
        *numbers,
        HAS_FACTOR=factor is not None,
        **flags,
    )
    return grad_pred
