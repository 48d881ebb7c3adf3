"""Coefficients of DDPM as its papers write them, in float64, for tests of ops that take coefficients of any process."""

from __future__ import annotations

from torch import Tensor


def noising(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s) of x_t = a x0 + s noise (arXiv 2006.11239, equation 4); the v target is a noise - s x0 (2202.00512)."""
    abar = alphas_cumprod.double()[timesteps]
    return abar.sqrt(), (1 - abar).sqrt()
