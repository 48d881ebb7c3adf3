"""SPO and LPO: rounds of rolling out prompts and training on the pairs that the scores made clear.

One round: roll out ``rollout_prompts`` prompts with the policy as it is, score the pools, keep the clear pairs, pool
their transitions over the ranks, shuffle, and split them into even batches of about ``batch_size``; then one optimizer
step a batch. A batch mixes timesteps and prompts. Transitions whose win and lose share x_t (all but the inner steps of
SDXL) need one policy forward, one backward and one reference forward for both; the others one each. Every kept pair is
trained on once, and every batch is a mean over its own transitions.

The two methods differ in the scorer and the threshold only (arXiv 2406.04314, arXiv 2502.01051).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.data.sampling import Sampler, permute
from fastpref.errors import UserError
from fastpref.models.caption_length import count_cut
from fastpref.models.loading import DTYPES, model_dir_of, vae_scale_factor
from fastpref.models.policy import Policy, load_policy
from fastpref.models.prompt_book import PromptBook
from fastpref.models.text import load_text_stack
from fastpref.models.work import Work
from fastpref.rollout.collect import Collector, Round, gap_quantiles
from fastpref.rollout.record import RoundRecord
from fastpref.rollout.scorers import open_scorer
from fastpref.rollout.transitions import Selection, Transitions, select, thresholds
from fastpref.train.deepspeed_config import read_settings, zero_stage
from fastpref.train.engine import Engine, open_engine
from fastpref.train.figures import Arriving, won
from fastpref.train.inputs import open_pool_sampler, open_prompts, open_schedule
from fastpref.train.optim import learning_rate_at
from fastpref.train.profile import phase
from fastpref.train.trainer import PolicyTrainer
from fastpref.train.transitions import TransitionObjective
from fastpref.train.world import World
from fastpref.watch import Interrupted, Watch

_SHUFFLE = 1 << 14  # stream of the keyed permutation, beside those of the sampler
_EMPTY_ROUNDS = 3  # rounds in a row without a pair before giving up


def open_trainer(config: Config, model_dir: Path, device: torch.device, world: World | None = None) -> StepwiseTrainer:
    """Check prompts, models and scorer, and load what is trained and what judges.

    Raises:
        UserError: anything that would stop the training later and can be known now.
    """
    world, prompts = world or World(), open_prompts(config)
    order = Sampler(np.zeros(len(prompts), np.int64), batch_size=config.rollout_prompts, group_size=1, seed=config.seed)
    schedule, work = open_schedule(config, model_dir), Work()
    sampler = open_pool_sampler(config, model_dir, schedule)
    policy = load_policy(config, model_dir, device, needs_reference=True)
    texts = load_text_stack(model_dir, DTYPES[config.precision], device, config.max_caption_tokens)
    side = config.resolution // vae_scale_factor(model_dir)
    book = PromptBook(texts, model_dir, (config.resolution, config.resolution), device, work)
    scorer = open_scorer(config, model_dir, device, sampler.score_timesteps, book, work)
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    split = config.engine == "deepspeed" and zero_stage(config, read_settings(config)) == 3
    collector = Collector(
        sampler,
        policy,
        scorer,
        book,
        thresholds(sampler, config.score_threshold, over_all_steps=config.preset == "reference"),
        (policy.unet.config.in_channels, side, side),
        config.rollout_batch_size,
        config.decode_batch_size,
        dtype,
        merge=config.merges_rollout and not split,  # a weight that is elsewhere has nothing added to it
    )
    objective = TransitionObjective(config, policy, book, sampler, prompts)
    engine = open_engine(policy, config, world)
    trainer = StepwiseTrainer(config, policy, collector, objective, prompts, order, engine, work)
    trainer.record_graphs(device)
    return trainer


@dataclass
class StepwiseTrainer(PolicyTrainer):
    """All that a step needs; :meth:`step` is the method."""

    config: Config
    policy: Policy
    collector: Collector
    objective: TransitionObjective
    prompts: list[str]
    order: Sampler
    engine: Engine
    counted: Work
    skipped: int = 0
    round: int = -1  # the one whose transitions are trained on
    position: int = 0  # batches of it that are done
    batches: list[Tensor] = field(default_factory=list)  # row numbers
    transitions: Transitions | None = None
    totals: dict[str, float] = field(default_factory=dict)
    record: RoundRecord | None = None
    seconds: float = 0.0  # of training in this round

    def describe(self) -> str:
        return f"{len(self.prompts)} prompts"

    def warnings(self) -> list[str]:
        model_dir, length = model_dir_of(self.config), self.config.max_caption_tokens
        cut = count_cut(model_dir, length, self.prompts)
        return [] if cut is None else [f"{cut}"]

    def begin(self, run_dir: Path, watch: Watch) -> None:
        self.record = RoundRecord(run_dir, writes=self.engine.world.is_main)
        self.collector.watch = watch

    def work(self) -> Work:
        found = super().work()
        for name in ("vae_decodes", "text_forwards", "scorer_forwards"):
            setattr(found, name, getattr(self.counted, name))
        return found

    def restore_work(self, work: Work) -> None:
        super().restore_work(work)
        vars(self.counted).update(vars(work))  # the same object counts in the decoder and the scorer

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Between the batches of a round its transitions are kept too: the policy that drew them is gone."""
        values = {"round": self.round, "position": self.position, "totals": self.totals, "seconds": self.seconds}
        if self.transitions is None or self.position == len(self.batches):
            return {}, values | {"position": 0}
        return self.transitions.tensors(), values

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.round, self.position, self.totals, self.seconds = (
            values[name] for name in ("round", "position", "totals", "seconds")
        )
        self.transitions, self.batches = None, []
        if tensors:
            self.transitions = Transitions(**tensors)
            self.batches = self._split(len(self.transitions))

    def figures(self, steps: int) -> dict[str, Any]:
        totals = {name: self.totals.get(name, 0) for name in _TOTALS}
        totals["seconds_training"] += self.seconds
        return {"samples_seen": int(totals.pop("transitions")), "stepwise": {"rounds": self.round + 1, **totals}}

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step (0-based); returns its metrics over the global batch."""
        return self.launch(step)()

    def launch(self, step: int) -> Callable[[], dict[str, Any]]:
        """The step without waiting for the device; its numbers are asked for afterwards. A round that begins waits."""
        with self.on_stream():
            return self._launch(step)

    def _launch(self, step: int) -> Callable[[], dict[str, Any]]:
        if self.position == len(self.batches):
            self._next_round(step)
        assert self.transitions is not None and self.record is not None
        began, rate = time.perf_counter(), learning_rate_at(self.config, step)
        self.engine.begin(step, rate)
        rows, losses, parts = self.batches[self.position], [], []
        for micro in self.micro_batches(len(rows)):
            own = rows[micro]
            part = self.transitions.rows(own if len(own) else rows[:1])
            value, ratios = self._back_propagated(part, len(own) / len(rows))
            losses.append(value.double())
            parts.append(ratios[:, : len(own)])
        with phase("communication"):
            found = self.engine.world.gather(torch.cat(parts, dim=1))
            loss = self.engine.world.gather(torch.stack(losses).sum().view(1, 1)).sum()
        with phase("optimizer"):
            norm = self.engine.launch(rate, loss)
        with phase("logging"):
            figures = Arriving(self._figures(loss, norm, found), self.policy.device)
        self.position += 1
        self.seconds += time.perf_counter() - began
        self._close_round(len(rows))
        return partial(self._metrics, step, figures, rate, self.round, self.record.line.get("pairs_kept"))

    def _back_propagated(self, part: Transitions, share: float) -> tuple[Tensor, Tensor]:
        """``share`` of the loss of some transitions, whose gradient is there then, and their likelihood ratios."""
        piece, rows = self.objective.laid_out(part), self.objective.unet_rows(part)
        terms = partial(self.objective.terms, piece.shared)
        found, backward = self.differentiable("transitions", terms, self._scaled, piece.inputs, key=piece.shared)
        value, ratios = found
        assert value is not None and ratios is not None
        with phase("backward"):
            backward(torch.full_like(value, share))
        self.policy.forwards += 2 * rows
        self.policy.count_backward(rows)
        return value * share, piece.restored(ratios)

    def _scaled(self, value: Tensor, share: Tensor) -> None:
        self.engine.backward(value * share)

    def _next_round(self, step: int) -> None:
        """Roll out until a round has pairs.

        Raises:
            Interrupted: the run was asked to stop; nothing has changed.
            UserError: no pair in several rounds in a row.
        """
        before, gaps = (self.work(), self.round, dict(self.totals)), []
        for _ in range(_EMPTY_ROUNDS):
            try:
                with phase("rollout"):
                    found, selections = self._collect(step)
            except Interrupted:
                self.restore_work(before[0])
                _, self.round, self.totals = before
                raise
            self.transitions = found
            self.batches, self.position = self._split(len(found)), 0
            if self.batches:
                return
            gaps.append(torch.cat([selection.gap for selection in selections]))
        quantiles = gap_quantiles(torch.cat(gaps))
        shown = ", ".join(f"{place}: {'none' if gap is None else f'{gap:.3g}'}" for place, gap in quantiles.items())
        least = 2 * math.atanh(min(self.collector.theta))
        raise UserError(
            f"no pair of {_EMPTY_ROUNDS} rollouts is clear enough: the score gap's quantiles are {shown}, needed > "
            f"{least:.3g}",
            f"step {step + 1}",
            "lower score_threshold, or train the scorer further",
        )

    def _collect(self, step: int) -> tuple[Transitions, list[Selection]]:
        self.round += 1
        plan = self.order.batch(self.round)
        share = plan.indices[self.engine.world.share(len(plan.indices))]
        names = [self.prompts[i] for i in share]
        own = self.collector.collect(names, torch.from_numpy(share), plan.epoch)
        transitions, selections = self._pooled(own)
        self._book(step, own, selections, len(plan.indices), len(transitions))
        return transitions, selections

    def _pooled(self, own: Round) -> tuple[Transitions, list[Selection]]:
        """Transitions and verdicts of all ranks, in the order of the round's prompts."""
        scores = torch.stack([selection.scores for selection in own.selections])  # (S, n, K)
        flat = self.engine.world.gather(scores.transpose(1, 2).flatten(0, 1))  # (S·K, N)
        theta = self.collector.theta
        rows = flat.unflatten(0, (len(theta), -1)).transpose(1, 2)
        gathered = {
            name: self.engine.world.gather(tensor.flatten(1).T if tensor.ndim > 1 else tensor[None])
            .T.reshape(-1, *tensor.shape[1:])
            .contiguous()
            for name, tensor in own.transitions.tensors().items()
        }
        return Transitions(**gathered), [select(part, limit) for part, limit in zip(rows, theta, strict=True)]

    def _split(self, count: int) -> list[Tensor]:
        """Row numbers of the round's batches: shuffled, even, none left out."""
        if not count:
            return []
        shuffled = permute(np.arange(count), count, seed=self.config.seed, epoch=self.round, stream=_SHUFFLE)
        batches = max(1, round(count / self.config.batch_size))
        return list(torch.from_numpy(shuffled).tensor_split(batches))

    def _book(self, step: int, own: Round, selections: Sequence[Selection], prompts: int, transitions: int) -> None:
        assert self.record is not None
        sampler, theta = self.collector.sampler, self.collector.theta
        forwards = sum(self.engine.world.objects(own.unet_forwards))
        cost = {
            "unet_forwards": forwards,
            "seconds_rollout": own.seconds_rollout,
            "seconds_scoring": own.seconds_scoring,
            **{f"decoder_{name}": value for name, value in own.agreement.items()},
        }
        line = self.record.open_round(
            self.round, step, prompts, transitions, cost, sampler, theta, selections, own.sample, self.config.method
        )
        self._add(
            prompts=prompts,
            **{name: line[name] for name in ("pools", "pairs_kept", "pools_dropped_nan")},
            rollout_unet_forwards=forwards,
            seconds_rollout=own.seconds_rollout,
            seconds_scoring=own.seconds_scoring,
        )

    def _close_round(self, trained: int) -> None:
        self._add(transitions=trained)
        if self.position == len(self.batches) and self.record is not None:
            self.record.close_round(self.seconds)
            self._add(seconds_training=self.seconds)
            self.seconds = 0.0

    def _add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.totals[name] = self.totals.get(name, 0) + amount

    def _figures(self, loss: Tensor, norm: Tensor, ratios: Tensor) -> dict[str, Tensor]:
        winner, loser = ratios.double()
        clip = math.inf if self.config.ratio_clip is None else self.config.ratio_clip
        return {
            "loss": loss,
            "ratio_winner": winner.mean(),
            "ratio_loser": loser.mean(),
            "ratio_clipped": ((ratios.double() - 1).abs() > clip).double().mean(),
            "margin": (winner.log() - loser.log()).mean(),
            "accuracy": won(winner, loser).mean(),
            "grad_norm": norm,
        }

    def _metrics(
        self, step: int, figures: Arriving, rate: float, number: int, pairs_kept: int | None
    ) -> dict[str, Any]:
        found = self.checked(step, figures.read())
        norm = found.pop("grad_norm")
        return {"step": step + 1, "round": number, **found, "pairs_kept": pairs_kept, "grad_norm": norm, "lr": rate}


_TOTALS = (
    *("transitions", "prompts", "pools", "pairs_kept", "pools_dropped_nan", "rollout_unet_forwards"),
    *("seconds_rollout", "seconds_scoring", "seconds_training"),
)
