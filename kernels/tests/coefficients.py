"""Coefficients of DDPM as its papers write them, in float64, for tests of ops that take coefficients of any process."""

from __future__ import annotations

import torch
from reference.ddim_pool_step import ddim_step
from torch import Tensor


def noising(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s) of x_t = a x0 + s noise (arXiv 2006.11239, equation 4); the v target is a noise - s x0 (2202.00512)."""
    abar = alphas_cumprod.double()[timesteps]
    return abar.sqrt(), (1 - abar).sqrt()


def ddim(alphas_cumprod: Tensor, t: Tensor, t_prev: Tensor, eta: float = 1.0, **options: object) -> Tensor:
    """(u, w, drift, c, std) of steps, (N, 5): the oracle's step of x_t = 1, pred = 0 and of x_t = 0, pred = 1."""
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    of_x = ddim_step(one, zero, alphas_cumprod, t, t_prev, eta, **options)
    of_pred = ddim_step(zero, one, alphas_cumprod, t, t_prev, eta, **options)
    return torch.cat([of_x.x0, of_pred.x0, of_x.mean - 1, of_pred.mean, of_x.sigma], dim=1)
