"""One DDIM step as the paper writes it (arXiv 2010.02502, equations 12 and 16), in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Transition(NamedTuple):
    mean: Tensor
    sigma: Tensor
    x0: Tensor


def guided(cond: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    cond = cond.double()
    return cond if uncond is None else uncond.double() + guidance_scale * (cond - uncond.double())


def ddim_step(
    x_t: Tensor,
    pred: Tensor,
    alphas_cumprod: Tensor,
    t: Tensor,
    t_prev: Tensor,
    eta: float,
    final_alpha_cumprod: float | None = None,
    prediction_type: str = "epsilon",
) -> Transition:
    """Mean, sigma and x0 of a step from t to t_prev, both (N,)."""
    table = alphas_cumprod.double()
    column = (-1, *[1] * (x_t.dim() - 1))
    final = table[0] if final_alpha_cumprod is None else torch.tensor(final_alpha_cumprod, dtype=torch.float64)
    abar = table[t].view(column)
    abar_prev = torch.where(t_prev < 0, final, table[t_prev.clamp(min=0)]).view(column)
    x_t, pred = x_t.double(), pred.double()
    if prediction_type == "epsilon":
        x0, eps = (x_t - (1 - abar).sqrt() * pred) / abar.sqrt(), pred
    else:
        x0 = abar.sqrt() * x_t - (1 - abar).sqrt() * pred
        eps = abar.sqrt() * pred + (1 - abar).sqrt() * x_t
    sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    mean = abar_prev.sqrt() * x0 + (1 - abar_prev - sigma**2).sqrt() * eps
    return Transition(mean, sigma, x0)
