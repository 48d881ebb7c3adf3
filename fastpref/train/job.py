"""One training job: checks everything before it writes anything, trains with checkpoints, and exports the result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastpref.config import Config
from fastpref.config_rules import SCORER_METHODS, STEPWISE_METHODS
from fastpref.errors import UserError
from fastpref.models.loading import resolve_device, resolve_model_dir
from fastpref.models.work import Work
from fastpref.train.checkpoint import Checkpoint, newest_intact, save_checkpoint
from fastpref.train.profile import StepProfiler, phase
from fastpref.train.telemetry import (
    MetricsLog,
    StopRequest,
    check_tracker,
    peak_device_bytes,
    peak_rss_bytes,
    progress_bar,
)
from fastpref.train.trainer import Trainer
from fastpref.watch import Interrupted, Watch


class Stopped(Exception):
    """A signal ended the run after a checkpoint; the process exits with 128 + its number."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


@dataclass
class TrainJob:
    """The checked inputs of a run; :meth:`run` does it. Making one reads but never writes."""

    config: Config
    model_dir: Path
    device: torch.device
    trainer: Trainer
    began: float
    console: Console = field(default_factory=lambda: Console(stderr=True))
    seconds_before: float = 0.0

    @classmethod
    def open(cls, config: Config, console: Console | None = None) -> TrainJob:
        """Check the machinery, the model and what the method needs, and load what is trained.

        Raises:
            UserError: anything that would stop the run later and can be known now.
        """
        began = time.perf_counter()
        if config.engine == "deepspeed":
            raise UserError("engine deepspeed is not part of this release", "engine", "use engine=local")
        check_tracker(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model_dir = resolve_model_dir(config.model)
        for key in ("unet", "init_lora"):
            value = getattr(config, key)
            if value is not None and not Path(value).exists():
                raise UserError(f"{key}: no such file", value, "give a path on disk")
        device = resolve_device(config.device)
        trainer = _open_trainer(config, model_dir, device)
        console = console or Console(stderr=True)
        return cls(config, model_dir, device, trainer, began, console)

    def run(self, run_dir: Path) -> dict[str, Any]:
        """Train from scratch or from the newest intact checkpoint; returns the training part of ``summary.json``.

        Raises:
            Stopped: SIGTERM or Ctrl-C came; a checkpoint of the last finished step is on disk.
        """
        start, seconds = self._resume(run_dir)
        seconds = self._loop(run_dir, start, seconds)
        self.trainer.export(run_dir)
        return self._summary(seconds)

    def seconds_total(self) -> float:
        """Wall-clock seconds of this part of the run so far and of those before it."""
        return self.seconds_before + time.perf_counter() - self.began

    def _loop(self, run_dir: Path, start: int, before: float) -> float:
        config, trainer, began = self.config, self.trainer, time.perf_counter()
        log = MetricsLog(run_dir, config, start)
        bar = progress_bar(self.console)
        profiler = StepProfiler(config.profile, self.device, self.console)

        def spent() -> float:
            return before + time.perf_counter() - began

        def save(step: int) -> None:
            log.sync()
            tensors, values = trainer.engine.state()
            more, values["trainer"] = trainer.state()
            tensors |= {f"trainer.{name}": tensor for name, tensor in more.items()}
            values |= {"counts": list(astuple(trainer.work())), "seconds": spent(), "skipped": trainer.skipped}
            values["seconds_total"] = self.seconds_total()
            save_checkpoint(run_dir / "checkpoints", step, tensors, values, config.keep_checkpoints)

        waiting: Callable[[], dict[str, Any]] | None = None
        read_at = began

        def read() -> None:
            """Log the step before, whose figures have arrived by now."""
            nonlocal waiting, read_at
            if waiting is None:
                return
            arrive, waiting = waiting, None
            metrics, now = arrive(), time.perf_counter()
            metrics["seconds"], read_at = now - read_at, now
            with phase("logging"):
                if metrics["step"] % config.log_every == 0 or metrics["step"] == config.steps:
                    log.write(metrics)
                bar.update(task, advance=1, note=_note(metrics))

        with bar, StopRequest() as stop:
            task = bar.add_task(f"train {config.method}", total=config.steps, completed=start, note="")
            watch = Watch(lambda note: bar.update(task, note=note), lambda: stop.signal is not None)
            trainer.begin(run_dir, watch)
            read_at = time.perf_counter()
            for step in range(start, config.steps):
                with profiler.step():
                    try:
                        launched = trainer.launch(step)
                    except Interrupted:
                        assert stop.signal is not None
                        read()
                        save(step)
                        log.close()
                        raise Stopped(stop.signal) from None
                    read()
                    waiting, done = launched, step + 1
                    stopped_by, last = stop.signal, done == config.steps
                    due = last or stopped_by is not None or done % config.checkpoint_every == 0
                    if due:
                        read()
                profiler.close(run_dir, last=last)
                if due:
                    save(done)
                if stopped_by is not None:
                    log.close()
                    raise Stopped(stopped_by)
        log.close()
        return spent()

    def _resume(self, run_dir: Path) -> tuple[int, float]:
        """Put back the newest intact checkpoint; (steps done, seconds spent)."""
        for found in newest_intact(run_dir / "checkpoints"):
            if isinstance(found, Checkpoint):
                return self._restore(found)
            path, fault = found
            self.console.print(f"damaged checkpoint {path}: {fault}; using the one before it", style="yellow")
            shutil.move(path, path.with_name(f"damaged-{path.name}-{int(time.time())}"))
        return 0, 0.0

    def _restore(self, checkpoint: Checkpoint) -> tuple[int, float]:
        if checkpoint.step > self.config.steps:
            raise UserError(
                f"the checkpoint is at step {checkpoint.step}", str(checkpoint.path), "set steps above that"
            )
        try:
            self.trainer.engine.load_state(checkpoint.tensors, checkpoint.values)
            own = {k.removeprefix("trainer."): v for k, v in checkpoint.tensors.items() if k.startswith("trainer.")}
            self.trainer.load_state(own, checkpoint.values.get("trainer", {}))
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError("the checkpoint does not fit this model", str(checkpoint.path), str(error)) from error
        self.trainer.restore_work(Work(*checkpoint.values["counts"]))
        self.trainer.skipped = checkpoint.values["skipped"]
        self.seconds_before = float(checkpoint.values.get("seconds_total", checkpoint.values["seconds"]))
        self.console.print(f"resuming after step {checkpoint.step}")
        return checkpoint.step, float(checkpoint.values["seconds"])

    def _summary(self, seconds: float) -> dict[str, Any]:
        figures = self.trainer.figures(self.config.steps)
        return {
            "method": self.config.method,
            "steps": self.config.steps,
            **figures,
            "seconds_train": seconds,
            "samples_per_second": figures["samples_seen"] / seconds if seconds else None,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": peak_device_bytes(self.device),
            "world_size": 1,
            **asdict(self.trainer.work()),
            "skipped_steps": self.trainer.skipped,
        }


def _open_trainer(config: Config, model_dir: Path, device: torch.device) -> Trainer:
    if config.method in STEPWISE_METHODS:
        from fastpref.train import stepwise

        return stepwise.open_trainer(config, model_dir, device)
    if config.method in SCORER_METHODS:
        from fastpref.train import step_preference

        return step_preference.open_trainer(config, model_dir, device)
    from fastpref.train import offline

    return offline.open_trainer(config, model_dir, device)


def _note(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.4f}"]
    if metrics["accuracy"] is not None:
        parts.append(f"acc {metrics['accuracy']:.2f}")
    return " ".join(parts)
