"""What of the scored pools is trained on: win and lose of a pool, and the denoising steps that led to them.

The best and the worst candidate are a pair if p_w - p_l > θ, p the softmax over their two scores, which is a score gap
above 2·artanh θ (SPO, arXiv 2406.04314). θ may grow with the step's σ (LPO, arXiv 2502.01051). All transitions of a
segment inherit its label; in the first of them win and lose share the state they come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastpref.memory import moved
from fastpref.rollout.pool import Pool, PoolSampler


@dataclass
class Transitions:
    """M steps, each from ``x_t`` to the preferred ``x_w`` and from ``x_t_l`` to ``x_l``; rows of all fields agree."""

    x_t: Tensor  # (M, C, h, w)
    x_t_l: Tensor  # (M, C, h, w); where shared, x_t again
    x_w: Tensor  # (M, C, h, w)
    x_l: Tensor  # (M, C, h, w)
    shared: Tensor  # (M,) bool: x_t and x_t_l are one state
    step: Tensor  # (M,) int64, index of the denoising step
    prompt: Tensor  # (M,) int64, id of the prompt

    def __len__(self) -> int:
        return len(self.step)

    def rows(self, index: Tensor | slice) -> Transitions:
        """Those rows; an index on the CPU also finds those on a GPU without waiting for it."""

        def cut(values: Tensor) -> Tensor:
            return values[index if isinstance(index, slice) else moved(index, values.device)]

        return Transitions(*(cut(getattr(self, field.name)) for field in fields(self)))

    def to(self, device: torch.device) -> Transitions:
        return Transitions(*(moved(getattr(self, field.name), device) for field in fields(self)))

    def tensors(self) -> dict[str, Tensor]:
        """By name; a checkpoint keeps them, :class:`Transitions` takes them back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def concatenate(parts: Sequence[Transitions]) -> Transitions:
        return Transitions(*(torch.cat([getattr(p, field.name) for p in parts]) for field in fields(Transitions)))


@dataclass
class Selection:
    """The verdict on one segment of N prompts."""

    scores: Tensor  # (N, K) fp64
    winner: Tensor  # (N,) int64
    loser: Tensor  # (N,) int64
    gap: Tensor  # (N,) fp64, best minus worst; NaN where a score is
    kept: Tensor  # (N,) bool


def thresholds(sampler: PoolSampler, theta: float | tuple[float, float], *, over_all_steps: bool) -> list[float]:
    """θ of each segment: one number, or from low to high linearly in σ of the segment's first step.

    Args:
        over_all_steps: low and high belong to the least and the greatest σ of the whole grid, as in the official LPO
            code; else to those of the segments that there are.
    """
    if not isinstance(theta, tuple):
        return [theta] * len(sampler.segments)
    low, high = theta
    sigmas = [sampler.sigma(first) for first in sampler.segments]
    spanned = [sampler.sigma(index) for index in range(len(sampler.steps))] if over_all_steps else sigmas
    least, range_ = min(spanned), max(spanned) - min(spanned)
    return [low + (high - low) * ((sigma - least) / range_ if range_ else 1.0) for sigma in sigmas]


def select(scores: Tensor, theta: float) -> Selection:
    """Best and worst of each pool, (N, K) scores; a pool with a score that is no finite number is never kept."""
    scores = scores.double()
    finite = scores.isfinite().all(dim=1)
    sure = torch.where(finite[:, None], scores, 0.0)
    winner, loser = sure.argmax(dim=1), sure.argmin(dim=1)
    gap = torch.where(finite, sure.amax(dim=1) - sure.amin(dim=1), torch.nan)
    kept = finite & (gap > 2 * math.atanh(theta))
    return Selection(scores, winner, loser, gap, kept)


def transitions_of(pool: Pool, selection: Selection, ids: Tensor) -> Transitions:
    """Those of the kept pairs, ``inner_steps + 1`` a pair; ``ids`` (N,) of the pool's prompts."""
    rows = selection.kept.nonzero().flatten()
    device = pool.start.device
    at = moved(rows, device)
    win, lose = (pool.paths[at, moved(side[rows], device)] for side in (selection.winner, selection.loser))
    start = pool.start[at][:, None]
    length = win.shape[1]
    first = torch.arange(length) == 0
    return Transitions(
        x_t=torch.cat([start, win[:, :-1]], dim=1).flatten(0, 1),
        x_t_l=torch.cat([start, lose[:, :-1]], dim=1).flatten(0, 1),
        x_w=win.flatten(0, 1),
        x_l=lose.flatten(0, 1),
        shared=first.repeat(len(rows)),
        step=(pool.first + torch.arange(length)).repeat(len(rows)),
        prompt=ids[rows].repeat_interleave(length),
    )
