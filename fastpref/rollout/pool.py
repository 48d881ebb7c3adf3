"""The step-pool sampler of SPO (arXiv 2406.04314): from one state K candidates, one of which goes on at random.

A rollout of N prompts takes ``plain_steps`` ordinary stochastic DDIM steps, then segment by segment: K candidates from
one prediction, ``inner_steps`` more steps of each (none on SD1.5, 3 on SDXL), then one of the K, drawn without regard
to any score, is the next state. A scorer that looks at x̂0 needs the UNet on every candidate; the prediction of the one
that goes on is that of the next segment, so no state is predicted twice. One that looks at the noisy candidate needs
the UNet on the state that goes on only.

All noise and choices are keyed by (seed, epoch, prompt id, step, candidate): a prompt's rollout does not depend on the
batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fastpref.memory import moved
from fastpref.models.guidance import GuidedRows, Predict
from fastpref.models.noise_schedule import NoiseSchedule
from fastpref.models.policy import Conditioning
from fastpref.models.timesteps import DenoisingStep
from fastpref.process.ddpm import ddim_steps
from fastpref_kernels import ddim_pool_step, derive_keys, keyed_noise, keyed_uniform_u32, predict_x0

Prediction = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class PoolSampler:
    """The settings of a rollout.

    ``steps`` are the denoising steps in order. The first ``plain_steps`` have no pools; behind them come segments of
    ``inner_steps + 1`` steps. A rollout ends with the last whole segment before step ``end``: what no pair is drawn
    from is not computed.

    ``score_at`` says which timestep a scorer is told of: "next" is the candidates' own, from which the next step
    starts, 0 for finished ones; "current" is that of the step that led to them (the official LPO code).
    """

    steps: Sequence[DenoisingStep]
    schedule: NoiseSchedule
    plain_steps: int
    end: int
    inner_steps: int
    candidates: int
    guidance_scale: float
    eta: float
    seed: int
    score_at: Literal["next", "current"] = "next"

    @property
    def segments(self) -> range:
        """Index of the first step of each segment."""
        return range(self.plain_steps, self.end - self.inner_steps, self.inner_steps + 1)

    @property
    def own_timesteps(self) -> list[int]:
        """The timestep at which the candidates of each segment lie; 0: they are finished."""
        return [self.steps[first + self.inner_steps].t_prev for first in self.segments]

    @property
    def score_timesteps(self) -> list[int]:
        """The timestep that a scorer is told of the candidates of each segment."""
        if self.score_at == "next":
            return self.own_timesteps
        return [self.steps[first + self.inner_steps].t for first in self.segments]

    def sigma(self, index: int) -> float:
        """Standard deviation of the noise that step ``index`` adds (DDIM, arXiv 2010.02502, equation 16)."""
        return float(self.coefficients[index, 4])

    @cached_property
    def coefficients(self) -> Tensor:
        """(S, 5) float64 on the CPU: those of every step (:func:`fastpref.process.ddpm.ddim_steps`)."""
        t, t_prev = torch.tensor(self.steps).unbind(dim=1)
        return self._steps(t, t_prev)

    @cached_property
    def x0_coefficients(self) -> Tensor:
        """(S, 5) float64 on the CPU, of whose rows x̂0 needs the first two: from where each step ends."""
        ends = torch.tensor(self.steps)[:, 1]
        return self._steps(ends, torch.full_like(ends, -1))

    def _steps(self, t: Tensor, t_prev: Tensor) -> Tensor:
        return ddim_steps(self.schedule.alphas_cumprod, t, t_prev, self.schedule.prediction_type, eta=self.eta)


@dataclass
class Pool:
    """One segment of N prompts: where it began and the K ways it could go.

    ``paths[:, k, j]`` is the state after j + 1 steps; ``x0`` is what a scorer of x̂0 looks at; ``t`` is the timestep
    that the scorer is told.
    """

    first: int  # index of the segment's first step
    start: Tensor  # (N, C, h, w)
    paths: Tensor  # (N, K, inner_steps + 1, C, h, w)
    x0: Tensor | None  # (N, K, C, h, w)
    t: int
    chosen: Tensor  # (N,) int64: the candidate that goes on

    @property
    def latents(self) -> Tensor:
        """(N, K, C, h, w): the candidates when they are scored."""
        return self.paths[:, :, -1]


@torch.no_grad()
def roll_out(
    sampler: PoolSampler,
    predict: Predict,
    ids: Tensor,
    conditioning: Conditioning,
    empty: Conditioning,
    shape: tuple[int, int, int],
    *,
    epoch: int,
    needs_x0: bool,
    dtype: torch.dtype = torch.float32,
    breathe: Callable[[], None] = lambda: None,
) -> Iterator[Pool]:
    """Sample N prompts, giving each segment's pool as soon as it is there.

    Args:
        predict: the policy's UNet.
        ids: (N,) int64 on the CPU, what stands for each prompt in the keys of the noise.
        conditioning: N rows; empty: one row.
        shape: (C, h, w) of the latents.
        epoch: pass over the prompts, part of the keys.
        needs_x0: whether the scorer looks at x̂0, which is predicted at the candidates' own timestep.
        dtype: of the latents.
        breathe: called before every UNet call; may raise to abandon the rollout.
    """
    k, device = sampler.candidates, conditioning.prompt_embeds.device
    one = GuidedRows(predict, conditioning, empty, sampler.guidance_scale)
    many = GuidedRows(predict, _repeat(conditioning, k), empty, sampler.guidance_scale)
    exact = torch.promote_types(dtype, torch.float32)
    coefficients, of_x0 = (moved(x.to(exact), device) for x in (sampler.coefficients, sampler.x0_coefficients))

    def predicted(rows: GuidedRows, x: Tensor, t: int) -> Prediction:
        breathe()
        return rows(x, torch.full((len(x),), t, device=device))

    def stepped(x: Tensor, prediction: Prediction, keys: Tensor, index: int) -> Tensor:
        rows = coefficients[index].expand(len(x), -1)
        return ddim_pool_step(x, *prediction, keys, rows, guidance_scale=sampler.guidance_scale).candidates

    def noise(index: int) -> Tensor:  # (N, K)
        draws = [derive_keys(sampler.seed, epoch, ids, index * k + j, "candidate") for j in range(k)]
        return moved(torch.stack(draws, dim=1), device)

    x = keyed_noise(moved(derive_keys(sampler.seed, epoch, ids, 0, "init"), device), shape, dtype)
    for index in range(sampler.plain_steps):
        x = stepped(x, predicted(one, x, sampler.steps[index].t), noise(index)[:, :1], index)[:, 0]
    prediction: Prediction | None = None
    for first, t, told in zip(sampler.segments, sampler.own_timesteps, sampler.score_timesteps, strict=True):
        prediction = prediction or predicted(one, x, sampler.steps[first].t)
        states = [stepped(x, prediction, noise(first), first).flatten(0, 1)]
        for index in range(first + 1, first + sampler.inner_steps + 1):
            inner = predicted(many, states[-1], sampler.steps[index].t)
            states.append(stepped(states[-1], inner, noise(index).flatten()[:, None], index)[:, 0])
        chosen = moved(_choice(sampler, epoch, ids, first), device)
        rows = torch.arange(len(ids), device=device) * k + chosen
        x0, prediction = (states[-1], None) if t == 0 else (None, None)
        if t and needs_x0:
            seen = predicted(many, states[-1], t)
            rows_of_x0 = of_x0[first + sampler.inner_steps].expand(len(states[-1]), -1)
            x0 = predict_x0(states[-1], *seen, rows_of_x0, guidance_scale=sampler.guidance_scale)
            prediction = seen[0][rows], None if seen[1] is None else seen[1][rows]
        paths = torch.stack(states, dim=1).unflatten(0, (-1, k))
        yield Pool(first, x, paths, None if x0 is None else x0.unflatten(0, (-1, k)), told, chosen)
        x = states[-1][rows]


def _choice(sampler: PoolSampler, epoch: int, ids: Tensor, index: int) -> Tensor:
    words = keyed_uniform_u32(derive_keys(sampler.seed, epoch, ids, index, "choice"))
    return (words * sampler.candidates) >> 32


def _repeat(conditioning: Conditioning, k: int) -> Conditioning:
    """Every row k times in a row."""
    pooled, time_ids = conditioning.pooled_prompt_embeds, conditioning.time_ids
    return Conditioning(
        conditioning.prompt_embeds.repeat_interleave(k, dim=0),
        None if pooled is None else pooled.repeat_interleave(k, dim=0),
        None if time_ids is None else time_ids.repeat_interleave(k, dim=0),
    )
