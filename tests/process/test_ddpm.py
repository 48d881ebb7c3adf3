"""Coefficients of noising and of DDIM steps against the papers' formulas and diffusers' schedulers, in float64."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from fastpref.process.ddpm import PredictionType, ddim_steps, noising, x0_coefficients
from fastpref_kernels import ddim_pool_step, derive_keys, keyed_noise

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0)
TIMESTEPS = torch.tensor([0, 1, 500, 999])
EPS = torch.finfo(torch.float64).eps
each_kind = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])


@each_kind
def test_noising_is_that_of_the_papers_and_of_diffusers(kind: PredictionType) -> None:
    x0, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    a, s, p, q = (x.unsqueeze(1) for x in noising(ALPHAS, kind).at(TIMESTEPS))
    for row, t in enumerate(TIMESTEPS.tolist()):
        abar = float(ALPHAS[t])
        assert a[row].item() == math.sqrt(abar) and s[row].item() == math.sqrt(1 - abar)
    scheduler = DDPMScheduler()
    scheduler.alphas_cumprod = ALPHAS
    # two products and a sum of numbers below 4
    tolerance = {"rtol": 0.0, "atol": 4 * 4 * EPS}
    torch.testing.assert_close(a * x0 + s * noise, scheduler.add_noise(x0, noise, TIMESTEPS), **tolerance)
    target = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, TIMESTEPS)
    torch.testing.assert_close(p * noise + q * x0, target, **tolerance)


def test_a_table_is_rounded_once() -> None:
    exact = noising(ALPHAS, "v_prediction")
    for fine, coarse in zip(exact, exact.to(torch.device("cpu"), torch.float32), strict=True):
        assert coarse.dtype == torch.float32 and torch.equal(coarse, fine.float())


def exact_step(abar: float, abar_prev: float, kind: PredictionType, eta: float) -> list[Decimal]:
    """(u, w, drift, c, std) as the papers write them, with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        now, before, share = Decimal(abar), Decimal(abar_prev), Decimal(eta)
        a, s = now.sqrt(), (1 - now).sqrt()
        variance = share**2 * (1 - before) / (1 - now) * (1 - now / before)
        direction = (1 - before - variance).sqrt()
        # prediction = noise: x0 = (x - s eps)/a. v: x0 = a x - s v, eps = a v + s x
        u, w, of_x, of_prediction = (1 / a, -s / a, 0, 1) if kind == "epsilon" else (a, -s, s, a)
        drift = before.sqrt() * u + direction * of_x - 1
        return [u, w, drift, before.sqrt() * w + direction * of_prediction, variance.sqrt()]


@each_kind
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("final", [None, 1.0, 0.9999])
def test_coefficients_of_a_step_keep_their_digits(kind: PredictionType, eta: float, final: float | None) -> None:
    """Also between neighbours, where the factor of x_t is close to 1 and the noise is small."""
    pairs = [(1, 0), (2, 1), (951, 901), (999, 998), (999, 0), (500, -1), (1, -49)]
    t, t_prev = torch.tensor(pairs).unbind(1)
    found = ddim_steps(ALPHAS, t, t_prev, kind, eta=eta, final_alpha_cumprod=final)
    assert found.dtype == torch.float64 and found.shape == (len(pairs), 5)
    for row, (now, before) in zip(found.tolist(), pairs, strict=True):
        end = float(ALPHAS[0]) if final is None else final
        exact = exact_step(float(ALPHAS[now]), float(ALPHAS[before]) if before >= 0 else end, kind, eta)
        # about 30 operations, none of which cancels, each of a rounding error of eps/2
        for value, expected in zip(row, exact, strict=True):
            assert abs(Decimal(value) - expected) <= 16 * Decimal(EPS) * abs(expected)


@each_kind
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [False, True])
def test_a_step_is_that_of_diffusers(kind: PredictionType, eta: float, to_one: bool) -> None:
    """DDIMScheduler.step over a whole schedule, its noise given."""
    options: dict[str, Any] = {"set_alpha_to_one": to_one, "steps_offset": 1, "prediction_type": kind}
    scheduler = DDIMScheduler(clip_sample=False, **options)
    scheduler.alphas_cumprod = ALPHAS
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64) if to_one else ALPHAS[0]
    scheduler.set_timesteps(5)
    x, keys = torch.randn(2, 4, 3, 3, dtype=torch.float64), derive_keys(0, 0, torch.arange(2), 0, "sample")[:, None]
    noise = keyed_noise(keys.flatten(), (4, 3, 3), torch.float64)
    final = 1.0 if to_one else None
    for t in scheduler.timesteps.tolist():
        prediction = torch.randn_like(x)
        theirs = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise if eta else None)
        rows = ddim_steps(
            ALPHAS, torch.tensor([t]), torch.tensor([t - 200]), kind, eta=eta, final_alpha_cumprod=final
        ).expand(2, -1)
        pool = ddim_pool_step(x, prediction, None, keys, rows, guidance_scale=1.0)
        # diffusers takes a root of 1 - abar_prev - sigma^2, a difference: half of the digits of what is near 0
        torch.testing.assert_close(pool.candidates[:, 0], theirs.prev_sample, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(pool.x0, theirs.pred_original_sample, rtol=1e-12, atol=1e-12)
        x = theirs.prev_sample


def test_velocity_at_zero_signal() -> None:
    """abar_t = 0, where the noise says nothing: x0 = -v and everything stays finite."""
    table = torch.tensor([0.5, 0.0], dtype=torch.float64)
    (step,) = ddim_steps(table, torch.tensor([1]), torch.tensor([0]), "v_prediction", eta=0.0).tolist()
    # eta = 0: sqrt(0.5) * x0 + sqrt(0.5) * noise, where noise = x_t
    assert step == pytest.approx([0.0, -1.0, math.sqrt(0.5) - 1, -math.sqrt(0.5), 0.0], rel=4 * EPS, abs=0.0)


@each_kind
def test_the_last_step_without_noise_gives_x0(kind: PredictionType) -> None:
    u, w, drift, c, std = ddim_steps(ALPHAS, TIMESTEPS, torch.full((4,), -1), kind, final_alpha_cumprod=1.0).unbind(1)
    torch.testing.assert_close((1 + drift, c), (u, w), rtol=16 * EPS, atol=0.0)
    assert not std.any()
    assert all(torch.equal(x, y) for x, y in zip((u, w), x0_coefficients(ALPHAS[TIMESTEPS], kind), strict=True))


@pytest.mark.parametrize(
    ("t", "t_prev", "options", "message"),
    [
        ([1000], [50], {}, r"t in \[0, 1000\)"),
        ([-1], [-2], {}, r"t in \[0, 1000\)"),
        ([50, 51], [1, 51], {}, "t_prev < t"),
        ([50], [1], {"eta": 1.1}, r"eta must be in \[0, 1\]"),
        ([50], [1], {"eta": math.nan}, "eta"),
        ([50], [1], {"final_alpha_cumprod": 0.0}, r"\(0, 1\]"),
    ],
)
def test_steps_out_of_range_are_errors_of_one_line(
    t: list[int], t_prev: list[int], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ddim_steps(ALPHAS, torch.tensor(t), torch.tensor(t_prev), "epsilon", **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
