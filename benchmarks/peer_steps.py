"""Candidates, verdicts and loss of the public SPO and LPO codes beside ours, on the same tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from peer_code import Checkout
from torch import Tensor

from fastpref.models.noise_schedule import NoiseSchedule
from fastpref.models.timesteps import DenoisingStep
from fastpref.rollout.pool import PoolSampler
from fastpref.rollout.transitions import Selection, select, thresholds
from fastpref_kernels import ddim_pool_step, derive_keys, keyed_noise, transition_loss

STEPS, GUIDANCE, CLIP, CANDIDATES = 20, 5.0, 0.1, 4
_TYPES = {name: Any for name in ("Union", "Tuple", "Optional", "DDIMSchedulerOutput")}


class StepCase(NamedTuple):
    """n transitions at one timestep; predictions are (n, C, H, W) under the prompt and without it."""

    t: int
    x_t: Tensor
    x_w: Tensor
    x_l: Tensor
    policy: tuple[Tensor, Tensor]
    reference: tuple[Tensor, Tensor]
    beta: float


class StepOutcome(NamedTuple):
    """Loss, ratios (2, n) after clipping, and the gradient of both predictions of the policy."""

    loss: Tensor
    ratios: Tensor
    gradient: Tensor


def published_scheduler() -> DDIMScheduler:
    """SD1.5's, as the official recipes make it: 20 steps, 951, 901 … 1."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    return scheduler


def published_sampler() -> PoolSampler:
    """Our sampler over the same steps, all of them with pools."""
    scheduler = published_scheduler()
    timesteps = [int(t) for t in scheduler.timesteps]
    steps = [DenoisingStep(t, max(t - 1000 // STEPS, 0)) for t in timesteps]
    schedule = NoiseSchedule(scheduler.alphas_cumprod.double(), "epsilon")
    return PoolSampler(steps, schedule, 0, STEPS, 0, CANDIDATES, GUIDANCE, 1.0, 0)


def coefficients(sampler: PoolSampler, t: int, x_t: Tensor) -> Tensor:
    """(n, 5): the row of the step at ``t``, for n rows."""
    (index,) = (i for i, step in enumerate(sampler.steps) if step.t == t)
    return sampler.coefficients[index].to(x_t.dtype).expand(len(x_t), -1)


def step_cases(count: int, betas: Sequence[float] = (10.0, 500.0)) -> Iterator[StepCase]:
    """``count`` cases over all timesteps; policies 1e-4 to 1e-2 away from their references."""
    sampler = published_sampler()
    for seed in range(count):
        random = torch.Generator().manual_seed(seed)
        step = sampler.steps[seed % STEPS]
        x_t, *noise = (torch.randn(1 + seed % 3, 4, 8, 8, generator=random) for _ in range(5))
        distance = 10.0 ** (-4 + seed // STEPS % 3)
        reference = noise[0], noise[0] + 0.1 * noise[1]
        policy = reference[0] + distance * noise[2], reference[1] + distance * noise[3]
        keys = derive_keys(seed, 0, torch.arange(2 * len(x_t)), 0, "candidate").view(-1, 2)
        rows = coefficients(sampler, step.t, x_t)
        pool = ddim_pool_step(x_t, *reference, keys, rows, guidance_scale=GUIDANCE).candidates
        beta = betas[seed % len(betas)]
        yield StepCase(step.t, x_t, pool[:, 0], pool[:, 1], policy, reference, beta)


class OfficialSteps:
    """The official code of SPO, or of LPO, which began as a copy of it."""

    def __init__(self, checkout: Checkout, package: str, trainer: str) -> None:
        given = {"torch": torch, "math": math, "DDIMScheduler": DDIMScheduler, **_TYPES}
        folder = f"{package}/custom_diffusers"
        self._step = checkout.definitions(
            f"{folder}/ddim_with_logprob.py", "ddim_step_with_logprob", given={**given, "randn_tensor": None}
        )["ddim_step_with_logprob"]
        self._candidates = checkout.definitions(
            f"{folder}/ddim_seperate.py",
            "ddim_step_fetch_x0",
            "ddim_step_fetch_x_t_1",
            given={**given, "randn_tensor": lambda shape, **_: self._noise},
        )
        compare = f"{package}/preference_models/compare_funcs.py"
        self._compare = checkout.definitions(compare, "preference_score_compare", given={"torch": torch})
        self._loss = checkout.statements(trainer, "total_prob_0", "loss")
        self._noise = torch.empty(0)

    def loss(self, case: StepCase) -> StepOutcome:
        """The loss statements of the training script."""
        n, leaves = len(case.x_t), [x.clone().requires_grad_() for x in case.policy]
        noise = {"noise_pred": _guided(*leaves), "noise_ref_pred": _guided(*case.reference)}
        sample = {"timesteps": torch.full((n,), case.t), "latents": case.x_t}
        train = SimpleNamespace(eps=CLIP, beta=case.beta)
        space: dict[str, Any] = {
            **{"torch": torch, "ddim_step_with_logprob": self._step, "train_b_start": 0, "train_b_end": n},
            "config": SimpleNamespace(sample=SimpleNamespace(eta=1.0), train=train),
            "pipeline": SimpleNamespace(scheduler=published_scheduler()),
            **{f"{name}_{side}": value for name, value in noise.items() for side in (0, 1)},
            "sample_0": {**sample, "next_latents": case.x_w},
            "sample_1": {**sample, "next_latents": case.x_l},
        }
        exec(self._loss, space)
        gradients = torch.autograd.grad(space["loss"], leaves)
        ratios = torch.stack([space["ratio_0"], space["ratio_1"]]).detach()
        return StepOutcome(space["loss"].detach(), ratios, torch.stack(gradients))

    def candidates(self, case: StepCase, noise: Tensor) -> Tensor:
        """(n, K, C, H, W) from the policy's predictions and ``noise`` (K, n, C, H, W)."""
        scheduler, t = published_scheduler(), torch.full((len(case.x_t),), case.t)
        found = self._candidates["ddim_step_fetch_x0"](scheduler, _guided(*case.policy), t, case.x_t)
        self._noise = noise
        pool = self._candidates["ddim_step_fetch_x_t_1"](
            scheduler, **found, timestep=t, dtype=case.x_t.dtype, num_sample_per_step=len(noise), eta=1.0
        )
        return pool.transpose(0, 1)

    def verdict(self, scores: Tensor, t: int, theta: float | tuple[float, float]) -> tuple[Tensor, Tensor]:
        """(winner and loser (2, N), kept (N,)) of pools with ``scores`` (N, K)."""
        settings: dict[str, Any] = {"threshold": theta}
        if isinstance(theta, tuple):
            low, high = theta
            settings = {"threshold": None, "dynamic_threshold": "sigma", "threshold_min": low, "threshold_max": high}
            settings["timesteps"] = torch.full((len(scores),), t)
        return self._compare["preference_score_compare"](scores.T, **settings)


def our_loss(case: StepCase) -> StepOutcome:
    """The fused loss of transitions that share x_t."""
    leaves = [x.clone().requires_grad_() for x in case.policy]
    states = case.x_t, case.x_w, case.x_l
    rows = coefficients(published_sampler(), case.t, case.x_t)
    settings = {"guidance_scale": GUIDANCE, "beta": case.beta, "clip": CLIP}
    found = transition_loss(*leaves, *case.reference, *states, rows, **settings)
    gradients = torch.autograd.grad(found.loss, leaves)
    ratios = torch.stack([found.ratio_w, found.ratio_l]).clamp(1 - CLIP, 1 + CLIP)
    return StepOutcome(found.loss.detach(), ratios, torch.stack(gradients))


def our_candidates(case: StepCase, keys: Tensor) -> Tensor:
    """(n, K, C, H, W) with the noise of ``keys`` (n, K)."""
    rows = coefficients(published_sampler(), case.t, case.x_t)
    return ddim_pool_step(case.x_t, *case.policy, keys, rows, guidance_scale=GUIDANCE).candidates


def our_verdict(scores: Tensor, index: int, theta: float | tuple[float, float]) -> Selection:
    """Of pools at step ``index`` of the published grid, all of whose steps have pools."""
    return select(scores, thresholds(published_sampler(), theta, over_all_steps=True)[index])


def noise_of(keys: Tensor, case: StepCase) -> Tensor:
    """(K, n, C, H, W): what our kernel draws for ``keys`` (n, K)."""
    return torch.stack(
        [keyed_noise(column, tuple(case.x_t.shape[1:]), case.x_t.dtype) for column in keys.T.contiguous()]
    )


def _guided(prompted: Tensor, without: Tensor) -> Tensor:
    return without + GUIDANCE * (prompted - without)
