"""SFT, Diffusion-DPO and Diffusion-RPO: the loop over prepared pairs.

One optimizer step: draw the global batch; for each micro-batch the reference's error (computed, or looked up in the
ledger), then the policy's reward; solve the objective for dL/dreward over the **global** batch; back-propagate
``Σ g·reward``. Because the loss depends on the predictions only through the rewards, that is the exact gradient, in
whatever micro-batches and ranks the pairs lie.
An objective that couples pairs (RPO) has to know all rewards before any gradient: with one micro-batch the graph is
simply kept; with several, ``accumulation`` says whether the rewards come first or all graphs are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref.config import Config
from fastpref.data.ledger import Ledger
from fastpref.data.sampling import Sampler
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.models.policy import Conditioning, Policy, load_policy
from fastpref.objectives import Objective, PairRewards, Solution, build_objective
from fastpref.train.batch import BatchBuilder, PairBatch
from fastpref.train.engine import Engine, open_engine
from fastpref.train.figures import Arriving, step_figures, step_metrics
from fastpref.train.inputs import check_unet, open_sampler, open_schedule, open_store
from fastpref.train.loader import Loaded, Loader
from fastpref.train.optim import learning_rate_at
from fastpref.train.profile import phase
from fastpref.train.reference import in_half_precision, open_ledger
from fastpref.train.trainer import PolicyTrainer
from fastpref.train.untrained import check_untrained, micro_batches_to_ask, rounding_apart
from fastpref.train.world import World
from fastpref.watch import Watch
from fastpref_kernels import implicit_reward, implicit_reward_parts


class _Scored(NamedTuple):
    """Rewards of one micro-batch, and what back-propagates a weight (n or 2n,) for each of them."""

    rewards: PairRewards
    ref_error: torch.Tensor | None
    backward: Callable[[torch.Tensor], None] | None


class _Outcome(NamedTuple):
    """What a global batch came to, still on the device; the gradients are in the parameters."""

    loss: torch.Tensor  # ()
    rewards: PairRewards
    effective_contrasts: torch.Tensor | None = None


def open_trainer(config: Config, model_dir: Path, device: torch.device, world: World | None = None) -> OfflineTrainer:
    """Check store, model and batch arithmetic, and load what is trained.

    Raises:
        UserError: anything that would stop the training later and can be known now.
    """
    store, objective = open_store(config, model_dir), build_objective(config)
    _check_store(config, objective, store)
    sampler, schedule = open_sampler(config, store), open_schedule(config, model_dir)
    ledger = open_ledger(config, model_dir, store, sampler, schedule) if config.reference == "ledger" else None
    needs_reference = objective.uses_reference and ledger is None
    policy = load_policy(config, model_dir, device, needs_reference=needs_reference)
    check_unet(policy.unet, store, config)
    if objective.uses_losers:
        policy.share_prompts()
    batches = BatchBuilder(store, schedule, config, device, with_losers=objective.uses_losers)
    engine = open_engine(policy, config, world)
    trainer = OfflineTrainer(config, policy, objective, sampler, batches, engine, ledger=ledger)
    trainer.record_graphs(device)
    return trainer


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
    ledger: Ledger | None = None
    watch: Watch = field(default_factory=Watch)

    def begin(self, run_dir: Path, watch: Watch) -> None:
        self.watch = watch

    def describe(self) -> str:
        return f"{len(self.batches.store)} pairs"

    def verify(self) -> None:
        self.batches.store.verify()

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step (0-based); returns its metrics over the global batch."""
        return self.launch(step)()

    def launch(self, step: int) -> Callable[[], dict[str, Any]]:
        """The step without waiting for the device: batches are read ahead, its numbers are asked for afterwards."""
        rate = learning_rate_at(self.config, step)
        with self.on_stream():
            self.engine.begin(step, rate)
            outcome = self._coupled(step) if self.objective.couples_pairs else self._separate(step)
            if step == 0 and self.ledger is not None:
                self.watch.line(check_untrained(outcome.rewards, self.config.beta, self._rounding_apart()))
            with phase("optimizer"):
                norm = self.engine.launch(rate, outcome.loss)
            with phase("logging"):
                found = step_figures(outcome.rewards, outcome.loss, norm, outcome.effective_contrasts)
                figures = Arriving(found, self.policy.device)
        return lambda: step_metrics(step, self.checked(step, figures.read()), rate)

    def _separate(self, step: int) -> _Outcome:
        """Every pair on its own: forward, solve, backward, one micro-batch at a time."""
        parts, losses = [], []
        for number in range(len(self._micro)):
            loaded = self._take(step, number)
            batch = self.batches.build(loaded.plan, loaded.rows, loaded.stored)
            scored = self._score(batch, self._reference_error(loaded, batch), graph=True)
            with phase("loss"):
                solution = self.objective.solve(scored.rewards)
            share = batch.pairs / self.config.batch_size
            self._backward(scored, solution, share)
            losses.append(solution.loss.double() * share)
            parts.append(scored.rewards)
        rewards = self._gather(PairRewards.concatenate(parts))
        with phase("communication"):
            loss = self.engine.world.gather(torch.stack(losses).sum().view(1, 1)).sum()
        return _Outcome(loss, rewards, torch.ones_like(loss) if self.config.method == "rpo" else None)

    def _coupled(self, step: int) -> _Outcome:
        """Rewards of the whole global batch, then the gradient of each micro-batch."""
        keep = len(self._micro) == 1 or self.config.accumulation == "keep_graphs"
        scored: list[_Scored] = []
        embeddings = None
        for number in range(len(self._micro)):
            loaded = self._take(step, number)
            embeddings = embeddings or loaded.embeddings
            batch = self.batches.build(loaded.plan, loaded.rows, loaded.stored)
            scored.append(self._score(batch, self._reference_error(loaded, batch), graph=keep, slot=number))
        rewards = self._gather(PairRewards.concatenate([part.rewards for part in scored]))
        with phase("loss"):
            related = None if embeddings is None else tuple(map(self.batches.moved, embeddings))
            solution = self.objective.solve(rewards, related)
        for number, part in enumerate(scored):
            if not keep:
                loaded = self._take(step, len(self._micro) + number)
                batch = self.batches.build(loaded.plan, loaded.rows, loaded.stored)
                part = self._score(batch, part.ref_error, graph=True)
            self._backward(part, _slice(solution, self._micro[number]))
        return _Outcome(solution.loss.double(), rewards, solution.effective_contrasts)

    def _rounding_apart(self) -> torch.Tensor | None:
        """See :func:`rounding_apart`, of the first batch on all ranks; None where nothing is rounded to 16 bits."""
        if not in_half_precision(self.config):
            return None
        asked, repeats = micro_batches_to_ask(self.config.micro_batch * self.engine.world.size, len(self._micro))
        plan = self.sampler.batch(0)
        batches = (self.batches.build(plan, rows) for rows in self._micro[:asked])
        found = [rounding_apart(self.policy, batch, repeats) for batch in batches]
        return self.engine.world.gather(torch.cat(found, dim=1))

    @cached_property
    def _micro(self) -> list[slice]:
        return self.micro_batches(self.config.batch_size)

    @cached_property
    def _loader(self) -> Loader:
        twice = self.objective.couples_pairs and len(self._micro) > 1 and self.config.accumulation == "rewards_first"
        order = self._micro * 2 if twice else self._micro
        return Loader(self.sampler, self.batches, order, with_embeddings=self.objective.uses_embeddings)

    def _take(self, step: int, number: int) -> Loaded:
        with phase("data"):
            return self._loader.take(step, number)

    def _reference_error(self, loaded: Loaded, batch: PairBatch) -> torch.Tensor | None:
        if not self.objective.uses_reference:
            return None
        with phase("reference"):
            if self.ledger is not None:
                plan = loaded.plan
                return self.batches.moved(self.ledger.errors(plan.epoch, plan.slot, loaded.rows))
            pred = self.policy.predict_reference(batch.noisy, batch.timesteps, batch.conditioning)
            return -implicit_reward(pred, batch.target)

    def _score(self, batch: PairBatch, ref_error: torch.Tensor | None, *, graph: bool, slot: int = 0) -> _Scored:
        inputs = batch.noisy, batch.timesteps, batch.target, ref_error, *batch.conditioning.tensors()
        self.policy.forwards += batch.rows
        with phase("policy forward"):
            if graph:
                found, backward = self.differentiable("rewards", self._rewards, self._weighted, inputs, slot)
            else:
                found, backward = self.repeated("rewards", self._rewards, inputs), None
        reward, error, cross = found
        assert reward is not None and error is not None
        n = batch.pairs
        if batch.rows == n:
            return _Scored(PairRewards(reward, None, error, None), ref_error, backward)
        rewards = PairRewards(reward[:n], reward[n:], error[:n], error[n:], cross, batch.label)
        return _Scored(rewards, ref_error, backward)

    def _rewards(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        target: torch.Tensor,
        ref_error: torch.Tensor | None,
        *conditioning: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """(reward, error, cross) of a forward, a function of its inputs and the weights alone."""
        pred = self.policy.forward_pass(noisy, timesteps, Conditioning(*conditioning))
        cross = self.config.safeguard is not None
        parts = implicit_reward_parts(pred, target, ref_error=ref_error, cross=cross)
        return parts.reward, parts.error, parts.cross

    def _weighted(self, reward: torch.Tensor, weight: torch.Tensor) -> None:
        self.engine.backward((weight * reward).sum())

    def _backward(self, scored: _Scored, solution: Solution, share: float = 1.0) -> None:
        weights = [solution.grad_w] if solution.grad_l is None else [solution.grad_w, solution.grad_l]
        weight = torch.cat(weights) * share
        assert scored.backward is not None
        with phase("backward"):
            scored.backward(weight.detach())
        self.policy.count_backward(len(weight))

    def _gather(self, rewards: PairRewards) -> PairRewards:
        with phase("communication"):
            return rewards.unstacked(self.engine.world.gather(rewards.stacked()))


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
    if config.size_conditioning == "winner" and store.manifest.family == "sd15":
        raise UserError("size_conditioning is winner, but SD1.5 is not told sizes", config.store, "remove it")
    needs = objective.uses_embeddings or config.sampling == "related"
    if needs and store.manifest.clip_fingerprint is None:
        raise UserError(
            "the store holds no CLIP embeddings", config.store, "prepare it with clip=FOLDER, or set weight=uniform"
        )
