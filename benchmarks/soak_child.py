"""``fastpref train`` that says, in memory shared with soak.py, which phase it is in.

    python benchmarks/soak_child.py MARKS CONFIG [KEY=VALUE …]

``MARKS`` is a folder with a file ``rank-N`` for every rank: :class:`Marks`.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Phase → the functions in which it is.
PHASES = {
    "opening": ("fastpref.train.job:_open_trainer",),
    "data": (
        "fastpref.data.sampling:Sampler.batch",
        "fastpref.train.loader:Loader.take",
        "fastpref.train.batch:BatchBuilder.build",
    ),
    "forward": ("fastpref.models.policy:Policy.forward_pass",),
    "backward": (
        "fastpref.train.engine:LocalEngine.backward",
        "fastpref.train.deepspeed_engine:ShardedEngine.backward",
    ),
    "optimizer": ("fastpref.train.engine:LocalEngine.launch", "fastpref.train.deepspeed_engine:ShardedEngine.launch"),
    "checkpoint": (
        "fastpref.train.checkpoint_writer:CheckpointWriter.save",
        "fastpref.train.checkpoint_writer:CheckpointWriter.commit",
        "fastpref.train.checkpoint_writer:CheckpointWriter.write",
    ),
    "rollout": ("fastpref.rollout.collect:Collector.collect",),
    "scoring": ("fastpref.rollout.queue:ScoringQueue.results",),
    "training": ("fastpref.train.transitions:TransitionObjective.loss",),
    "export": ("fastpref.train.trainer:PolicyTrainer.export",),
}
BESIDE = "checkpoint"  # the one phase that may be in another thread for longer than a moment
ELSEWHERE = "elsewhere"  # between the phases: imports, the loss, the metrics, the summary
_NAMES = [ELSEWHERE, *PHASES]
_PID, _PHASE, _PARENT, _BESIDE, _COUNTS = range(5)
_LONGEST = _COUNTS + len(_NAMES)


class Marks:
    """What a rank tells: its process, its phase, how often each was entered, and the longest stay in nanoseconds."""

    def __init__(self, file: Path, create: bool = False) -> None:
        self._table = np.memmap(file, np.int64, "w+" if create else "r+", shape=(_LONGEST + len(_NAMES),))

    def begin(self) -> None:
        """Called by the rank."""
        self._table[_PID] = os.getpid()

    @property
    def pid(self) -> int:
        """0 until the rank runs."""
        return int(self._table[_PID])

    @property
    def phase(self) -> str:
        """The one that the rank is in, or died in."""
        return _NAMES[int(self._table[_PHASE])]

    @property
    def parent(self) -> str:
        """The one in which it came to that: a forward is in a rollout or in a training step."""
        return _NAMES[int(self._table[_PARENT])]

    @property
    def beside(self) -> str:
        """The one in which another thread of the rank is, or was."""
        return _NAMES[int(self._table[_BESIDE])]

    def entered(self, phase: str) -> int:
        """How often the rank came there."""
        return int(self._table[_COUNTS + _NAMES.index(phase)])

    def longest(self, phase: str) -> float:
        """Seconds."""
        return float(self._table[_LONGEST + _NAMES.index(phase)]) / 1e9

    def marked(self, phase: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        """``plain``, telling about itself; of what other threads do, only how often, but for :data:`BESIDE`."""
        number = _NAMES.index(phase)

        @functools.wraps(plain)
        def telling(*arguments: Any, **keywords: Any) -> Any:
            table = self._table
            table[_COUNTS + number] += 1
            main = threading.current_thread() is threading.main_thread()
            if not main and phase != BESIDE:
                return plain(*arguments, **keywords)
            places = [_PHASE, _PARENT] if main else [_BESIDE]
            before, began = table[places], time.perf_counter_ns()
            table[places] = [number, before[0]] if main else number
            try:
                return plain(*arguments, **keywords)
            finally:
                table[_LONGEST + number] = max(int(table[_LONGEST + number]), time.perf_counter_ns() - began)
                table[places] = before

        return telling


def main() -> None:
    """Mark the phases, then do what the command line does."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    marks = Marks(folder / f"rank-{os.environ.get('RANK', '0')}")
    marks.begin()
    for phase, place in ((phase, place) for phase, places in PHASES.items() for place in places):
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, marks.marked(phase, getattr(owner, name)))
    from fastpref.cli import main as run

    sys.argv = ["fastpref", "train", *arguments]
    run()


if __name__ == "__main__":
    # deepspeed's launcher puts --local_rank first
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))]
    main()
