"""A denoising step and its candidates in torch, on any device; every row's bits are a function of that row alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.dispatch import accumulation_dtype
from ..common.rows import row_chunks
from ..common.steps import CHUNK, columns, guided

Noise = Callable[[Tensor, torch.Size, torch.dtype], Tensor]


def forward(
    x_t: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    keys: Tensor,
    coefficients: Tensor,
    guidance_scale: float,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    """(candidates (N, K, ...), x0 (N, ...)), contiguous, in x_t's dtype; `noise(keys, shape, dtype)` draws."""
    dtype = accumulation_dtype(x_t.dtype)
    n_rows, n_candidates = keys.shape
    u, w, drift, c, std = columns(coefficients, dtype)
    candidates = x_t.new_empty(n_rows, n_candidates, *x_t.shape[1:])
    x0 = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    for rows in row_chunks(n_rows, x0[0].numel(), CHUNK):
        pred = guided(cond[rows], None if uncond is None else uncond[rows], guidance_scale, dtype)
        x = x_t[rows].to(dtype).flatten(1)
        x0[rows] = x.mul(u[rows]).add_(pred * w[rows]).view_as(x0[rows])
        if n_candidates:
            mean = x.mul(drift[rows]).add_(pred.mul_(c[rows])).add_(x)
            z = noise(keys[rows].flatten(), x_t.shape[1:], dtype).view(mean.shape[0], n_candidates, -1)
            z.mul_(std[rows].unsqueeze(1)).add_(mean.unsqueeze(1))
            candidates[rows] = z.view_as(candidates[rows])
    return candidates, x0


def backward(
    grad_candidates: Tensor, grad_x0: Tensor, coefficients: Tensor, guidance_scale: float, dtypes: list[torch.dtype]
) -> tuple[Tensor, ...]:
    """Gradients of x_t, eps_cond and, if there is a third dtype, eps_uncond; contiguous, in the given dtypes."""
    dtype = accumulation_dtype(grad_x0.dtype)
    n_rows = grad_x0.shape[0]
    u, w, drift, c, _ = columns(coefficients, dtype)
    grads = tuple(torch.empty(grad_x0.shape, dtype=d, device=grad_x0.device) for d in dtypes)
    scales = (guidance_scale, 1.0 - guidance_scale) if len(grads) == 3 else (1.0,)
    for rows in row_chunks(n_rows, grad_x0[0].numel(), CHUNK):
        total = grad_candidates[rows].to(dtype).flatten(2).sum(1)
        g0 = grad_x0[rows].to(dtype).flatten(1)
        grads[0][rows] = total.mul(drift[rows]).add_(g0 * u[rows]).add_(total).view_as(grads[0][rows])
        grad = total.mul_(c[rows]).add_(g0 * w[rows])
        for place, scale in zip(grads[1:], scales, strict=True):
            place[rows] = grad.mul(scale).view_as(place[rows])
    return grads
