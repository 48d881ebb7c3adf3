"""A DDIM step and its candidates in torch, on any device; every row's bits are a function of that row alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._ddim import PER_ROW, Step
from .._dispatch import accumulation_dtype

_CHUNK = 1 << 16  # elements of a chunk, whose fp32 temporaries stay in the L2 cache

Noise = Callable[[Tensor, torch.Size, torch.dtype], Tensor]


def coefficients(alphas_cumprod: Tensor, step: Step, n_rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(drift, mean of pred, x0 of x_t, x0 of pred, sigma), each (N, 1), computed in fp64: `step_coefficients`."""
    alphas_cumprod = alphas_cumprod.double()
    if step.t == PER_ROW:
        assert step.t_rows is not None and step.t_prev_rows is not None
        t, t_prev = step.t_rows, step.t_prev_rows
    else:
        t, t_prev = (torch.full((n_rows,), x, device=alphas_cumprod.device) for x in (step.t, step.t_prev))
    valid = (t >= 0) & (t < alphas_cumprod.shape[0]) & (t_prev < t)
    abar = torch.where(valid, alphas_cumprod[torch.where(valid, t, 0)], torch.nan)
    abar_prev = alphas_cumprod[torch.where(valid, t_prev, 0).clamp(min=0)]
    if step.final_alpha >= 0:
        abar_prev = torch.where(t_prev < 0, step.final_alpha, abar_prev)
    beta, beta_prev, gap, eta2 = 1 - abar, 1 - abar_prev, abar_prev - abar, step.eta**2
    variance = eta2 * (beta_prev / beta) * (gap / abar_prev)
    direction = ((1 - eta2) * beta_prev + eta2 * (beta_prev / beta) * (beta_prev / abar_prev) * abar).sqrt()
    root, root_beta = abar.sqrt(), beta.sqrt()
    mean_v = -(gap + variance * abar) / (direction * root + (abar_prev * beta).sqrt())
    if step.v_prediction:
        drift = abar_prev.sqrt() * root + direction * root_beta - 1
        found = drift, mean_v, root, -root_beta, variance.sqrt()
    else:
        drift = (abar_prev / abar).sqrt() - 1
        found = drift, mean_v / root, 1 / root, -root_beta / root, variance.sqrt()
    return tuple(x.to(dtype).unsqueeze(1) for x in found)


def guided(cond: Tensor, uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    """Classifier-free guidance in dtype, flattened to (rows, elements) in logical order; a new tensor."""
    pred = cond.to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(1)
    if uncond is None:
        return pred
    base = uncond.to(dtype).flatten(1)
    return pred.sub_(base).mul_(guidance_scale).add_(base)


def row_chunks(n_rows: int, n_elements: int) -> list[slice]:
    step = max(1, _CHUNK // n_elements)
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def forward(
    x_t: Tensor, cond: Tensor, uncond: Tensor | None, keys: Tensor, alphas_cumprod: Tensor, step: Step, noise: Noise
) -> tuple[Tensor, Tensor]:
    """(candidates (N, K, ...), x0 (N, ...)), contiguous, in x_t's dtype; `noise(keys, shape, dtype)` draws."""
    dtype = accumulation_dtype(x_t.dtype)
    n_rows, n_candidates = keys.shape
    drift, mean_pred, x0_x, x0_pred, sigma = coefficients(alphas_cumprod, step, n_rows, dtype)
    candidates = x_t.new_empty(n_rows, n_candidates, *x_t.shape[1:])
    x0 = torch.empty_like(x_t, memory_format=torch.contiguous_format)
    for rows in row_chunks(n_rows, x0[0].numel()):
        pred = guided(cond[rows], None if uncond is None else uncond[rows], step.guidance_scale, dtype)
        x = x_t[rows].to(dtype).flatten(1)
        x0[rows] = x.mul(x0_x[rows]).add_(pred * x0_pred[rows]).view_as(x0[rows])
        if n_candidates:
            mean = x.mul(drift[rows]).add_(pred.mul_(mean_pred[rows])).add_(x)
            z = noise(keys[rows].flatten(), x_t.shape[1:], dtype).view(mean.shape[0], n_candidates, -1)
            z.mul_(sigma[rows].unsqueeze(1)).add_(mean.unsqueeze(1))
            candidates[rows] = z.view_as(candidates[rows])
    return candidates, x0


def backward(
    grad_candidates: Tensor, grad_x0: Tensor, alphas_cumprod: Tensor, step: Step, dtypes: list[torch.dtype]
) -> tuple[Tensor, ...]:
    """Gradients of x_t, eps_cond and, if there is a third dtype, eps_uncond; contiguous, in the given dtypes."""
    dtype = accumulation_dtype(grad_x0.dtype)
    n_rows = grad_x0.shape[0]
    drift, mean_pred, x0_x, x0_pred, _ = coefficients(alphas_cumprod, step, n_rows, dtype)
    grads = tuple(torch.empty(grad_x0.shape, dtype=d, device=grad_x0.device) for d in dtypes)
    scales = (step.guidance_scale, 1.0 - step.guidance_scale) if len(grads) == 3 else (1.0,)
    for rows in row_chunks(n_rows, grad_x0[0].numel()):
        total = grad_candidates[rows].to(dtype).flatten(2).sum(1)
        g0 = grad_x0[rows].to(dtype).flatten(1)
        grads[0][rows] = total.mul(drift[rows]).add_(g0 * x0_x[rows]).add_(total).view_as(grads[0][rows])
        grad = total.mul_(mean_pred[rows]).add_(g0 * x0_pred[rows])
        for place, scale in zip(grads[1:], scales, strict=True):
            place[rows] = grad.mul(scale).view_as(place[rows])
    return grads
