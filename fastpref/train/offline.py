"""SFT, Diffusion-DPO and Diffusion-RPO: the loop over prepared pairs.

One optimizer step: draw the global batch; for each micro-batch the reference's error, then the policy's reward; solve
the objective for dL/dreward over the **global** batch; back-propagate ``Σ g·reward``. Because the loss depends on the
predictions only through the rewards, that is the exact gradient, in whatever micro-batches and ranks the pairs lie.
An objective that couples pairs (RPO) has to know all rewards before any gradient: with one micro-batch the graph is
simply kept; with several, ``accumulation`` says whether the rewards come first or all graphs are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref.config import Config
from fastpref.data.sampling import BatchPlan, Sampler
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.models.policy import Policy, load_policy
from fastpref.objectives import Objective, PairRewards, Solution, build_objective
from fastpref.train.batch import BatchBuilder, PairBatch
from fastpref.train.engine import Engine, LocalEngine
from fastpref.train.inputs import check_unet, open_sampler, open_schedule, open_store
from fastpref.train.trainer import PolicyTrainer
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


def open_trainer(config: Config, model_dir: Path, device: torch.device) -> OfflineTrainer:
    """Check store, model and batch arithmetic, and load what is trained.

    Raises:
        UserError: anything that would stop the training later and can be known now.
    """
    store, objective = open_store(config, model_dir), build_objective(config)
    _check_store(config, objective, store)
    sampler, schedule = open_sampler(config, store), open_schedule(config, model_dir)
    policy = load_policy(config, model_dir, device, needs_reference=objective.uses_reference)
    check_unet(policy.unet, store, config)
    batches = BatchBuilder(store, schedule, config, device, with_losers=objective.uses_losers)
    return OfflineTrainer(config, policy, objective, sampler, batches, LocalEngine(policy, config))


@dataclass
class OfflineTrainer(PolicyTrainer):
    """All that a step needs; :meth:`step` is the method."""

    config: Config
    policy: Policy
    objective: Objective
    sampler: Sampler
    batches: BatchBuilder
    engine: Engine
    skipped: int = 0

    def describe(self) -> str:
        return f"{len(self.batches.store)} pairs"

    def verify(self) -> None:
        self.batches.store.verify()

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step (0-based); returns its metrics over the global batch."""
        plan = self.sampler.batch(step)
        outcome = self._coupled(plan) if self.objective.couples_pairs else self._separate(plan)
        norm, rate = self.update(step, outcome.loss)
        return self._metrics(step, outcome, norm, rate)

    def _separate(self, plan: BatchPlan) -> _Outcome:
        """Every pair on its own: forward, solve, backward, one micro-batch at a time."""
        parts, loss = [], torch.zeros((), dtype=torch.float64)
        for rows in self.micro_batches(self.config.batch_size):
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
        micro = self.micro_batches(self.config.batch_size)
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


def _check_store(config: Config, objective: Objective, store: Store) -> None:
    if store.manifest.ties == "half" and config.method != "dpo":
        raise UserError(
            f"method {config.method} has no use for ties of one half",
            config.store,
            "prepare with ties=drop or ties=keep",
        )
    needs = objective.uses_embeddings or config.sampling == "related"
    if needs and store.manifest.clip_fingerprint is None:
        raise UserError(
            "the store holds no CLIP embeddings", config.store, "prepare it with clip=FOLDER, or set weight=uniform"
        )
