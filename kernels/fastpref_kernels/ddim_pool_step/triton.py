"""Kernels and launchers of `ddim_pool_step`, one launch each way: a program per row and block."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.philox import _normals
from ..common.steps import all_channels_last, load_fp32, load_step, row_pointer, transpose

_BLOCK = 256  # Philox blocks, of four elements each
_BACKWARD_BLOCK = 1024  # elements


@jit
def _ddim_pool_fwd_kernel(
    x_ptr,
    cond_ptr,
    uncond_ptr,
    keys_ptr,
    coefficients_ptr,
    candidates_ptr,
    x0_ptr,
    n_elements,
    n_blocks: int,
    n_candidates: int,
    coefficient_row: int,
    guidance_scale,
    x_row,
    cond_row,
    uncond_row,
    x_inner: int,
    pred_inner: int,
    outer: int,
    GUIDED: tl.constexpr,
    LINEAR: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """A program per row and block of 4 * BLOCK_SIZE elements."""
    program = tl.program_id(0).to(tl.int64)
    row = program // n_blocks
    first = (program - row * n_blocks) * BLOCK_SIZE
    offset = first * 4 + tl.arange(0, 4 * BLOCK_SIZE)
    mask = offset < n_elements
    x = load_fp32(x_ptr + row * x_row + transpose(offset, x_inner, outer, LINEAR), mask)
    at_pred = transpose(offset, pred_inner, outer, LINEAR)
    pred = load_fp32(cond_ptr + row * cond_row + at_pred, mask)
    if GUIDED:
        uncond = load_fp32(uncond_ptr + row * uncond_row + at_pred, mask)
        pred = uncond + guidance_scale * (pred - uncond)
    u, w, drift, c, std = load_step(coefficients_ptr, coefficient_row, row)
    x0 = u * x + w * pred
    tl.store(x0_ptr + row * n_elements + offset, x0.to(x0_ptr.dtype.element_ty), mask=mask)
    mean = x + (drift * x + c * pred)
    for k in range(n_candidates):
        candidate = row * n_candidates + k
        drawn = mean + std * _normals(tl.load(keys_ptr + candidate), first, BLOCK_SIZE)
        place = candidates_ptr + candidate * n_elements + offset
        tl.store(place, drawn.to(candidates_ptr.dtype.element_ty), mask=mask)


@jit
def _ddim_pool_bwd_kernel(
    grad_candidates_ptr,
    grad_x0_ptr,
    coefficients_ptr,
    grad_x_ptr,
    grad_cond_ptr,
    grad_uncond_ptr,
    n_elements,
    n_blocks: int,
    n_candidates: int,
    coefficient_row: int,
    guidance_scale,
    GUIDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The transpose of the step, which is linear: a program per row and block, everything contiguous."""
    program = tl.program_id(0).to(tl.int64)
    row = program // n_blocks
    offset = (program - row * n_blocks) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offset < n_elements
    u, w, drift, c, _ = load_step(coefficients_ptr, coefficient_row, row)
    total = tl.zeros((BLOCK_SIZE,), tl.float32)
    for k in range(n_candidates):
        total += load_fp32(grad_candidates_ptr + (row * n_candidates + k) * n_elements + offset, mask)
    grad_x0 = load_fp32(grad_x0_ptr + row * n_elements + offset, mask)
    place = row * n_elements + offset
    grad_x = total + (drift * total + u * grad_x0)
    tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    grad_pred = c * total + w * grad_x0
    if GUIDED:
        grad_uncond = (1.0 - guidance_scale) * grad_pred
        tl.store(grad_uncond_ptr + place, grad_uncond.to(grad_uncond_ptr.dtype.element_ty), mask=mask)
        grad_pred = guidance_scale * grad_pred
    tl.store(grad_cond_ptr + place, grad_pred.to(grad_cond_ptr.dtype.element_ty), mask=mask)


def launch_forward(
    x_t: Tensor, cond: Tensor, uncond: Tensor | None, keys: Tensor, coefficients: Tensor, guidance_scale: float
) -> tuple[Tensor, Tensor]:
    preds = {"eps_cond": cond} if uncond is None else {"eps_cond": cond, "eps_uncond": uncond}
    last = [all_channels_last("ddim_pool_step", group) for group in ({"x_t": x_t}, preds)]
    n_rows, n_elements, channels = x_t.shape[0], x_t[0].numel(), x_t.shape[1]
    n_blocks = -(-n_elements // (4 * _BLOCK))
    keys = keys.contiguous()
    coefficients, coefficient_row = row_pointer(coefficients)
    candidates = x_t.new_empty(n_rows, keys.shape[1], *x_t.shape[1:])
    x0 = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    second = cond if uncond is None else uncond
    _ddim_pool_fwd_kernel[(n_rows * n_blocks,)](
        x_t,
        cond,
        second,
        keys,
        coefficients,
        candidates,
        x0,
        n_elements,
        n_blocks,
        keys.shape[1],
        coefficient_row,
        guidance_scale,
        x_t.stride(0),
        cond.stride(0),
        second.stride(0),
        *(n_elements // channels if transposed else 1 for transposed in last),
        channels,
        GUIDED=uncond is not None,
        LINEAR=not any(last),
        BLOCK_SIZE=_BLOCK,
    )
    return candidates, x0


def launch_backward(
    grad_candidates: Tensor, grad_x0: Tensor, coefficients: Tensor, guidance_scale: float, dtypes: list[torch.dtype]
) -> tuple[Tensor, ...]:
    n_rows, n_elements = grad_x0.shape[0], grad_x0[0].numel()
    n_blocks = -(-n_elements // _BACKWARD_BLOCK)
    coefficients, coefficient_row = row_pointer(coefficients)
    grads = tuple(torch.empty(grad_x0.shape, dtype=d, device=grad_x0.device) for d in dtypes)
    _ddim_pool_bwd_kernel[(n_rows * n_blocks,)](
        grad_candidates.contiguous(),
        grad_x0.contiguous(),
        coefficients,
        grads[0],
        grads[1],
        grads[-1],
        n_elements,
        n_blocks,
        grad_candidates.shape[1],
        coefficient_row,
        guidance_scale,
        GUIDED=len(grads) == 3,
        BLOCK_SIZE=_BACKWARD_BLOCK,
    )
    return grads
