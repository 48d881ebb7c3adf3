"""Kernels and launchers of `transition_loss`.

A row of C*H*W elements is cut into chunks, a program each; a second launch of one program adds the chunks of every row
in one order and makes the loss of the pairs.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.pairwise import log_sigmoid_and_slope, won
from ..common.steps import all_channels_last, empty_rows_like, load_fp32, load_step, row_pointer, transpose

_BLOCK = 1024
_MAX_CHUNKS = 256  # of a row: enough programs for a full GPU at two rows, few enough for one block in the second stage
_PAIR_TILES = {16: 64, 64: 16, 256: 4}  # chunks -> pairs of a tile of the second stage


@jit
def _transition_chunk_kernel(
    cond_ptr,
    uncond_ptr,
    ref_cond_ptr,
    ref_uncond_ptr,
    x_ptr,
    x_w_ptr,
    x_l_ptr,
    coefficients_ptr,
    partial_ptr,
    n_elements,
    n_rows: int,
    n_pairs: int,
    n_chunks: int,
    n_blocks: int,
    coefficient_row: int,
    guidance_scale,
    cond_row,
    uncond_row,
    ref_cond_row,
    ref_uncond_row,
    x_row,
    x_w_row,
    x_l_row,
    inner: int,
    outer: int,
    GUIDED: tl.constexpr,
    LINEAR: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Stage one, a program per row and chunk of n_blocks blocks: sums into partial (2, B, chunks), winner and loser."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    # with one x_t a row is both sides of its pair; stacked, the first half are winners, the second half losers
    loser = row - (n_rows - n_pairs)
    is_w, is_l = row < n_pairs, loser >= 0
    pair = tl.where(is_w, row, loser)
    _, _, drift, c, std = load_step(coefficients_ptr, coefficient_row, pair)
    total_w = tl.zeros((BLOCK_SIZE,), tl.float32)
    total_l = tl.zeros((BLOCK_SIZE,), tl.float32)
    start = (chunk * n_blocks).to(tl.int64) * BLOCK_SIZE
    for first in range(start, start + n_blocks * BLOCK_SIZE, BLOCK_SIZE):
        offset = first + tl.arange(0, BLOCK_SIZE).to(tl.int64)
        mask = offset < n_elements
        at_x = transpose(offset, inner, outer, LINEAR)
        pred = load_fp32(cond_ptr + row * cond_row + offset, mask)
        # the difference branch by branch: exactly 0 where the policy equals the reference
        shift = pred - load_fp32(ref_cond_ptr + row * ref_cond_row + offset, mask)
        if GUIDED:
            uncond = load_fp32(uncond_ptr + row * uncond_row + offset, mask)
            base = uncond - load_fp32(ref_uncond_ptr + row * ref_uncond_row + offset, mask)
            shift = base + guidance_scale * (shift - base)
            pred = uncond + guidance_scale * (pred - uncond)
        shift = c * shift
        x = load_fp32(x_ptr + row * x_row + at_x, mask)
        move = drift * x + c * pred
        # is_w and is_l, not kept over the loop: with them sm_100 spills
        x_w = load_fp32(x_w_ptr + row * x_w_row + at_x, mask & (row < n_pairs))
        x_l = load_fp32(x_l_ptr + loser * x_l_row + at_x, mask & (row >= n_rows - n_pairs))
        total_w += shift * (2.0 * (x_w - x - move) + shift)
        total_l += shift * (2.0 * (x_l - x - move) + shift)
    scale = 0.5 / (std * std)
    place = partial_ptr + chunk
    tl.store(place + row * n_chunks, tl.sum(total_w, axis=0) * scale, mask=is_w)
    tl.store(place + (n_pairs + loser) * n_chunks, tl.sum(total_l, axis=0) * scale, mask=is_l)


@jit
def _transition_pair_kernel(
    partial_ptr,
    ratio_w_ptr,
    ratio_l_ptr,
    slopes_ptr,
    loss_ptr,
    clipped_ptr,
    accuracy_ptr,
    beta_ptr,
    n_elements,
    n_pairs: int,
    n_chunks: int,
    beta,
    low,
    high,
    STORED_BETA: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """Stage two, one program: ratios, the loss and its derivatives with respect to the log-ratios, (2, B)."""
    loss = tl.zeros((BLOCK_PAIRS,), tl.float32)
    clipped = tl.zeros((BLOCK_PAIRS,), tl.float32)
    correct = tl.zeros((BLOCK_PAIRS,), tl.float32)
    chunk = tl.arange(0, BLOCK_CHUNKS)[None, :]
    per_element = 1.0 / tl.cast(n_elements, tl.float32)
    per_pair = 1.0 / tl.cast(n_pairs, tl.float32)
    if STORED_BETA:
        beta = tl.load(beta_ptr).to(tl.float32)
    for start in range(0, n_pairs, BLOCK_PAIRS):
        pair = start + tl.arange(0, BLOCK_PAIRS).to(tl.int64)
        mask = pair < n_pairs
        place = partial_ptr + pair[:, None] * n_chunks + chunk
        tile = mask[:, None] & (chunk < n_chunks)
        d_w = tl.sum(tl.load(place, mask=tile, other=0.0), axis=1) * per_element
        d_l = tl.sum(tl.load(place + tl.cast(n_pairs, tl.int64) * n_chunks, mask=tile, other=0.0), axis=1) * per_element
        out_w = (d_w < low) | (d_w > high)
        out_l = (d_l < low) | (d_l > high)
        kept_w = tl.where(d_w < low, low, tl.where(d_w > high, high, d_w))
        kept_l = tl.where(d_l < low, low, tl.where(d_l > high, high, d_l))
        log_sigmoid, slope = log_sigmoid_and_slope(beta * (kept_w - kept_l))
        slope = slope * (beta * per_pair)
        tl.store(slopes_ptr + pair, tl.where(out_w, 0.0, -slope), mask=mask)
        tl.store(slopes_ptr + n_pairs + pair, tl.where(out_l, 0.0, slope), mask=mask)
        tl.store(ratio_w_ptr + pair, tl.exp(d_w), mask=mask)
        tl.store(ratio_l_ptr + pair, tl.exp(d_l), mask=mask)
        loss -= tl.where(mask, log_sigmoid, 0.0)
        clipped += tl.where(mask, out_w.to(tl.float32) + out_l.to(tl.float32), 0.0)
        correct += tl.where(mask, won(d_w, d_l), 0.0)
    tl.store(loss_ptr, tl.sum(loss, axis=0) * per_pair)
    tl.store(clipped_ptr, tl.sum(clipped, axis=0) * (0.5 * per_pair))
    tl.store(accuracy_ptr, tl.sum(correct, axis=0) * per_pair)


@jit
def _transition_bwd_kernel(
    grad_ptr,
    slopes_ptr,
    cond_ptr,
    uncond_ptr,
    x_ptr,
    x_w_ptr,
    x_l_ptr,
    coefficients_ptr,
    grad_cond_ptr,
    grad_uncond_ptr,
    n_elements,
    n_rows: int,
    n_pairs: int,
    n_blocks: int,
    coefficient_row: int,
    guidance_scale,
    cond_row,
    uncond_row,
    x_row,
    x_w_row,
    x_l_row,
    inner: int,
    outer: int,
    GUIDED: tl.constexpr,
    LINEAR: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """grad_pred = c / (std^2 * C*H*W) * sum over sides of slope * (x - mu), a program per row and block."""
    program = tl.program_id(0).to(tl.int64)
    row = program // n_blocks
    loser = row - (n_rows - n_pairs)
    is_w, is_l = row < n_pairs, loser >= 0
    pair = tl.where(is_w, row, loser)
    _, _, drift, c, std = load_step(coefficients_ptr, coefficient_row, pair)
    slope_w = tl.load(slopes_ptr + row, mask=is_w, other=0.0)
    slope_l = tl.load(slopes_ptr + n_pairs + loser, mask=is_l, other=0.0)
    offset = (program - row * n_blocks) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offset < n_elements
    at_x = transpose(offset, inner, outer, LINEAR)
    # what is multiplied by 0 is not read
    needed = offset < tl.where((slope_w != 0.0) | (slope_l != 0.0), n_elements, 0)
    x_w = load_fp32(x_w_ptr + row * x_w_row + at_x, needed & is_w)
    x_l = load_fp32(x_l_ptr + loser * x_l_row + at_x, needed & is_l)
    # slopes that cancel, both ratios inside the bounds: slope_w * (x_w - x_l), without mu
    needed = offset < tl.where(slope_w + slope_l != 0.0, n_elements, 0)
    pred = load_fp32(cond_ptr + row * cond_row + offset, needed)
    if GUIDED:
        uncond = load_fp32(uncond_ptr + row * uncond_row + offset, needed)
        pred = uncond + guidance_scale * (pred - uncond)
    x = load_fp32(x_ptr + row * x_row + at_x, needed)
    move = drift * x + c * pred
    origin = tl.where(slope_w + slope_l != 0.0, x, x_l)
    scale = tl.load(grad_ptr).to(tl.float32) * (c / (std * std)) / tl.cast(n_elements, tl.float32)
    grad_pred = scale * slope_w * (x_w - origin - move) + scale * slope_l * (x_l - origin - move)
    place = row * n_elements + offset
    if GUIDED:
        grad_uncond = (1.0 - guidance_scale) * grad_pred
        tl.store(grad_uncond_ptr + place, grad_uncond.to(grad_uncond_ptr.dtype.element_ty), mask=mask)
        grad_pred = guidance_scale * grad_pred
    tl.store(grad_cond_ptr + place, grad_pred.to(grad_cond_ptr.dtype.element_ty), mask=mask)


def _chunks(n_elements: int) -> tuple[int, int]:
    """(chunks of a row, blocks of a chunk)."""
    blocks = -(-n_elements // _BLOCK)
    blocks_per_chunk = -(-blocks // _MAX_CHUNKS)
    return -(-blocks // blocks_per_chunk), blocks_per_chunk


def _order(predictions: dict[str, Tensor], latents: dict[str, Tensor]) -> tuple[int, int, bool]:
    """(inner, outer, linear): kernels go through rows as the predictions lie in memory, latents may lie transposed."""
    op = "transition_loss"
    last = all_channels_last(op, predictions)
    channels, places = predictions["eps_cond"].shape[1], predictions["eps_cond"][0, 0].numel()
    inner, outer = (channels, places) if last else (places, channels)
    return inner, outer, last == all_channels_last(op, latents)


def _named(prefix: str, cond: Tensor, uncond: Tensor | None) -> dict[str, Tensor]:
    found = {f"{prefix}eps_cond": cond}
    return found if uncond is None else found | {f"{prefix}eps_uncond": uncond}


def launch_forward(
    predictions: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    latents: tuple[Tensor, Tensor, Tensor],
    coefficients: Tensor,
    guidance_scale: float,
    beta: float | Tensor,
    low: float,
    high: float,
) -> tuple[Tensor, ...]:
    cond, uncond, ref_cond, ref_uncond = predictions
    named = _named("", cond, uncond) | _named("ref_", ref_cond, ref_uncond)
    inner, outer, linear = _order(named, dict(zip(("x_t", "x_w", "x_l"), latents, strict=True)))
    n_rows, n_pairs, n_elements = cond.shape[0], latents[1].shape[0], cond[0].numel()
    n_chunks, n_blocks = _chunks(n_elements)
    coefficients, coefficient_row = row_pointer(coefficients)
    tensors = (cond, cond if uncond is None else uncond, ref_cond, ref_cond if ref_uncond is None else ref_uncond)
    partial, ratio_w, ratio_l, slopes, *scalars = (
        torch.empty(shape, dtype=torch.float32, device=cond.device)
        for shape in ((2, n_pairs, n_chunks), (n_pairs,), (n_pairs,), (2, n_pairs), (), (), ())
    )
    _transition_chunk_kernel[(n_rows, n_chunks)](
        *tensors,
        *latents,
        coefficients,
        partial,
        n_elements,
        n_rows,
        n_pairs,
        n_chunks,
        n_blocks,
        coefficient_row,
        guidance_scale,
        *(x.stride(0) for x in (*tensors, *latents)),
        inner,
        outer,
        GUIDED=uncond is not None,
        LINEAR=linear,
        BLOCK_SIZE=_BLOCK,
    )
    block_chunks = min(size for size in _PAIR_TILES if size >= n_chunks)
    _transition_pair_kernel[(1,)](
        partial,
        ratio_w,
        ratio_l,
        slopes,
        *scalars,
        beta if isinstance(beta, Tensor) else slopes,
        n_elements,
        n_pairs,
        n_chunks,
        1.0 if isinstance(beta, Tensor) else beta,
        low,
        high,
        STORED_BETA=isinstance(beta, Tensor),
        BLOCK_PAIRS=_PAIR_TILES[block_chunks],
        BLOCK_CHUNKS=block_chunks,
    )
    loss, clipped, accuracy = scalars
    return loss, ratio_w, ratio_l, clipped, accuracy, slopes


def launch_backward(
    grad: Tensor,
    slopes: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    latents: tuple[Tensor, Tensor, Tensor],
    coefficients: Tensor,
    guidance_scale: float,
) -> list[Tensor]:
    named = _named("", cond, uncond)
    inner, outer, linear = _order(named, dict(zip(("x_t", "x_w", "x_l"), latents, strict=True)))
    n_elements = cond[0].numel()
    n_blocks = -(-n_elements // _BLOCK)
    coefficients, coefficient_row = row_pointer(coefficients)
    grads = [empty_rows_like(x) for x in named.values()]
    tensors = (cond, cond if uncond is None else uncond, *latents)
    _transition_bwd_kernel[(cond.shape[0] * n_blocks,)](
        grad,
        slopes,
        *tensors,
        coefficients,
        grads[0],
        grads[-1],
        n_elements,
        cond.shape[0],
        slopes.shape[1],
        n_blocks,
        coefficient_row,
        guidance_scale,
        *(x.stride(0) for x in tensors),
        inner,
        outer,
        GUIDED=uncond is not None,
        LINEAR=linear,
        BLOCK_SIZE=_BLOCK,
    )
    return grads
