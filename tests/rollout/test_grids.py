"""Rollouts on the grids that ordinary schedulers have: every state, every score's timestep, every transition's loss."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from fastpref.models.noise_schedule import ddim_settings, noise_schedule
from fastpref.models.policy import Conditioning
from fastpref.models.timesteps import chain
from fastpref.rollout.pool import PoolSampler, roll_out
from fastpref_kernels import derive_keys, keyed_noise, transition_loss

SHAPE, IDS, SEED, EPOCH = (2, 3, 3), torch.tensor([11, 12]), 5, 2
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS: dict[str, dict[str, Any]] = {
    "DDIM, offset 1": {"_class_name": "DDIMScheduler", "steps_offset": 1, **STABLE_DIFFUSION},
    "DDIM, offset 0": {"_class_name": "DDIMScheduler", "set_alpha_to_one": True, **STABLE_DIFFUSION},
    "DDPM's defaults": {"_class_name": "DDPMScheduler", "clip_sample": True},
    "Euler of SDXL": {"_class_name": "EulerDiscreteScheduler", "steps_offset": 1, **STABLE_DIFFUSION},
    "PNDM of SD1.5": {"_class_name": "PNDMScheduler", "steps_offset": 1, **STABLE_DIFFUSION},
    "linspace": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace", **STABLE_DIFFUSION},
    "trailing, v": {
        **{"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        **STABLE_DIFFUSION,
    },
    "zero terminal SNR": {
        **{"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        **{"rescale_betas_zero_snr": True},
        **STABLE_DIFFUSION,
    },
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def sampler_of(config: dict[str, Any], sample_steps: int, **settings: Any) -> PoolSampler:
    arguments = ddim_settings(config, "here")
    steps = chain(arguments, sample_steps)
    fields = {"plain_steps": 1, "end": len(steps), "inner_steps": 0, "candidates": 2, "guidance_scale": 1.0, "eta": 1.0}
    return PoolSampler(steps, noise_schedule(arguments, "here"), **{**fields, "seed": SEED, **settings})


def predict(noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    return torch.sin(3 * noisy + timesteps.view(-1, 1, 1, 1) / 100)


@functools.cache
def diffusers_ddim(*config: tuple[str, Any]) -> Any:
    ddim = DDIMScheduler.from_config({**dict(config), "clip_sample": False, "set_alpha_to_one": False})
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    return ddim


def diffusers_step(config: dict[str, Any], x: torch.Tensor, t: int, t_prev: int, z: torch.Tensor) -> torch.Tensor:
    """One step of diffusers' own DDIM in float64, with a stride that leads it to ``t_prev``.

    From ᾱ_t = 0 σ² is 1 - ᾱ_prev and nothing is left for the direction; there diffusers takes the root of a rounding
    error of either sign, so the formula stands in for it.
    """
    ddim = diffusers_ddim(*config.items())
    ddim.num_inference_steps = Fraction(len(ddim.alphas_cumprod), t - t_prev)
    prediction = predict(x, torch.full((len(x),), t), None)  # type: ignore[arg-type]
    if ddim.alphas_cumprod[t] == 0:  # v is -x0 there
        return -ddim.alphas_cumprod[t_prev].sqrt() * prediction + (1 - ddim.alphas_cumprod[t_prev]).sqrt() * z
    found: torch.Tensor = ddim.step(prediction, t, x, eta=1.0, variance_noise=z).prev_sample
    return found


@pytest.mark.parametrize(("sample_steps", "inner_steps"), [(4, 0), (7, 1), (20, 3), (30, 0)])
@each_config
def test_every_state_is_a_step_of_diffusers_ddim(config: dict[str, Any], sample_steps: int, inner_steps: int) -> None:
    sampler = sampler_of(config, sample_steps, inner_steps=inner_steps)
    rows = Conditioning(torch.zeros(2, 1, 1, dtype=torch.float64), None)
    settings: dict[str, Any] = {"epoch": EPOCH, "needs_x0": False, "dtype": torch.float64}
    pools = list(roll_out(sampler, predict, IDS, rows, rows, SHAPE, **settings))

    def noise(index: int, k: int) -> torch.Tensor:
        return keyed_noise(derive_keys(SEED, EPOCH, IDS, index * 2 + k, "candidate"), SHAPE, torch.float64)

    x = keyed_noise(derive_keys(SEED, EPOCH, IDS, 0, "init"), SHAPE, torch.float64)
    x = diffusers_step(config, x, *sampler.steps[0], noise(0, 0))
    assert len(pools) == (len(sampler.steps) - 1) // (inner_steps + 1) and pools
    for pool in pools:
        torch.testing.assert_close(pool.start, x, rtol=1e-8, atol=1e-8)
        for k in range(2):
            state = x
            for j in range(inner_steps + 1):
                state = diffusers_step(config, state, *sampler.steps[pool.first + j], noise(pool.first + j, k))
                torch.testing.assert_close(pool.paths[:, k, j], state, rtol=1e-8, atol=1e-8)
        x = pool.latents[torch.arange(2), pool.chosen]
        end = pool.first + inner_steps + 1
        assert pool.t == (sampler.steps[end].t if end < len(sampler.steps) else 0)


@each_config
def test_the_loss_of_every_transition_is_the_papers(config: dict[str, Any]) -> None:
    """-log σ(β·(log r_w - log r_l)) with r the ratio of the likelihoods that DDIM's steps have, in float64."""
    sampler = sampler_of(config, 20)
    alphas, kind = sampler.schedule.alphas_cumprod, sampler.schedule.prediction_type
    generator = torch.Generator().manual_seed(0)

    def random() -> torch.Tensor:
        return torch.randn(1, *SHAPE, dtype=torch.float64, generator=generator)

    for index, (t, t_prev) in enumerate(sampler.steps):
        x, policy, reference, a, b = random(), random(), random(), alphas[t], alphas[t_prev]
        sigma = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        assert float(sigma) == pytest.approx(sampler.sigma(index), rel=1e-12) and sigma > 0

        def mean(prediction: torch.Tensor) -> torch.Tensor:
            if kind == "epsilon":
                x0, noise = (x - (1 - a).sqrt() * prediction) / a.sqrt(), prediction  # noqa: B023
            else:
                x0 = a.sqrt() * x - (1 - a).sqrt() * prediction  # noqa: B023
                noise = a.sqrt() * prediction + (1 - a).sqrt() * x  # noqa: B023
            return b.sqrt() * x0 + (1 - b - sigma**2).clamp(min=0).sqrt() * noise  # noqa: B023

        win, lose = (mean(reference) + sigma * random() for _ in range(2))
        likely = [[-((y - mean(p)) ** 2 / (2 * sigma**2)).mean() for p in (policy, reference)] for y in (win, lose)]
        log_w, log_l = (one - other for one, other in likely)
        expected = -torch.nn.functional.logsigmoid(10 * (log_w - log_l))
        found = transition_loss(
            *(policy, None, reference, None, x, win, lose, sampler.coefficients[index, None]),
            **{"guidance_scale": 1.0, "beta": 10.0, "clip": None},
        )
        torch.testing.assert_close(found.loss, expected, rtol=1e-9, atol=1e-9)


@each_config
@pytest.mark.parametrize("inner_steps", [0, 3])
def test_scores_are_asked_for_at_the_candidates_own_timestep_or_the_one_before(
    config: dict[str, Any], inner_steps: int
) -> None:
    """ "current" is what the official LPO code does: ``preference_timestep = t`` of the step that it has just taken."""
    following = sampler_of(config, 20, inner_steps=inner_steps, score_at="next")
    current = sampler_of(config, 20, inner_steps=inner_steps, score_at="current")
    rows = Conditioning(torch.zeros(2, 1, 1, dtype=torch.float64), None)
    settings: dict[str, Any] = {"epoch": EPOCH, "needs_x0": False, "dtype": torch.float64}
    last = [first + inner_steps for first in following.segments]
    assert following.score_timesteps == [following.steps[index].t_prev for index in last]
    assert current.score_timesteps == [following.steps[index].t for index in last]
    rollouts = [
        list(roll_out(sampler, predict, IDS, rows, rows, SHAPE, **settings)) for sampler in (following, current)
    ]
    for one, other, index in zip(*rollouts, last, strict=True):
        assert (one.t, other.t) == (following.steps[index].t_prev, following.steps[index].t)
        assert torch.equal(one.paths, other.paths)
