"""Coefficients of noising against the papers' formulas and diffusers' scheduler, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from fastpref.process.ddpm import PredictionType, noising

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0)
TIMESTEPS = torch.tensor([0, 1, 500, 999])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noising_is_that_of_the_papers_and_of_diffusers(kind: PredictionType) -> None:
    x0, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    a, s, p, q = (x.unsqueeze(1) for x in noising(ALPHAS, kind).at(TIMESTEPS))
    for row, t in enumerate(TIMESTEPS.tolist()):
        abar = float(ALPHAS[t])
        assert a[row].item() == math.sqrt(abar) and s[row].item() == math.sqrt(1 - abar)
    scheduler = DDPMScheduler()
    scheduler.alphas_cumprod = ALPHAS
    # two products and a sum of numbers below 4
    tolerance = {"rtol": 0.0, "atol": 4 * 4 * torch.finfo(torch.float64).eps}
    torch.testing.assert_close(a * x0 + s * noise, scheduler.add_noise(x0, noise, TIMESTEPS), **tolerance)
    target = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, TIMESTEPS)
    torch.testing.assert_close(p * noise + q * x0, target, **tolerance)


def test_a_table_is_rounded_once() -> None:
    exact = noising(ALPHAS, "v_prediction")
    for fine, coarse in zip(exact, exact.to(torch.device("cpu"), torch.float32), strict=True):
        assert coarse.dtype == torch.float32 and torch.equal(coarse, fine.float())
