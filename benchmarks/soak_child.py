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

# Phase → where it is, innermost last: a forward in a rollout is a forward.
PHASES = {
    "opening": "fastpref.train.job:_open_trainer",
    "data": "fastpref.data.sampling:Sampler.batch",
    "loading": "fastpref.train.loader:Loader.take",
    "batch": "fastpref.train.batch:BatchBuilder.build",
    "forward": "fastpref.models.policy:Policy.predict",
    "optimizer": "fastpref.train.trainer:Trainer.update",
    "checkpoint": "fastpref.train.job:save_checkpoint",
    "rollout": "fastpref.rollout.collect:Collector.collect",
    "scoring": "fastpref.rollout.queue:ScoringQueue.results",
    "training": "fastpref.train.transitions:TransitionObjective.loss",
    "export": "fastpref.train.trainer:PolicyTrainer.export",
}
ELSEWHERE = "elsewhere"  # between the phases: imports, the backward, the metrics, the summary
_NAMES = [ELSEWHERE, *PHASES]


class Marks:
    """What a rank tells: its process, its phase, how often each was entered, and the longest stay in nanoseconds."""

    def __init__(self, file: Path, create: bool = False) -> None:
        size = 2 + 2 * len(_NAMES)
        self._table = np.memmap(file, np.int64, "w+" if create else "r+", shape=(size,))

    def begin(self) -> None:
        """Called by the rank."""
        self._table[0] = os.getpid()

    @property
    def pid(self) -> int:
        """0 until the rank runs."""
        return int(self._table[0])

    @property
    def phase(self) -> str:
        """The one that the rank is in, or died in."""
        return _NAMES[int(self._table[1])]

    def entered(self, phase: str) -> int:
        """How often the rank came there."""
        return int(self._table[2 + _NAMES.index(phase)])

    def longest(self, phase: str) -> float:
        """Seconds."""
        return float(self._table[2 + len(_NAMES) + _NAMES.index(phase)]) / 1e9

    def marked(self, phase: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        """``plain``, telling about itself; of what other threads do, only how often."""
        number = _NAMES.index(phase)

        @functools.wraps(plain)
        def telling(*arguments: Any, **keywords: Any) -> Any:
            self._table[2 + number] += 1
            if threading.current_thread() is not threading.main_thread():
                return plain(*arguments, **keywords)
            before, began = int(self._table[1]), time.perf_counter_ns()
            self._table[1] = number
            try:
                return plain(*arguments, **keywords)
            finally:
                place = 2 + len(_NAMES) + number
                self._table[place] = max(int(self._table[place]), time.perf_counter_ns() - began)
                self._table[1] = before

        return telling


def main() -> None:
    """Mark the phases, then do what the command line does."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    marks = Marks(folder / f"rank-{os.environ.get('RANK', '0')}")
    marks.begin()
    for phase, place in PHASES.items():
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
    del sys.path[0]  # kernels.py beside this file is not the package that transformers looks for
    # deepspeed's launcher puts --local_rank first
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))]
    main()
