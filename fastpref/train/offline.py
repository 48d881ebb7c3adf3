"""SFT, Diffusion-DPO and Diffusion-RPO: the loop over prepared pairs.

One optimizer step: draw the global batch; for each micro-batch the reference's error, then the policy's reward; solve
the objective for dL/dreward over the **global** batch; back-propagate ``Σ g·reward``. Because the loss depends on the
predictions only through the rewards, that is the exact gradient, in whatever micro-batches and ranks the pairs lie.
An objective that couples pairs (RPO) has to know all rewards before any gradient: with one micro-batch the graph is
simply kept; with several, ``accumulation`` says whether the rewards come first or all graphs are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastpref.config import Config
from fastpref.data.sampling import BatchPlan, Sampler
from fastpref.errors import UserError
from fastpref.models.policy import Policy
from fastpref.objectives import Objective, PairRewards, Solution
from fastpref.train.batch import BatchBuilder, PairBatch
from fastpref.train.engine import Engine
from fastpref.train.optim import learning_rate_at
from fastpref_kernels import implicit_reward, implicit_reward_parts


class _Scored(NamedTuple):
    """Rewards of one micro-batch; ``reward`` carries the graph if there is one."""

    reward: torch.Tensor  # (n or 2n,)
    rewards: PairRewards
    ref_error: torch.Tensor | None


class _Outcome(NamedTuple):
    """What a global batch came to; the gradients are in the parameters."""

    loss: float
    rewards: PairRewards
    effective_contrasts: float = 1.0


@dataclass
class OfflineTrainer:
    """All that a step needs; :meth:`step` is the method."""

    config: Config
    policy: Policy
    objective: Objective
    sampler: Sampler
    batches: BatchBuilder
    engine: Engine
    skipped: int = 0
    _share: slice = field(init=False)

    def __post_init__(self) -> None:
        self._share = self.engine.share(self.config.batch_size)

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step (0-based); returns its metrics over the global batch."""
        plan = self.sampler.batch(step)
        outcome = self._coupled(plan) if self.objective.couples_pairs else self._separate(plan)
        rate = learning_rate_at(self.config, step)
        norm = self.engine.step(rate) if math.isfinite(outcome.loss) else None
        if norm is None:
            self.engine.discard()
            self._count_skip(step, outcome.loss)
        return self._metrics(step, outcome, norm, rate)

    def _separate(self, plan: BatchPlan) -> _Outcome:
        """Every pair on its own: forward, solve, backward, one micro-batch at a time."""
        parts, loss = [], torch.zeros((), dtype=torch.float64)
        for rows in self._micro_batches():
            batch = self.batches.build(plan, rows)
            scored = self._score(batch, self._reference_error(batch), graph=True)
            solution = self.objective.solve(scored.rewards)
            share = batch.pairs / self.config.batch_size
            self._backward(scored.reward, solution, share)
            loss += solution.loss.double().cpu() * share
            parts.append(scored.rewards)
        rewards = self._gather(PairRewards.concatenate(parts))
        return _Outcome(float(self.engine.gather(loss.view(1, 1)).sum()), rewards)

    def _coupled(self, plan: BatchPlan) -> _Outcome:
        """Rewards of the whole global batch, then the gradient of each micro-batch."""
        micro = self._micro_batches()
        keep = len(micro) == 1 or self.config.accumulation == "keep_graphs"
        scored: list[_Scored] = []
        for rows in micro:
            batch = self.batches.build(plan, rows)
            scored.append(self._score(batch, self._reference_error(batch), graph=keep))
        rewards = self._gather(PairRewards.concatenate([part.rewards for part in scored]))
        embeddings = self.batches.embeddings(plan) if self.objective.uses_embeddings else None
        solution = self.objective.solve(rewards, embeddings)
        if math.isfinite(float(solution.loss)):
            for rows, part in zip(micro, scored, strict=True):
                if not keep:
                    part = self._score(self.batches.build(plan, rows), part.ref_error, graph=True)
                self._backward(part.reward, _slice(solution, rows))
        contrasts = solution.effective_contrasts
        return _Outcome(float(solution.loss), rewards, 1.0 if contrasts is None else float(contrasts))

    def _micro_batches(self) -> list[slice]:
        size = self.config.micro_batch
        return [slice(s, min(s + size, self._share.stop)) for s in range(self._share.start, self._share.stop, size)]

    def _reference_error(self, batch: PairBatch) -> torch.Tensor | None:
        if not self.objective.uses_reference:
            return None
        pred = self.policy.predict_reference(batch.noisy, batch.timesteps, batch.conditioning)
        return -implicit_reward(pred, batch.target)

    def _score(self, batch: PairBatch, ref_error: torch.Tensor | None, *, graph: bool) -> _Scored:
        with torch.set_grad_enabled(graph):
            pred = self.policy.predict(batch.noisy, batch.timesteps, batch.conditioning)
            cross = self.config.safeguard is not None
            parts = implicit_reward_parts(pred, batch.target, ref_error=ref_error, cross=cross)
        n, reward, error = batch.pairs, parts.reward.detach(), parts.error
        if batch.rows == n:
            return _Scored(parts.reward, PairRewards(reward, None, error, None), ref_error)
        rewards = PairRewards(reward[:n], reward[n:], error[:n], error[n:], parts.cross, batch.label)
        return _Scored(parts.reward, rewards, ref_error)

    def _backward(self, reward: torch.Tensor, solution: Solution, share: float = 1.0) -> None:
        weights = [solution.grad_w] if solution.grad_l is None else [solution.grad_w, solution.grad_l]
        weight = torch.cat(weights) * share
        if bool(torch.isfinite(weight).all()):
            self.engine.backward((weight.detach() * reward).sum())
            self.policy.count_backward(len(reward))

    def _gather(self, rewards: PairRewards) -> PairRewards:
        return rewards.unstacked(self.engine.gather(rewards.stacked()))

    def _count_skip(self, step: int, loss: float) -> None:
        self.skipped += 1
        if self.skipped > self.config.max_skipped_steps:
            raise UserError(
                f"{self.skipped} steps had a non-finite loss or gradient, the last with loss {loss}",
                f"step {step + 1}",
                "lower learning_rate or beta, or use precision=fp32; the newest checkpoint is intact",
            )

    def _metrics(self, step: int, outcome: _Outcome, norm: float | None, rate: float) -> dict[str, Any]:
        rewards = outcome.rewards
        metrics: dict[str, Any] = {
            "step": step + 1,
            "loss": outcome.loss,
            "reward_winner": None,
            "reward_loser": None,
            "err_winner": float(rewards.error_w.mean()),
            "err_loser": None,
            "margin": None,
            "accuracy": None,
            "grad_norm": norm,
            "lr": rate,
        }
        if rewards.reward_l is not None and rewards.error_l is not None:
            margin = rewards.reward_w - rewards.reward_l
            metrics["reward_winner"] = float(rewards.reward_w.mean())
            metrics["reward_loser"] = float(rewards.reward_l.mean())
            metrics["err_loser"] = float(rewards.error_l.mean())
            metrics["margin"] = float(margin.mean())
            metrics["accuracy"] = float((margin > 0).double().mean())
        if self.config.method == "rpo":
            metrics["effective_contrasts"] = outcome.effective_contrasts
        return metrics


def _slice(solution: Solution, rows: slice) -> Solution:
    loser = None if solution.grad_l is None else solution.grad_l[rows]
    return solution._replace(grad_w=solution.grad_w[rows], grad_l=loser)
