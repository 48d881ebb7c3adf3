"""One training job: checks everything before it writes anything, trains with checkpoints, and exports the result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from fastpref.atomic import make_directory
from fastpref.config import Config
from fastpref.config_rules import SCORER_METHODS, STEPWISE_METHODS
from fastpref.errors import UserError
from fastpref.memory import peak_device_bytes, peak_rss_bytes
from fastpref.models.loading import model_dir_of, resolve_device
from fastpref.models.work import Work
from fastpref.train.best import BestCheckpoint, export_best
from fastpref.train.checkpoint import Checkpoint, load_checkpoint, newest_intact
from fastpref.train.checkpoint_writer import CheckpointWriter
from fastpref.train.optim import rate_jump
from fastpref.train.profile import StepProfiler, phase
from fastpref.train.telemetry import (
    MetricsLog,
    StopRequest,
    check_tracker,
    progress_bar,
)
from fastpref.train.trainer import Trainer
from fastpref.train.world import World
from fastpref.watch import Interrupted, Watch


class Stopped(Exception):
    """A signal ended the run after a checkpoint; the process exits with 128 + its number."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


class Launched(NamedTuple):
    """A step under way: what waits for its metrics, and the seconds of the loop's turn that launched it."""

    metrics: Callable[[], dict[str, Any]]
    seconds: float


@dataclass
class TrainJob:
    """The checked inputs of a run; :meth:`run` does it. Making one reads but never writes."""

    config: Config
    model_dir: Path
    device: torch.device
    trainer: Trainer
    began: float
    console: Console = field(default_factory=lambda: Console(stderr=True))
    world: World = field(default_factory=World)
    seconds_before: float = 0.0

    def __post_init__(self) -> None:
        self.best = BestCheckpoint(self.config.keep_best)

    @classmethod
    def open(cls, config: Config, console: Console | None = None, world: World | None = None) -> TrainJob:
        """Check the machinery, the model and what the method needs, and load what is trained.

        Raises:
            UserError: anything that would stop the run later and can be known now.
        """
        began, world = time.perf_counter(), world or World()
        _check_ranks(config, world)
        check_tracker(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model_dir = model_dir_of(config)
        for key in ("unet", "init_lora"):
            value = getattr(config, key)
            if value is not None and not Path(value).exists():
                raise UserError(f"{key}: no such file", value, "give a path on disk")
        device = resolve_device(config.device)
        trainer = _open_trainer(config, model_dir, device, world)
        console = console or Console(stderr=True, quiet=not world.is_main)
        for warning in trainer.warnings() if world.is_main else ():
            console.print(warning, style="yellow", markup=False, soft_wrap=True)
        if trainer.unrecorded is not None:
            console.print(trainer.unrecorded, markup=False, soft_wrap=True)
        return cls(config, model_dir, device, trainer, began, console, world)

    def run(self, run_dir: Path) -> dict[str, Any]:
        """Train from scratch or from the newest intact checkpoint; returns the training part of ``summary.json``.

        Raises:
            Stopped: SIGTERM or Ctrl-C came; a checkpoint of the last finished step is on disk.
        """
        start, seconds = self._resume(run_dir)
        seconds = self._loop(run_dir, start, seconds)
        self._check_trained()
        with self.trainer.engine.whole(), self.world.together():
            if self.world.is_main:
                self.trainer.export(run_dir)
        best = export_best(self.best, self.trainer, run_dir, self.config.steps)
        return self._summary(seconds) | {"best_checkpoint": best}

    def _check_trained(self) -> None:
        """Without one step that was applied there is nothing to export."""
        if self.trainer.skipped >= self.config.steps:
            why = "each had a loss or gradient that is not finite, so nothing is exported"
            error = UserError(
                f"none of {self.config.steps} steps was applied: {why}",
                str(self.config.run_dir),
                "check the model's weights, lower learning_rate, or use precision=fp32 or more steps",
            )
            error.shared = True
            raise error

    def seconds_total(self) -> float:
        """Wall-clock seconds of this part of the run so far and of those before it."""
        return self.seconds_before + time.perf_counter() - self.began

    def _loop(self, run_dir: Path, start: int, before: float) -> float:
        config, trainer, began = self.config, self.trainer, time.perf_counter()
        log = MetricsLog(run_dir, config, start, writes=self.world.is_main)
        bar = progress_bar(self.console)
        profiler = StepProfiler(config.profile and self.world.is_main, self.device, self.console)
        writer = CheckpointWriter(run_dir / "checkpoints", config, self.world, start, log.sync, self.console)

        def spent() -> float:
            return before + time.perf_counter() - began

        launched: Launched | None = None
        newest: dict[str, Any] = {}  # metrics that were read

        def tell(advance: int = 0) -> None:
            bar.update(task, advance=advance, note=_note(newest, writer.saved))

        def read() -> None:
            """Log the newest step that was launched; by the time the one after it is, its figures have arrived."""
            nonlocal launched, newest
            if launched is None:
                return
            newest, launched = {**launched.metrics(), "seconds": launched.seconds}, None
            self.best.add(newest)
            with phase("logging"):
                if newest["step"] % config.log_every == 0 or newest["step"] == config.steps:
                    log.write(newest)
                tell(advance=1)

        with bar, StopRequest() as stop, closing(trainer), writer:
            wait = "compiling, which takes a while" if config.compile else ""
            task = bar.add_task(f"train {config.method}", total=config.steps, completed=start, note=wait)
            alone = self.world.size == 1  # ranks stop together, between two steps
            watch = Watch(
                note=lambda note: bar.update(task, note=note),
                line=lambda line: self.console.print(line, markup=False, soft_wrap=True),
                stopping=lambda: alone and stop.signal is not None,
            )
            trainer.begin(run_dir, watch)
            for step in range(start, config.steps):
                self.world.beat(step)
                with profiler.step():
                    tick = time.perf_counter()
                    try:
                        metrics = trainer.launch(step)
                    except Interrupted:
                        assert stop.signal is not None
                        read()
                        self._save(writer, run_dir, step, spent(), wait=True)
                        log.close()
                        raise Stopped(stop.signal) from None
                    read()
                    stopped_by, done = self.world.most(stop.signal or 0), step + 1
                    last = done == config.steps
                    planned = last or done % config.checkpoint_every == 0
                    due = planned or bool(stopped_by)
                    if due:
                        metrics = partial(dict, metrics())
                    launched = Launched(metrics, time.perf_counter() - tick)
                    if due:
                        read()
                profiler.close(run_dir, last=last)
                if planned:
                    self.best.close(done)
                if due:
                    self._save(writer, run_dir, done, spent(), wait=last or bool(stopped_by))
                    tell()
                else:
                    writer.look()
                if stopped_by:
                    log.close()
                    raise Stopped(stopped_by)
        log.close()
        return spent()

    def _save(self, writer: CheckpointWriter, run_dir: Path, step: int, seconds: float, *, wait: bool) -> None:
        trainer, world = self.trainer, self.world
        state, values = trainer.engine.state()
        more, values["trainer"] = trainer.state()
        tensors = {**state, **{f"trainer.{name}": tensor for name, tensor in more.items() if world.is_main}}
        values |= {"counts": list(astuple(self._work())), "seconds": seconds, "skipped": trainer.skipped}
        values["steps"] = self.config.steps
        values |= {"seconds_total": self.seconds_total(), "layout": trainer.engine.layout, "best": self.best.state()}
        writer.save(step, tensors, values, spared=self.best.step, wait=wait)
        if self.config.export_checkpoints and trainer.skipped < step:  # else nothing is trained yet
            self._export(run_dir / "exports", step)

    def _export(self, folder: Path, step: int) -> None:
        """The weights of a checkpoint, as they are exported at the end."""
        with self.trainer.engine.whole(), self.world.together():
            if self.world.is_main:
                make_directory(folder / f"step-{step:06d}")
                self.trainer.export(folder / f"step-{step:06d}")
                for old in sorted(folder.glob("step-*"))[: -self.config.keep_checkpoints]:
                    shutil.rmtree(old, ignore_errors=True)

    def _work(self) -> Work:
        """Of all ranks."""
        return Work.sum([Work(*counts) for counts in self.world.objects(list(astuple(self.trainer.work())))])

    def _resume(self, run_dir: Path) -> tuple[int, float]:
        """Put back the newest intact checkpoint; (steps done, seconds spent)."""
        with self.world.together():
            found = self._newest(run_dir) if self.world.is_main else None
        path = self.world.from_main(None if found is None else str(found.path))
        if path is None:
            return 0, 0.0
        with self.world.together():
            return self._restore(found or load_checkpoint(Path(path), verify=False))

    def _newest(self, run_dir: Path) -> Checkpoint | None:
        for found in newest_intact(run_dir / "checkpoints"):
            if isinstance(found, Checkpoint):
                return found
            path, fault = found
            self.console.print(f"damaged checkpoint {path}: {fault}; using the one before it", style="yellow")
            shutil.move(path, path.with_name(f"damaged-{path.name}-{int(time.time())}"))
        return None

    def _restore(self, checkpoint: Checkpoint) -> tuple[int, float]:
        if checkpoint.step > self.config.steps:
            raise UserError(
                f"the checkpoint is at step {checkpoint.step}", str(checkpoint.path), "set steps above that"
            )
        try:
            self.trainer.engine.load_state(checkpoint.tensors, checkpoint.values)
            stored = checkpoint.tensors
            own = {name.removeprefix("trainer."): stored[name] for name in stored if name.startswith("trainer.")}
            self.trainer.load_state(own, checkpoint.values.get("trainer", {}))
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError("the checkpoint does not fit this model", str(checkpoint.path), str(error)) from error
        self.trainer.restore_work(Work(*checkpoint.values["counts"]) if self.world.is_main else Work())
        self.trainer.skipped = checkpoint.values["skipped"]
        if lost := self.best.load_state(checkpoint.values.get("best", {}), checkpoint.path.parent):
            self.console.print(lost, style="yellow")
        self.seconds_before = float(checkpoint.values.get("seconds_total", checkpoint.values["seconds"]))
        self.console.print(f"resuming after step {checkpoint.step}")
        if jump := rate_jump(self.config, checkpoint.step, checkpoint.values.get("steps")):
            self.console.print(jump, style="yellow")
        before, now = checkpoint.values.get("layout"), self.trainer.engine.layout
        if before not in (None, now):
            self.console.print(f"saved by {before}, going on as {now}: equal to rounding, not bit for bit")
        return checkpoint.step, float(checkpoint.values["seconds"])

    def _summary(self, seconds: float) -> dict[str, Any]:
        figures = self.trainer.figures(self.config.steps)
        return {
            "method": self.config.method,
            "steps": self.config.steps,
            **figures,
            "seconds_train": seconds,
            "samples_per_second": figures["samples_seen"] / seconds if seconds else None,
            "peak_rss_bytes": self.world.most(peak_rss_bytes()),
            "peak_device_bytes": self.world.most(peak_device_bytes(self.device)),
            "world_size": self.world.size,
            **asdict(self._work()),
            "skipped_steps": self.trainer.skipped,
            "gradient_checkpointing": self.config.gradient_checkpointing,
        }


def _check_ranks(config: Config, world: World) -> None:
    """Every rank gets the same number of rows: ranks wait for each other in every forward."""
    key = "rollout_prompts" if config.method in STEPWISE_METHODS else "batch_size"
    count = getattr(config, key)
    if count < world.size:
        raise UserError(f"{world.size} ranks for {key} {count}", key, f"use at most {count} ranks, or raise it")
    if count % world.size:
        todo = f"use {count // world.size * world.size} or {(count // world.size + 1) * world.size}"
        raise UserError(f"{key} is {count}, no multiple of the {world.size} ranks", key, todo)


def _open_trainer(config: Config, model_dir: Path, device: torch.device, world: World) -> Trainer:
    if config.method in STEPWISE_METHODS:
        from fastpref.train import stepwise

        return stepwise.open_trainer(config, model_dir, device, world)
    if config.method in SCORER_METHODS:
        from fastpref.train import step_preference

        return step_preference.open_trainer(config, model_dir, device, world)
    from fastpref.train import offline

    return offline.open_trainer(config, model_dir, device, world)


def _note(metrics: dict[str, Any], saved: int) -> str:
    parts = [f"loss {metrics['loss']:.4f}"]
    if metrics["accuracy"] is not None:
        parts.append(f"acc {metrics['accuracy']:.2f}")
    if saved:
        parts.append(f"saved {saved}")
    return " ".join(parts)
