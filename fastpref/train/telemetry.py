"""What a run says about itself: metrics.jsonl, live curves, a progress line, and the numbers of summary.json."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastpref.atomic import write_bytes
from fastpref.config import Config
from fastpref.errors import UserError


class MetricsLog:
    """One JSON object a logged step in ``metrics.jsonl``, and the same numbers to the tracker.

    On resume, lines after the checkpoint's step are cut off, so the file reads as if nothing had happened. Of several
    ranks one ``writes``.
    """

    def __init__(self, run_dir: Path, config: Config, start: int, *, writes: bool = True) -> None:
        self.writes = writes
        if not writes:
            return
        self.path = run_dir / "metrics.jsonl"
        _keep_until(self.path, start)
        self._tracker = _tracker(config, run_dir, start)
        self._stream = self.path.open("a")

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one step. NaN and infinity become null: they are not JSON."""
        if not self.writes:
            return
        clean = {k: (None if isinstance(v, float) and not _finite(v) else v) for k, v in metrics.items()}
        self._stream.write(json.dumps(clean) + "\n")
        self._stream.flush()
        self._tracker({k: v for k, v in clean.items() if v is not None})

    def sync(self) -> None:
        """Put what was written on disk; a checkpoint of a step comes after its line."""
        if self.writes:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        if self.writes:
            self._stream.close()


def progress_bar(console: Console | None = None) -> Progress:
    """The one look of all long work: what, bar, count, elapsed, ETA."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        refresh_per_second=2,
    )


class StopRequest:
    """SIGTERM or Ctrl-C asks the loop to stop after its step; a second one kills as usual."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, self._before[number])
        sys.stderr.write(f"\n{signal.Signals(number).name}: finishing the step, then a checkpoint\n")


def check_tracker(config: Config) -> None:
    """Raise :class:`UserError` if the tracker of a recipe is not installed."""
    if config.tracker == "wandb" and not _installed("wandb"):
        raise UserError("tracker wandb needs wandb", "tracker", "pip install 'fastpref[tracking]'")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was put aside, as tests do
        return False


def _tracker(config: Config, run_dir: Path, start: int) -> Any:
    if config.tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start or None)

        def to_tensorboard(metrics: dict[str, Any]) -> None:
            for key, value in metrics.items():
                if key != "step":
                    writer.add_scalar(key, value, metrics["step"])

        return to_tensorboard
    if config.tracker == "wandb":
        import wandb

        run = wandb.init(project="fastpref", name=config.name, dir=str(run_dir), config=config.model_dump(mode="json"))
        return lambda metrics: run.log(metrics, step=metrics["step"])
    return lambda metrics: None


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept, damaged = [], 0
    for number, line in enumerate(_read_lines(path), 1):
        try:
            if json.loads(line)["step"] > step:
                continue
        except (ValueError, KeyError, TypeError):
            damaged = damaged or number  # cut by a kill, unless lines of before the checkpoint follow
            continue
        if damaged:
            todo = "restore the file, or delete it to go on without what it says so far"
            raise UserError(f"line {damaged} of the metrics is damaged", str(path), todo)
        kept.append(line)
    write_bytes(path, b"".join(line + b"\n" for line in kept))


def _read_lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise UserError("cannot read the metrics", str(path), error.strerror or str(error)) from error


def _finite(value: float) -> bool:
    return value - value == 0.0
