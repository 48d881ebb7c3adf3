"""Kernels of `transition_loss`. Launchers: _transition_launch.py.

A row of C*H*W elements is cut into chunks, a program each; a second launch of one program adds the chunks of every row
in one order and makes the loss of the pairs.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from ._ddim import load_fp32, step_coefficients, transpose
from ._dispatch import jit, tl
from ._pairwise_kernels import log_sigmoid_and_slope, won


@jit
def _transition_chunk_kernel(
    cond_ptr,
    uncond_ptr,
    ref_cond_ptr,
    ref_uncond_ptr,
    x_ptr,
    x_w_ptr,
    x_l_ptr,
    alphas_cumprod_ptr,
    t_ptr,
    t_prev_ptr,
    partial_ptr,
    n_elements,
    n_rows: int,
    n_pairs: int,
    n_chunks: int,
    n_blocks: int,
    n_timesteps: int,
    t_all: int,
    t_prev_all: int,
    v_prediction: int,
    guidance_scale,
    eta,
    final_alpha,
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
    drift, mean_pred, _, _, sigma = step_coefficients(
        alphas_cumprod_ptr, n_timesteps, t_ptr, t_prev_ptr, pair, t_all, t_prev_all, final_alpha, eta, v_prediction
    )
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
        shift = mean_pred * shift
        x = load_fp32(x_ptr + row * x_row + at_x, mask)
        move = drift * x + mean_pred * pred
        x_w = load_fp32(x_w_ptr + row * x_w_row + at_x, mask & is_w)
        x_l = load_fp32(x_l_ptr + loser * x_l_row + at_x, mask & is_l)
        total_w += shift * (2.0 * (x_w - x - move) + shift)
        total_l += shift * (2.0 * (x_l - x - move) + shift)
    scale = 0.5 / (sigma * sigma)
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
    n_elements,
    n_pairs: int,
    n_chunks: int,
    beta,
    low,
    high,
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
    alphas_cumprod_ptr,
    t_ptr,
    t_prev_ptr,
    grad_cond_ptr,
    grad_uncond_ptr,
    n_elements,
    n_rows: int,
    n_pairs: int,
    n_blocks: int,
    n_timesteps: int,
    t_all: int,
    t_prev_all: int,
    v_prediction: int,
    guidance_scale,
    eta,
    final_alpha,
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
    """grad_pred = c / (sigma^2 * C*H*W) * sum over sides of slope * (x - mu), a program per row and block."""
    program = tl.program_id(0).to(tl.int64)
    row = program // n_blocks
    loser = row - (n_rows - n_pairs)
    is_w, is_l = row < n_pairs, loser >= 0
    pair = tl.where(is_w, row, loser)
    drift, mean_pred, _, _, sigma = step_coefficients(
        alphas_cumprod_ptr, n_timesteps, t_ptr, t_prev_ptr, pair, t_all, t_prev_all, final_alpha, eta, v_prediction
    )
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
    move = drift * x + mean_pred * pred
    origin = tl.where(slope_w + slope_l != 0.0, x, x_l)
    scale = tl.load(grad_ptr).to(tl.float32) * (mean_pred / (sigma * sigma)) / tl.cast(n_elements, tl.float32)
    grad_pred = scale * slope_w * (x_w - origin - move) + scale * slope_l * (x_l - origin - move)
    place = row * n_elements + offset
    if GUIDED:
        grad_uncond = (1.0 - guidance_scale) * grad_pred
        tl.store(grad_uncond_ptr + place, grad_uncond.to(grad_uncond_ptr.dtype.element_ty), mask=mask)
        grad_pred = guidance_scale * grad_pred
    tl.store(grad_cond_ptr + place, grad_pred.to(grad_cond_ptr.dtype.element_ty), mask=mask)
