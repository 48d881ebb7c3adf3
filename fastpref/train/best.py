"""Which checkpoint is the best: by the mean of a training metric over the steps since the checkpoint before it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastpref.atomic import make_directory
from fastpref.errors import UserError
from fastpref.train.checkpoint import Checkpoint, DamagedCheckpoint, checkpoint_folder, load_checkpoint
from fastpref.train.trainer import Trainer

FOLDER = "best"  # in the run directory
_SIGNS = {"loss": -1.0, "accuracy": 1.0, "margin": 1.0}  # of what is better


class BestCheckpoint:
    """Averages the metrics of every step and compares the checkpoints.

    The metrics are those of the global batch, so the means do not depend on how it is cut, and the sums are kept in the
    checkpoints. A step whose metric is not finite does not count.

    Args:
        metric: ``loss`` (lowest), ``accuracy`` or ``margin`` (highest); None: no checkpoint is the best.

    Attributes:
        found: ``{step, metric, value}`` of the best so far.
    """

    def __init__(self, metric: str | None) -> None:
        self.metric = metric
        self.found: dict[str, Any] | None = None
        self._sums = _no_sums()

    @property
    def step(self) -> int | None:
        """Of the best so far."""
        return None if self.found is None else self.found["step"]

    def add(self, metrics: dict[str, Any]) -> None:
        """One step."""
        for name, total in self._sums.items():
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                total[0] += value
                total[1] += 1

    def close(self, step: int) -> None:
        """The checkpoint of ``step`` is due: compare it, and average anew. Of equals the first is the best."""
        if self.metric is not None and self._sums[self.metric][1]:
            total, count = self._sums[self.metric]
            value, sign = total / count, _SIGNS[self.metric]
            if self.found is None or sign * value > sign * self.found["value"]:
                self.found = {"step": step, "metric": self.metric, "value": value}
        self._sums = _no_sums()

    def state(self) -> dict[str, Any]:
        """JSON values for :meth:`load_state`."""
        return {"found": self.found, "sums": self._sums}

    def load_state(self, values: dict[str, Any], folder: Path) -> str:
        """Go on from a checkpoint in ``folder``; what was lost on the way, in words, or nothing.

        What was the best by another metric is none any more, nor is what is not there any more: the checkpoint that
        took its place was damaged since.
        """
        self._sums, self.found = values.get("sums") or _no_sums(), values.get("found")
        if self.found is None or self.found["metric"] != self.metric:
            self.found = None
        elif not (path := checkpoint_folder(folder, self.found["step"])).is_dir():
            self.found = None
            return f"{path}, the best so far, is not there any more: looking for the best from here on"
        return ""


def export_best(best: BestCheckpoint, trainer: Trainer, run_dir: Path, steps: int) -> dict[str, Any] | None:
    """Write the weights of the best checkpoint to ``best/``, as those of the last of ``steps`` are exported.

    Every rank has to come here, when training is over: the trained weights may be that checkpoint's afterwards.
    Returns ``{step, metric, value}``, None if no checkpoint is the best.

    Raises:
        UserError: the checkpoint is damaged.
    """
    engine, world = trainer.engine, trainer.engine.world
    found = world.from_main(best.found)
    if found is None:
        return None
    if found["step"] != steps:
        path = checkpoint_folder(run_dir / "checkpoints", found["step"])
        with world.together():
            checkpoint = _opened(path, verify=world.is_main)
        engine.load_state(checkpoint.tensors, checkpoint.values)
    with engine.whole(), world.together():
        if world.is_main:
            make_directory(run_dir / FOLDER)
            trainer.export(run_dir / FOLDER)
    return found


def _opened(path: Path, *, verify: bool) -> Checkpoint:
    try:
        return load_checkpoint(path, verify=verify)
    except DamagedCheckpoint as fault:
        todo = f"{fault}; resume=auto keep_best=null leaves it out"
        raise UserError("the best checkpoint is damaged", str(path), todo) from fault


def _no_sums() -> dict[str, list[float]]:
    return {name: [0.0, 0] for name in _SIGNS}
