"""The grid of denoising steps: a chain, the same in rollouts and in sampling, every step one of DDIM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)

from fastpref.errors import UserError
from fastpref.models.noise_schedule import ddim_settings
from fastpref.models.timesteps import chain, sampling_scheduler

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, Any] = {
    "published": DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False, **STABLE_DIFFUSION),
    "DDIM's defaults": DDIMScheduler(),
    "DDPM's defaults": DDPMScheduler(),
    "Euler's defaults": EulerDiscreteScheduler(timestep_spacing="linspace"),
    "Euler as in SDXL": EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **STABLE_DIFFUSION),
    "PNDM as in SD1.5": PNDMScheduler(skip_prk_steps=True, steps_offset=1, **STABLE_DIFFUSION),
    "linspace": LMSDiscreteScheduler(timestep_spacing="linspace", **STABLE_DIFFUSION),
    "trailing": DPMSolverMultistepScheduler(timestep_spacing="trailing", **STABLE_DIFFUSION),
    "zero terminal SNR": DDIMScheduler(
        timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction", **STABLE_DIFFUSION
    ),
}
each_scheduler = pytest.mark.parametrize("own", SCHEDULERS.values(), ids=SCHEDULERS)


def steps_of(own: Any, count: int) -> list[tuple[int, int]]:
    config = {**own.config, "_class_name": type(own).__name__}
    return [tuple(step) for step in chain(ddim_settings(config, "here"), count)]


@pytest.mark.parametrize("count", [2, 3, 20, 30, 61, 999])
@each_scheduler
def test_each_step_begins_where_the_one_before_ended(own: Any, count: int) -> None:
    steps = steps_of(own, count)
    assert [t for t, _ in steps[1:]] == [t_prev for _, t_prev in steps[:-1]]
    assert all(t > t_prev for t, t_prev in steps)
    assert steps[-1][1] == 0
    timesteps = sampling_scheduler(own, count).timesteps.tolist()
    assert [t for t, _ in steps] == [t for t in timesteps if t > 0] and len(timesteps) == count


def test_the_published_grid_is_that_of_the_public_code() -> None:
    """t - 50, never below 0."""
    for name in ("published", "Euler as in SDXL", "PNDM as in SD1.5"):
        assert steps_of(SCHEDULERS[name], 20) == [(t, max(t - 50, 0)) for t in range(951, 0, -50)]
    assert steps_of(SCHEDULERS["DDPM's defaults"], 20) == [(t, t - 50) for t in range(950, 0, -50)]
    assert steps_of(SCHEDULERS["linspace"], 3) == [(999, 500), (500, 0)]


@each_scheduler
def test_the_sampler_takes_the_chains_steps(own: Any) -> None:
    """Its every step is formula 12 of DDIM between the two levels; where the grid has timestep 0 nothing changes."""
    ddim = sampling_scheduler(own, 30)
    ddim.set_timesteps(30)
    alphas = ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.final_alpha_cumprod = alphas[0]
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    links = dict(steps_of(own, 30))
    for t in ddim.timesteps:
        prediction = torch.sin(7 * x + t / 100)
        a, b = alphas[t], alphas[links.get(int(t), 0)]
        if ddim.config.prediction_type == "epsilon":
            x0, noise = (x - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
        else:
            x0 = a.sqrt() * x - (1 - a).sqrt() * prediction
            noise = a.sqrt() * prediction + (1 - a).sqrt() * x
        found = ddim.step(prediction, t, x, eta=0.0).prev_sample
        torch.testing.assert_close(found, b.sqrt() * x0 + (1 - b).sqrt() * noise, rtol=1e-12, atol=1e-12)
        if t == 0:
            torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
        x = found
    assert ddim.num_inference_steps == 30


@pytest.mark.parametrize("count", [4, 10, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_on_an_even_grid_diffusers_own_ddim_draws_the_same(spacing: str, count: int) -> None:
    own = DDIMScheduler(timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=False, **STABLE_DIFFUSION)
    states = []
    for scheduler in (own, sampling_scheduler(own, count)):
        scheduler.set_timesteps(count)
        x = torch.ones(5)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x + t / 100), t, x, eta=0.0).prev_sample
        states.append(x)
    assert torch.equal(*states)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_any_number_of_steps_has_a_grid(spacing: str) -> None:
    """Rounding makes diffusers' trailing grid of 61 steps one of 62, with a timestep of -1."""
    own = DDIMScheduler(timestep_spacing=spacing)
    assert len(own.timesteps) == 1000
    for count in [*range(2, 1000, 12), 61, 103, 121, 122, 201, 1000]:
        timesteps = sampling_scheduler(own, count).timesteps.numpy()
        assert len(timesteps) == count and timesteps[0] < 1000 and timesteps[-1] >= 0 and (np.diff(timesteps) < 0).all()


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        ({"steps_offset": 1}, 1000, "1000 steps of the leading grid with steps_offset 1 do not fit 1000 timesteps"),
        ({"steps_offset": 60}, 20, "20 steps of the leading grid with steps_offset 60 do not fit 1000 timesteps"),
        ({}, 1, "the only denoising step is at timestep 0"),
        ({"timestep_spacing": "linspace"}, 1, "the only denoising step is at timestep 0"),
        ({"num_train_timesteps": 100}, 101, "sample_steps is 101, the model has 100 timesteps"),
    ],
)
def test_a_grid_that_leaves_the_schedule_is_refused(settings: dict[str, Any], count: int, message: str) -> None:
    own = DDIMScheduler(**settings)
    with pytest.raises(UserError, match=message):
        sampling_scheduler(own, count)
    with pytest.raises(UserError, match=message):
        steps_of(own, count)
