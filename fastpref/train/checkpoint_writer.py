"""Checkpoints beside the training: it copies its state to host memory and goes on while a thread writes.

The thread writes, syncs and checksums this rank's part. Alone it commits too. Of several ranks all commit at the end of
the first step by which the last one has written: every collective stays in the training's own thread, in the order that
all ranks have. One checkpoint at most is under way; what goes wrong with it is raised at the end of a step, in the next
save or at the end, whichever comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.memory import free_bytes
from fastpref.train.checkpoint import Draft, save_checkpoint
from fastpref.train.engine import Piece, State
from fastpref.train.world import World

MEMORY_SHARE = 4  # checkpoint_async=auto: of what is free, the copies of all ranks take less than one part in


class CheckpointWriter:
    """Writes a run's checkpoints, at once or beside the training; every rank calls it at the same points.

    Args:
        saved: the step of the checkpoint that the run goes on from, 0 without one.
        before: what has to be on disk before a checkpoint is; called in the thread that writes.

    Attributes:
        saved: the step of the newest checkpoint that is whole and in its place.
    """

    def __init__(
        self, folder: Path, config: Config, world: World, saved: int, before: Callable[[], None], console: Console
    ) -> None:
        self.folder, self.world, self.saved, self.before, self.console = folder, world, saved, before, console
        self.keep, self.beside = config.keep_checkpoints, config.checkpoint_async
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._draft: Draft | None = None
        self._written: Future[str] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """An error waits for the write too, unless it is one rank's own: without the others nothing is committed."""
        if error is None or self.world.size == 1 or getattr(error, "shared", False):
            try:
                self.settle()
            except UserError as second:
                if error is None:
                    raise
                self.console.print(f"{second}", style="yellow")
        self._thread.shutdown(wait=False)

    def save(
        self, step: int, tensors: State, values: dict[str, Any], *, spared: int | None = None, wait: bool = False
    ) -> None:
        """Save after ``step`` steps; with ``wait``, or where memory is short, it is there on return.

        Raises:
            UserError: a rank cannot write this checkpoint or the one before it.
        """
        self.settle()
        if step == self.saved > 0:
            return
        if wait or not self._may_copy(tensors):
            self.before()
            save_checkpoint(self.folder, step, tensors, values, self.keep, self.world, spared)
            self.saved = step
            return
        draft = Draft(self.folder, step, values, self.keep, self.world, spared)
        draft.open()
        copies = {name: _copied(value) for name, value in tensors.items()}
        self._draft, self._written = draft, self._thread.submit(self.write, draft, copies)

    def look(self) -> None:
        """Notice, without waiting for a disk, that the checkpoint under way is written, or cannot be.

        Raises:
            UserError: as :meth:`save`.
        """
        if self._written is not None and not self.world.most(int(not self._written.done())):
            self.settle()

    def settle(self) -> None:
        """Wait until no checkpoint is under way.

        Raises:
            UserError: as :meth:`save`.
        """
        draft, written = self._draft, self._written
        if draft is None or written is None:
            return
        self._draft = self._written = None
        try:
            with self.world.together():
                checksum = written.result()
            if self.world.size > 1:
                self.commit(draft, checksum)
        except UserError:
            draft.drop()
            raise
        self.saved = draft.step

    def write(self, draft: Draft, tensors: State) -> str:
        """What the thread does; the checksum of this rank's part."""
        self.before()
        checksum = draft.write(tensors)
        if self.world.size == 1:
            draft.commit(checksum)
        return checksum

    def commit(self, draft: Draft, checksum: str) -> None:
        """What several ranks do together once all have written."""
        draft.commit(checksum)

    def _may_copy(self, tensors: State) -> bool:
        """The ranks' verdict: they may share a machine, so what they copy counts together."""
        if self.beside != "auto":
            return self.beside
        held = sum(_tensor(value).nbytes for value in tensors.values())
        found = self.world.objects([held, free_bytes(torch.device("cpu"))])
        return MEMORY_SHARE * sum(own for own, _ in found) < min(free for _, free in found)


def _tensor(value: torch.Tensor | Piece) -> torch.Tensor:
    return value.tensor if isinstance(value, Piece) else value


def _copied(value: torch.Tensor | Piece) -> torch.Tensor | Piece:
    if isinstance(value, Piece):
        return replace(value, tensor=_copied(value.tensor))
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
