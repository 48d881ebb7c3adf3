"""DDPM with a prediction of the noise or of v, as coefficients.

Everything is linear in each row, where abar = alphas_cumprod[t]:

    x_t    = a x0 + s noise            a = sqrt(abar)          s = sqrt(1 - abar)
    target = p noise + q x0            noise: p = 1, q = 0     v: p = a, q = -s

Computed in float64 and rounded once: 1 - abar in fp32 has lost digits where abar is small.
Source: DDPM, arXiv 2006.11239, equation 4; v, arXiv 2202.00512, appendix D.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


class Noising(NamedTuple):
    """x_t = a x0 + s noise, target = p noise + q x0; each (T,) by timestep, or (N,) of rows."""

    a: Tensor
    s: Tensor
    p: Tensor
    q: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Noising:
        return Noising(*(x.to(device, dtype) for x in self))

    def at(self, timesteps: Tensor) -> Noising:
        """Of rows at ``timesteps`` (N,) int64, each (N,)."""
        return Noising(*(x[timesteps] for x in self))


def noising(alphas_cumprod: Tensor, prediction_type: PredictionType) -> Noising:
    """Of every timestep, in float64, on the device of ``alphas_cumprod`` (T,)."""
    abar = alphas_cumprod.double()
    a, s = abar.sqrt(), (1 - abar).sqrt()
    if prediction_type == "epsilon":
        return Noising(a, s, torch.ones_like(a), torch.zeros_like(a))
    return Noising(a, s, a, -s)
