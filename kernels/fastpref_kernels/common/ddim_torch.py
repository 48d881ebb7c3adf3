"""Coefficients of a DDIM step and guidance in torch, on any device: what `ddim.py` has for kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .ddim import PER_ROW, Step

CHUNK = 1 << 16  # elements of a chunk, whose fp32 temporaries stay in the L2 cache


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
