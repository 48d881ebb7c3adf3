"""Kernels and launchers of `implicit_reward`; `paired_preference_loss` builds on them.

A row of C*H*W elements is cut into chunks, a program each; the last to finish adds a row's chunks in one order.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.last import counters, is_last
from ..common.launch import Launch, remembered
from ..common.strides import address, layout_by_strides
from .targets import Source, row_coefficients, target_block

_FEW, _MANY = 66, 1024  # chunks of a row: two rows fill 132 multiprocessors; one block of the second stage holds them

Strides: TypeAlias = "tuple[int, ...]"
Form: TypeAlias = "tuple[torch.dtype, Strides]"  # what a launch depends on in a tensor


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
def row_means(
    partial_ptr,
    row,
    n_rows,
    n_chunks,
    n_elements,
    ref_error_ptr,
    ref_error_stride,
    HAS_REF: tl.constexpr,
    HAS_REF_ERROR: tl.constexpr,
    CROSS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """(reward, error, cross) of a row from its chunks' sums, partial (3, N, chunks), added in one order."""
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
    cross = 0.0
    if CROSS:
        is_winner = (row < n_rows // 2) & mask
        cross = tl.sum(tl.load(place + 2 * plane, mask=is_winner, other=0.0), axis=0) * scale
    return reward, error, cross


@jit
def store_sums(sums, partial_ptr, program, plane, HAS_REF: tl.constexpr, CROSS: tl.constexpr):
    """What `chunk_sums` found for a row's chunk, into partial (3, N, chunks); plane = N * chunks."""
    if HAS_REF:
        tl.store(partial_ptr + program, sums[0])
    tl.store(partial_ptr + plane + program, sums[1])
    if CROSS:
        tl.store(partial_ptr + 2 * plane + program, sums[2])


@jit
def _implicit_reward_fwd_kernel(
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
    error_ptr,
    cross_ptr,
    n_rows,
    n_chunks,
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
    CROSS: tl.constexpr,
    KEYED: tl.constexpr,
    VELOCITY: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """A program per row and chunk; the last of a row adds up its chunks and stores the means."""
    program = tl.program_id(0).to(tl.int64)
    row = program // n_chunks
    sums = chunk_sums(
        pred_ptr,
        target_ptr,
        ref_ptr,
        (keys_ptr, p_ptr, q_ptr),
        row,
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
    store_sums(sums, partial_ptr, program, tl.cast(n_rows, tl.int64) * n_chunks, HAS_REF, CROSS)
    if is_last(counter_ptr + row, n_chunks):
        reward, error, cross = row_means(
            partial_ptr,
            row,
            n_rows,
            n_chunks,
            n_elements,
            ref_error_ptr,
            ref_error_stride,
            HAS_REF,
            HAS_REF_ERROR,
            CROSS,
            BLOCK_CHUNKS,
        )
        tl.store(reward_ptr + row, reward)
        tl.store(error_ptr + row, error)
        if CROSS:
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


class Walk(NamedTuple):
    """How the kernels go through the rows of some tensors: what the forward and the backward kernel are given alike."""

    numbers: tuple[int, ...]  # n_elements, chunk_size, ... to the last stride
    flags: dict[str, Any]  # KEYED to BLOCK_SIZE, in the kernels' order
    num_warps: int
    n_chunks: int


def walk(
    shape: tuple[int, ...],
    pred: Strides,
    target: Strides | None,
    third: Strides | None,
    keyed: bool,
    velocity: bool,
    cross: bool = False,
) -> Walk:
    """Strides of pred, target (x0) and third: ref_pred or grad_pred."""
    n_elements = math.prod(shape[1:])
    n_chunks, chunk_size = split(n_elements)
    layout = layout_by_strides("implicit_reward", shape, pred, target, third)
    chosen = block(chunk_size, not layout.flat, cross)
    flags = {"KEYED": keyed, "VELOCITY": velocity, "STRIDED": not layout.flat, "BLOCK_SIZE": chosen["BLOCK_SIZE"]}
    numbers = (n_elements, chunk_size, *layout.sizes, *(s for row in layout.strides for s in row))
    return Walk(numbers, flags, chosen["num_warps"], n_chunks)


def given(*tensors: Tensor | None) -> tuple[Form | None, ...]:
    """What a launch depends on: dtype and strides of each tensor."""
    return tuple([None if x is None else (x.dtype, x.stride()) for x in tensors])


def strides(form: Form | None) -> Strides | None:
    return None if form is None else form[1]


class ForwardPlan(NamedTuple):
    launch: Launch
    rows: int
    cross: int  # numbers of the cross term
    partial: int  # numbers of scratch


def flags_of(forms: tuple[Form | None, ...], cross: bool) -> dict[str, bool]:
    """HAS_REF, HAS_REF_ERROR and CROSS. forms: of pred, target, keys, p, q, ref_pred, ref_error."""
    return {"HAS_REF": forms[5] is not None, "HAS_REF_ERROR": forms[6] is not None, "CROSS": cross}


@remembered
def forward_plan(shape: tuple[int, ...], forms: tuple[Form | None, ...], cross: bool) -> ForwardPlan:
    """forms: of pred, target, keys, p, q, ref_pred, ref_error."""
    pred, target, keys, p, _, ref_pred, ref_error = forms
    assert pred is not None
    way = walk(shape, pred[1], strides(target), strides(ref_pred), keys is not None, p is not None, cross)
    n_rows, n_chunks = shape[0], way.n_chunks
    launch = Launch(
        _implicit_reward_fwd_kernel,
        (n_rows * n_chunks,),
        (n_rows, n_chunks, 0 if ref_error is None else ref_error[1][0], *way.numbers),
        {**flags_of(forms, cross), **way.flags, "BLOCK_CHUNKS": block_chunks(n_chunks)},
        way.num_warps,
    )
    return ForwardPlan(launch, n_rows, n_rows // 2 if cross else 0, 3 * n_rows * n_chunks)


class Arguments(NamedTuple):
    """What the first kernel of RPO shares with those here."""

    pointers: tuple[Tensor, ...]  # pred, target, ref_pred, keys, p, q; one that a kernel does not use is pred
    numbers: tuple[int, ...]
    flags: dict[str, Any]
    n_chunks: int


def arguments(pred: Tensor, source: Source, ref_pred: Tensor | None) -> Arguments:
    source = dense(source)
    pointers = (pred, source.tensor, ref_pred, *source[1:])
    target, ref = (None if x is None else x.stride() for x in (source.tensor, ref_pred))
    way = walk(pred.shape, pred.stride(), target, ref, source.keys is not None, source.p is not None)
    flags = {**way.flags, "num_warps": way.num_warps}
    return Arguments(tuple(pred if x is None else x for x in pointers), way.numbers, flags, way.n_chunks)


@remembered
def _backward_plan(
    shape: tuple[int, ...], forms: tuple[Form | None, ...], grad: Form, factor: bool, out: Strides
) -> Launch:
    """forms: of pred, target, keys, p; out: strides of the gradient."""
    pred, target, keys, p = forms
    assert pred is not None
    way = walk(shape, pred[1], strides(target), out, keys is not None, p is not None)
    return Launch(
        _implicit_reward_bwd_kernel,
        (shape[0] * way.n_chunks,),
        (way.n_chunks, grad[1][0], *way.numbers),
        {"HAS_FACTOR": factor, **way.flags},
        way.num_warps,
    )


def dense(source: Source) -> Source:
    """A source whose keys and coefficients are dense."""
    if source.keys is None:
        return source
    return Source(source.tensor, *(None if x is None else x.contiguous() for x in source[1:]))


def launch_forward(
    pred: Tensor, source: Source, ref_pred: Tensor | None, ref_error: Tensor | None, cross: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(reward (N,), error (N,), cross (N/2,) or (0,)) in one launch."""
    target, keys, p, q = dense(source)
    shape = pred.shape
    launch, n_rows, n_cross, n_partial = forward_plan(
        shape, given(pred, target, keys, p, q, ref_pred, ref_error), cross
    )
    device = pred.device
    reward = torch.empty(n_rows, dtype=torch.float32, device=device)
    error = torch.empty(n_rows, dtype=torch.float32, device=device)
    inner = torch.empty(n_cross, dtype=torch.float32, device=device)
    launch(
        pred,
        pred if target is None else target,
        pred if ref_pred is None else ref_pred,
        pred if keys is None else keys,
        pred if p is None else p,
        pred if q is None else q,
        pred if ref_error is None else ref_error,
        torch.empty(n_partial, dtype=torch.float32, device=device),
        counters(device, n_rows),
        reward,
        error,
        inner,
    )
    return reward, error, inner


def launch_backward(grad: Tensor, factor: Tensor | None, pred: Tensor, source: Source) -> Tensor:
    """-2/(C*H*W) * (pred - target) * grad * factor in one launch; in pred's dtype and memory order."""
    target, keys, p, q = dense(source)
    out = torch.empty_like(pred)
    launch = _backward_plan(
        pred.shape, given(pred, target, keys, p), (grad.dtype, grad.stride()), factor is not None, out.stride()
    )
    launch(
        pred,
        pred if target is None else target,
        out,
        pred if keys is None else keys,
        pred if p is None else p,
        pred if q is None else q,
        grad,
        grad if factor is None else factor,
    )
    return out
