"""Reads the store ahead of the step: the next micro-batch's rows are in memory (pinned for a GPU) before it is due."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from fastpref.data.sampling import BatchPlan, Sampler
from fastpref.data.store import StoreBatch
from fastpref.train.batch import BatchBuilder


class Loaded(NamedTuple):
    """Rows of a step's batch as the store has them."""

    plan: BatchPlan
    rows: slice
    stored: StoreBatch
    embeddings: tuple[torch.Tensor, torch.Tensor] | None  # of the whole global batch, with the step's first rows


class Loader:
    """Gives a step's micro-batches one after another while a thread reads those that follow.

    Args:
        micro_batches: the slices of every step's batch in the order in which the step asks for them.
        with_embeddings: read the global batch's CLIP rows too.
        ahead: micro-batches in memory before they are due.
    """

    def __init__(
        self,
        sampler: Sampler,
        batches: BatchBuilder,
        micro_batches: list[slice],
        *,
        with_embeddings: bool,
        ahead: int = 2,
    ) -> None:
        self.sampler, self.batches, self.micro_batches = sampler, batches, micro_batches
        self.with_embeddings, self.ahead = with_embeddings, ahead
        self._pool = self._thread()
        self._due: tuple[int, int] | None = None
        self._futures: list[Future[Loaded]] = []

    def take(self, step: int, number: int) -> Loaded:
        """The ``number``-th micro-batch of ``step``; whatever the thread raised is raised here."""
        if self._due != (step, number):
            self._futures = []
            self._due = (step, number)
        while len(self._futures) <= self.ahead:
            self._futures.append(self._pool.submit(self._read, *self._after(len(self._futures))))
        self._due = self._after(1)
        return self._futures.pop(0).result()

    def close(self) -> None:
        """Read no further; waits for a read under way. :meth:`take` begins anew."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._due = self._thread(), None

    @staticmethod
    def _thread() -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="loader")  # starts with the first read

    def _after(self, count: int) -> tuple[int, int]:
        """What is due ``count`` micro-batches after the next one."""
        assert self._due is not None
        steps, number = divmod(self._due[1] + count, len(self.micro_batches))
        return self._due[0] + steps, number

    def _read(self, step: int, number: int) -> Loaded:
        plan, rows = self.sampler.batch(step), self.micro_batches[number]
        embeddings = self.batches.embeddings(plan) if self.with_embeddings and number == 0 else None
        return Loaded(plan, rows, self.batches.read(plan, rows), embeddings)
