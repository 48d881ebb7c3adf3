"""One round of step-wise training data: roll out prompts, score the pools, keep the pairs that are clear enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastpref.models.policy import Policy
from fastpref.models.prompt_book import PromptBook, prompt_id
from fastpref.rollout.pool import Pool, PoolSampler, roll_out
from fastpref.rollout.queue import ScoringQueue
from fastpref.rollout.scoring import StepScorer
from fastpref.rollout.step_scorers import agreement
from fastpref.rollout.transitions import Selection, Transitions, select, transitions_of
from fastpref.watch import Interrupted, Watch


@dataclass
class Round:
    """What a round came to on this rank."""

    transitions: Transitions  # ordered by prompt, then by step
    selections: list[Selection]  # a segment each, over all prompts
    sample: PoolSample
    unet_forwards: int
    seconds_rollout: float
    seconds_scoring: float
    agreement: dict[str, float] = field(default_factory=dict)  # of a small decoder with the VAE


@dataclass
class PoolSample:
    """The pools of one prompt, for people to look at."""

    prompt: str
    latents: Tensor  # (S, K, C, h, w) what was scored
    scores: Tensor  # (S, K)
    chosen: Tensor  # (S,)
    kept: Tensor  # (S,) bool


@dataclass
class Collector:
    """The settings and models of a rollout.

    Args:
        theta: score threshold of each segment.
        shape: (C, h, w) of the latents.
        batch_size: prompts at once in the rollout. score_chunk: candidates at once in the scorer.
        merge: put the LoRA into the weights meanwhile.
    """

    sampler: PoolSampler
    policy: Policy
    scorer: StepScorer
    book: PromptBook
    theta: Sequence[float]
    shape: tuple[int, int, int]
    batch_size: int
    score_chunk: int
    dtype: torch.dtype
    merge: bool
    watch: Watch = field(default_factory=Watch)

    def collect(self, prompts: Sequence[str], indices: Tensor, epoch: int) -> Round:
        """Roll out ``prompts``, whose numbers in the list of prompts are ``indices`` (n,) int64.

        Raises:
            Interrupted: the run was asked to stop; nothing has changed.
        """
        queue = ScoringQueue(self.scorer, chunk=self.score_chunk, on_progress=self._progress("scoring"))
        began, before = time.perf_counter(), self.policy.forwards
        batches: list[tuple[Tensor, list[Pool]]] = []
        rolled = self._progress("rollout", len(prompts) * len(self.sampler.segments))
        with self._merged():
            for start in range(0, len(prompts), self.batch_size):
                part = prompts[start : start + self.batch_size]
                pools = []
                for pool in self._roll_out(part, epoch):
                    queue.submit(*_flat(pool, self.scorer.needs_x0), _each(part, self.sampler.candidates))
                    pools.append(pool)
                    rolled(start * len(self.sampler.segments) + len(pools) * len(part), 0)
                batches.append((indices[start : start + self.batch_size], pools))
        rolled_out = time.perf_counter()
        scores = iter(queue.results())
        rounds = [[next(scores).view(-1, self.sampler.candidates) for _ in pools] for _, pools in batches]
        scored = time.perf_counter()
        found = self._round(prompts[0], batches, rounds, (rolled_out - began, scored - rolled_out), before)
        found.agreement = self._agreement(prompts[: self.batch_size], batches[0][1], rounds[0])
        return found

    def _agreement(self, prompts: Sequence[str], pools: Sequence[Pool], scores: Sequence[Tensor]) -> dict[str, float]:
        """How far a small decoder's scores choose as the VAE's, in the middle segment of the first batch."""
        exact, middle = getattr(self.scorer, "exact", None), len(pools) // 2
        if exact is None:
            return {}
        names, k = _each(prompts, self.sampler.candidates), self.sampler.candidates
        found = exact.score(*_flat(pools[middle], True), names)
        return agreement(found.view(-1, k), scores[middle])

    def _roll_out(self, prompts: Sequence[str], epoch: int) -> Any:
        return roll_out(
            self.sampler,
            self.policy.predict,
            torch.tensor([prompt_id(prompt) for prompt in prompts]),
            self.book.conditioning(prompts),
            self.book.empty(),
            self.shape,
            epoch=epoch,
            needs_x0=self.scorer.needs_x0,
            dtype=self.dtype,
            breathe=self._breathe,
        )

    def _round(
        self,
        prompt: str,
        batches: list[tuple[Tensor, list[Pool]]],
        scores: list[list[Tensor]],
        seconds: tuple[float, float],
        forwards: int,
    ) -> Round:
        chosen = [[select(rows, limit) for rows, limit in zip(part, self.theta, strict=True)] for part in scores]
        found = [
            transitions_of(pool, selection, ids)
            for (ids, pools), part in zip(batches, chosen, strict=True)
            for pool, selection in zip(pools, part, strict=True)
        ]
        transitions = Transitions.concatenate(found)
        order = {int(index): place for place, index in enumerate(torch.cat([ids for ids, _ in batches]))}
        places = torch.tensor([order[int(index)] for index in transitions.prompt], dtype=torch.int64)
        ranks = places * len(self.sampler.steps) + transitions.step
        return Round(
            transitions.rows(ranks.argsort(stable=True)),
            [_joined([part[s] for part in chosen]) for s in range(len(self.theta))],
            _sample(prompt, batches[0][1], chosen[0]),
            self.policy.forwards - forwards,
            *seconds,
        )

    def _breathe(self) -> None:
        if self.watch.stopping():
            raise Interrupted

    def _progress(self, what: str, total: int | None = None) -> Callable[[int, int], None]:
        def tell(done: int, of: int) -> None:
            self.watch.note(f"{what} {100 * done // max(1, total or of)} %")
            self._breathe()

        return tell

    def _merged(self) -> AbstractContextManager[Any]:
        return self.policy.merged() if self.merge else nullcontext()


def round_figures(sampler: PoolSampler, theta: Sequence[float], selections: Sequence[Selection]) -> dict[str, Any]:
    """What ``rollouts.jsonl`` says of the scores: by segment, and the gaps over all pools."""
    scores = torch.stack([selection.scores for selection in selections])  # (S, N, K)
    gaps = torch.stack([selection.gap for selection in selections])
    kept = torch.stack([selection.kept for selection in selections])
    return {
        "pools": kept.numel(),
        "pairs_kept": int(kept.sum()),
        "pools_dropped_nan": int(gaps.isnan().sum()),
        "threshold": list(theta),
        "timesteps": sampler.score_timesteps,
        "score_mean": _means(scores.mean(dim=2)),
        "score_best": _means(scores.amax(dim=2)),
        "score_worst": _means(scores.amin(dim=2)),
        "gap_median": [_number(row.nanmedian()) for row in gaps],
        "kept_share": [float(row.double().mean()) for row in kept],
        "gap_quantiles": gap_quantiles(gaps),
    }


def gap_quantiles(gaps: Tensor) -> dict[str, float | None]:
    """The 0.1, 0.5, 0.9 and 1.0 quantile of the gaps that are numbers."""
    finite = gaps[gaps.isfinite()].double()
    places = (0.1, 0.5, 0.9, 1.0)
    return {str(p): float(finite.quantile(p)) if len(finite) else None for p in places}


def _means(rows: Tensor) -> list[float | None]:
    """The mean of each row (S, N) over what is a number."""
    return [_number(row[row.isfinite()].mean()) for row in rows]


def _number(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _flat(pool: Pool, needs_x0: bool) -> tuple[Tensor, Tensor | None, int]:
    x0 = pool.x0.flatten(0, 1) if needs_x0 and pool.x0 is not None else None
    return pool.latents.flatten(0, 1), x0, pool.t


def _each(prompts: Sequence[str], k: int) -> list[str]:
    return [prompt for prompt in prompts for _ in range(k)]


def _joined(parts: Sequence[Selection]) -> Selection:
    return Selection(
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("scores", "winner", "loser", "gap", "kept"))
    )


def _sample(prompt: str, pools: Sequence[Pool], selections: Sequence[Selection]) -> PoolSample:
    """Of the first prompt."""
    looked_at = [pool.latents if pool.x0 is None else pool.x0 for pool in pools]
    return PoolSample(
        prompt,
        torch.stack([latents[0] for latents in looked_at]).float().cpu(),
        torch.stack([selection.scores[0] for selection in selections]).float(),
        torch.stack([pool.chosen[0] for pool in pools]).cpu(),
        torch.stack([selection.kept[0] for selection in selections]),
    )
