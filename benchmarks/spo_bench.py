"""The two sides that spo_vs_reference.py runs by turns on the same models, and their parts, each timed alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from devices import seconds, wait
from literal_spo import Clock, LiteralSPO, as_prompts
from spo_vs_reference_report import ROLLOUT, SCORING, SPANS, TRAINING

import fastpref.rollout.pool as pool
from fastpref.config import Config
from fastpref.models.guidance import GuidedRows
from fastpref.models.loading import model_dir_of, resolve_device
from fastpref.models.work import Work
from fastpref.rollout.step_scorers import PreferenceScorer
from fastpref.train.engine import LocalEngine
from fastpref.train.stepwise import open_trainer
from fastpref.watch import Watch


@dataclass
class Outcome:
    """What one side's round came to."""

    seconds: dict[str, float]  # by phase, and total
    clock: Clock
    losses: list[float]
    pairs: list[tuple[int, int]]  # (place of the prompt, step)
    sides: torch.Tensor  # (2, M, C, h, w): winners and losers


class Bench:
    """Both sides on the same models.

    Args:
        std: of what is added to the LoRA's weights before the first step; 0 is where a run starts.
    """

    def __init__(self, config: Config, prompts: int, folder: Path, std: float = 0.0) -> None:
        self.config = config.model_copy(update={"rollout_prompts": prompts})
        self.device = resolve_device(config.device)
        self.trainer = open_trainer(self.config, model_dir_of(config), self.device)
        trainable = list(self.trainer.policy.trainable.values())
        generator = torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            for parameter in trainable:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(std * noise.to(self.device))
        self.weights = [parameter.detach().clone() for parameter in trainable]
        self.trainer.begin(folder, Watch())
        self.literal = LiteralSPO(self.trainer)
        plan = self.trainer.order.batch(0)
        self.numbers, self.epoch = [int(i) for i in plan.indices], plan.epoch
        self.prompts = [self.trainer.prompts[i] for i in self.numbers]

    def ours(self) -> Outcome:
        """A round as ``fastpref train`` does it."""
        trainer, clock, lines = self._fresh(), Clock(), []
        with watched(trainer, clock):
            began = time.perf_counter()
            trainer._next_round(0)
            wait(self.device)
            rolled = time.perf_counter()
            while trainer.position < len(trainer.batches):
                lines.append(trainer.step(len(lines)))
            wait(self.device)
            ended = time.perf_counter()
        scoring = trainer.totals["seconds_scoring"]
        seconds = {ROLLOUT: rolled - began - scoring, SCORING: scoring, TRAINING: ended - rolled}
        seconds["total"] = ended - began
        found, place = trainer.transitions, {number: i for i, number in enumerate(self.numbers)}
        assert found is not None
        pairs = [(place[int(n)], int(step)) for n, step in zip(found.prompt, found.step, strict=True)]
        sides = torch.stack([found.x_w, found.x_l]).cpu()
        return Outcome(seconds, clock, [line["loss"] for line in lines], pairs, sides)

    def other(self) -> Outcome:
        """The same round by the literal order of work, in the batches that ours splits it into."""
        self.literal.start(self.weights)
        self.trainer.round = 0  # whose shuffling it is
        began = time.perf_counter()
        found = self.literal.round(self.prompts, self.epoch)
        wait(self.device)
        rolled = time.perf_counter()
        lines = self.literal.train(found, self.trainer._split(len(found)))
        wait(self.device)
        ended, clock = time.perf_counter(), self.literal.clock
        scoring = sum(clock.seconds[name] for name, (phase, *_) in SPANS.items() if phase == SCORING)
        seconds = {ROLLOUT: rolled - began - scoring, SCORING: scoring, TRAINING: ended - rolled}
        pairs = list(zip(found.prompt.cpu().tolist(), found.step.cpu().tolist(), strict=True))
        sides = torch.stack([found.x_w, found.x_l]).cpu()
        return Outcome(seconds | {"total": ended - began}, clock, [line["loss"] for line in lines], pairs, sides)

    def _fresh(self) -> Any:
        """The trainer as at the start of a run."""
        trainer, scorer = self.trainer, self.trainer.collector.scorer
        assert isinstance(scorer, PreferenceScorer)
        with torch.no_grad():
            for parameter, weight in zip(trainer.policy.trainable.values(), self.weights, strict=True):
                parameter.copy_(weight)
        trainer.engine = LocalEngine(trainer.policy, self.config)
        trainer.load_state({}, {"round": -1, "position": 0, "totals": {}, "seconds": 0.0})
        trainer.restore_work(Work())
        trainer.collector.book._known.clear()
        scorer._known.clear()
        return trainer

    def parts(self) -> dict[str, tuple[int, Callable[[], Any]]]:
        """What is timed alone: rows of a call, and the call, at the sizes that the round has."""
        ours, literal, config = self.trainer, self.literal, self.config
        scorer, book, policy = ours.collector.scorer, ours.collector.book, ours.policy
        assert isinstance(scorer, PreferenceScorer)
        n, k, m = min(config.rollout_batch_size, len(self.prompts)), config.candidates, config.batch_size
        pool_rows, chunk = n * k, min(config.decode_batch_size, n * k)
        x = torch.randn(max(pool_rows, m), *ours.collector.shape, dtype=ours.collector.dtype, device=self.device)
        t = torch.full((len(x),), ours.collector.sampler.score_timesteps[0], device=self.device)
        texts = [self.prompts[i % len(self.prompts)] for i in range(len(x))]
        known = book.conditioning(texts)
        prompts = as_prompts(known.prompt_embeds, known.pooled_prompt_embeds)
        images, tokens, few = literal.decode(x), literal.tokens(texts), texts[: max(1, chunk // k)]

        def rows(predict: Any, count: int) -> Callable[[], Any]:
            guided = GuidedRows(predict, book.conditioning(texts[:count]), book.empty(), config.guidance_scale)
            return lambda: guided(x[:count], t[:count])

        def theirs(unet: Any, count: int) -> Callable[[], Any]:
            return lambda: literal.guided(unet, x[:count], t[:count], prompts.rows(torch.arange(count)))

        def both(forward: Callable[[], Any] = rows(policy.predict, m)) -> None:  # noqa: B008
            with torch.enable_grad():
                torch.stack([branch.square().mean() for branch in forward()]).sum().backward()
            ours.engine.discard()

        return {
            "UNet, LoRA beside": (2 * pool_rows, theirs(literal.policy, pool_rows)),
            "UNet, LoRA merged": (2 * pool_rows, rows(policy.predict, pool_rows)),
            "UNet forward + backward": (2 * m, both),
            "reference, full copy": (2 * m, theirs(literal.reference, m)),
            "reference, LoRA off": (2 * m, rows(policy.predict_reference, m)),
            "VAE decode, a step's candidates": (pool_rows, lambda: literal.decode(x[:pool_rows])),
            "VAE decode, in chunks": (chunk, lambda: scorer.decoder.images(x[:chunk])),
            "SPM image, unfolded": (pool_rows, lambda: literal.scorer.embed_images(images[:pool_rows], t[:pool_rows])),
            "SPM image, folded": (chunk, lambda: scorer.model.embed_images(images[:chunk], t[:chunk].cpu())),
            "SPM text, each candidate": (pool_rows, lambda: literal.captions(tokens[:pool_rows])),
            "SPM text, each prompt": (len(few), lambda: scorer.model.embed_texts(few)),
            "text encoders, a batch": (n, lambda: book.texts.encode(texts[:n])),
            "text encoders, one prompt": (1, lambda: book.texts.encode(texts[:1])),
        }

    @torch.no_grad()
    def time_parts(self, calls: int = 3) -> dict[str, float]:
        """Milliseconds a row of each part, the median of ``calls``."""
        found = {}
        for name, (rows, call) in self.parts().items():
            with self.trainer.policy.merged() if name == "UNet, LoRA merged" else ExitStack():
                call()
                times = [seconds(call, self.device) for _ in range(calls)]
            found[name] = 1000 * median(times) / rows
        return found


@contextmanager
def watched(trainer: Any, clock: Clock) -> Iterator[None]:
    """Inside, the trainer's parts book their time and rows."""
    collector = trainer.collector

    def length(*args: Any) -> int:
        return len(args[0])

    def unet(*_: Any) -> str:
        return "policy forward" if torch.is_grad_enabled() else "UNet of the rollout"

    parts: list[tuple[Any, str, Any, Any]] = [
        (trainer.policy, "forward_pass", unet, length),
        (trainer.policy, "reference_pass", "reference forward", length),
        (trainer.policy, "count_backward", "rows of the backward", lambda rows: rows),
        (trainer.engine, "backward", "backward", None),
        (trainer.objective, "_compare", "loss", None),
        (trainer.engine, "launch", "optimizer", None),
        (collector.scorer.decoder, "images", "VAE decode", length),
        (collector.scorer.model, "embed_images", "preference model, image", length),
        (collector.scorer.model, "embed_texts", "preference model, text", length),
        (collector.book.texts, "encode", "text encoders", length),
        (pool, "ddim_pool_step", "noise and steps", None),
        (pool, "predict_x0", "noise and steps", None),
    ]
    with ExitStack() as stack:
        for owner, name, label, rows in parts:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), clock, label, rows)))
        yield
    clock.rows["backward"] = clock.rows.pop("rows of the backward")


def timed(plain: Any, clock: Clock, label: Any, rows: Any) -> Any:
    """``plain``, booked under ``label`` (or what it returns for the arguments) with ``rows`` of the arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.span(label(*args) if callable(label) else label, rows(*args) if rows else 0):
            return plain(*args, **kwargs)

    return call
