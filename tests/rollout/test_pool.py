"""The step-pool sampler: its steps against diffusers' DDIM, its keys, its cost in UNet rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from fastpref.config import load_config
from fastpref.models.guidance import guided
from fastpref.models.loading import load_noise_schedule
from fastpref.models.policy import Policy, load_policy
from fastpref.models.prompt_book import PromptBook, prompt_id
from fastpref.models.text import load_text_stack
from fastpref.models.timesteps import denoising_steps
from fastpref.models.work import Work
from fastpref.process.ddpm import noising
from fastpref.rollout.pool import Pool, PoolSampler, roll_out
from fastpref_kernels import derive_keys, keyed_noise

PROMPTS = ["red heart", "blue circle", "a green tree with snow"]
SHAPE = (4, 8, 8)
CPU = torch.device("cpu")


class World:
    """A random policy in float64 and its prompts."""

    def __init__(self, model: Path) -> None:
        config = load_config("", [f"model={model}", "precision=fp64", "method=spo", "learning_rate=1e-3"])
        self.policy: Policy = load_policy(config, model, CPU, needs_reference=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in self.policy.trainable.values():
                torch.nn.init.normal_(parameter, std=0.05)
        self.work = Work()
        self.book = PromptBook(load_text_stack(model, torch.float64, CPU), model, (16, 16), CPU, self.work)
        self.model, self.schedule = model, load_noise_schedule(model)

    def sampler(self, **settings: Any) -> PoolSampler:
        fields = {"sample_steps": 20, "plain_steps": 4, "inner_steps": 0, "candidates": 4, "guidance_scale": 3.0}
        fields |= {"eta": 1.0, "seed": 5} | settings
        steps = denoising_steps(self.model, int(fields.pop("sample_steps")))
        return PoolSampler(steps, self.schedule, end=fields.pop("end", len(steps)), **fields)

    def roll(self, sampler: PoolSampler, prompts: list[str], *, needs_x0: bool = True) -> list[Pool]:
        ids = torch.tensor([prompt_id(prompt) for prompt in prompts])
        conditioning, empty = self.book.conditioning(prompts), self.book.empty()
        settings: dict[str, Any] = {"epoch": 2, "needs_x0": needs_x0, "dtype": torch.float64}
        return list(roll_out(sampler, self.policy.predict, ids, conditioning, empty, SHAPE, **settings))

    def predict(self, x: torch.Tensor, t: int, prompts: list[str], scale: float) -> torch.Tensor:
        times = torch.full((len(x),), t)
        with torch.no_grad():
            conditioning, empty = self.book.conditioning(prompts), self.book.empty()
            return guided(self.policy.predict, x, times, conditioning, empty, scale)


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def world(request: pytest.FixtureRequest) -> World:
    """SDXL predicts the noise, SD1.5 the velocity."""
    return World(request.getfixturevalue(request.param))


def diffusers_step(world: World, steps: int, x: torch.Tensor, e: torch.Tensor, t: int, z: torch.Tensor) -> Any:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=world.schedule.prediction_type,
    )
    scheduler.alphas_cumprod = world.schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = world.schedule.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    return scheduler.step(e, t, x, eta=1.0, variance_noise=z, use_clipped_model_output=False).prev_sample


def test_every_state_is_a_ddim_step_of_diffusers(world: World) -> None:
    """From x_T to x_0: plain steps, pools and inner steps, with the keyed noise put into diffusers' own scheduler."""
    sampler = world.sampler(sample_steps=8, plain_steps=2, inner_steps=2, candidates=2)
    pools, prompts = world.roll(sampler, PROMPTS[:2]), PROMPTS[:2]
    ids = torch.tensor([prompt_id(prompt) for prompt in prompts])

    def noise(index: int, k: int) -> torch.Tensor:
        return keyed_noise(derive_keys(5, 2, ids, index * 2 + k, "candidate"), SHAPE, torch.float64)

    def step(x: torch.Tensor, index: int, k: int) -> torch.Tensor:
        t = sampler.steps[index].t
        return diffusers_step(world, 8, x, world.predict(x, t, prompts, 3.0), t, noise(index, k))

    x = keyed_noise(derive_keys(5, 2, ids, 0, "init"), SHAPE, torch.float64)
    for index in range(2):
        x = step(x, index, 0)
    for pool in pools:
        torch.testing.assert_close(pool.start, x, rtol=1e-9, atol=1e-9)
        for k in range(2):
            state = x
            for j in range(3):
                state = step(state, pool.first + j, k)
                torch.testing.assert_close(pool.paths[:, k, j], state, rtol=1e-8, atol=1e-8)
        x = pool.latents[torch.arange(2), pool.chosen]


def test_x0_is_what_the_candidates_promise(world: World) -> None:
    sampler = world.sampler(sample_steps=4, plain_steps=1, candidates=3)
    pools = world.roll(sampler, PROMPTS)
    assert [pool.t for pool in pools] == [sampler.steps[2].t, sampler.steps[3].t, 0]
    for pool in pools[:-1]:
        for k in range(3):
            e = world.predict(pool.latents[:, k], pool.t, PROMPTS, 3.0)
            a, s, _, _ = noising(world.schedule.alphas_cumprod[pool.t], world.schedule.prediction_type)
            x, epsilon = pool.latents[:, k], world.schedule.prediction_type == "epsilon"
            x0 = (x - s * e) / a if epsilon else a * x - s * e
            assert pool.x0 is not None
            torch.testing.assert_close(pool.x0[:, k], x0, rtol=1e-9, atol=1e-9)
    assert pools[-1].x0 is not None and torch.equal(pools[-1].x0, pools[-1].latents)


def test_a_prompts_rollout_is_the_same_in_any_batch(world: World) -> None:
    """So it is on any number of ranks, each of which rolls out its share."""
    sampler = world.sampler(sample_steps=6, plain_steps=2)
    together = world.roll(sampler, PROMPTS)
    alone = [world.roll(sampler, [prompt]) for prompt in PROMPTS]
    for segment, pool in enumerate(together):
        for name in ("start", "paths", "x0", "chosen"):
            parts = torch.cat([getattr(pools[segment], name) for pools in alone])
            torch.testing.assert_close(getattr(pool, name), parts, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "needs_x0", "rows"),
    [
        ({}, True, 130),  # SD1.5: 5 single states and 15 pools of 4, two rows each
        ({"candidates": 2, "inner_steps": 3}, True, 70),  # SDXL
        ({"plain_steps": 0}, False, 40),  # LPO: one state a step
        ({"guidance_scale": 1.0}, True, 65),
        ({"plain_steps": 0, "end": 8}, True, 66),  # nothing is computed behind the last pool
        ({"plain_steps": 0, "end": 8}, False, 16),
    ],
)
def test_unet_rows_per_prompt(sdxl: Path, settings: dict[str, Any], needs_x0: bool, rows: int) -> None:
    world, counted = World(sdxl), Counter[str]()

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counted["rows"] += len(args[0])

    handle = world.policy.unet.register_forward_pre_hook(count, with_kwargs=True)
    world.roll(world.sampler(**settings), PROMPTS[:1], needs_x0=needs_x0)
    handle.remove()
    assert counted["rows"] == world.policy.forwards == rows


def test_choices_are_uniform_and_differ_between_steps(sdxl: Path) -> None:
    from fastpref.rollout.pool import _choice

    sampler, ids = World(sdxl).sampler(), torch.arange(4000)
    first, second = (_choice(sampler, 0, ids, index) for index in (4, 5))
    for choices in (first, second):
        shares = torch.bincount(choices, minlength=4) / 4000
        assert (shares - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert abs(float((first == second).double().mean()) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_a_merged_lora_rolls_out_alike_and_leaves_no_trace(world: World) -> None:
    sampler = world.sampler(sample_steps=4, plain_steps=1, candidates=2)
    before = {name: tensor.clone() for name, tensor in world.policy.unet.state_dict().items()}
    beside = world.roll(sampler, PROMPTS[:2])
    with world.policy.merged():
        merged = world.roll(sampler, PROMPTS[:2])
    for one, other in zip(beside, merged, strict=True):
        torch.testing.assert_close(one.paths, other.paths, rtol=1e-9, atol=1e-9)
    after = world.policy.unet.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in world.policy.trainable.values())


def test_every_prompt_is_encoded_once(sdxl: Path) -> None:
    world = World(sdxl)
    for prompts in (PROMPTS, PROMPTS[:1], [*PROMPTS, ""]):
        world.book.conditioning(prompts)
        world.book.empty()
    assert world.work.text_forwards == world.book.texts.rows == 4
