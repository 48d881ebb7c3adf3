"""The processes of one run: who is there, what they exchange, and what is said when one of them is lost.

The launcher (``deepspeed``, ``torchrun``, ``srun``) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
Tensors on a GPU travel through NCCL, everything else through gloo. Every process says which step it is in; when a
collective breaks or times out, the ones that are left name those that stayed behind.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from fastpref.config import Config
from fastpref.data.workspace import Ranks
from fastpref.errors import UserError

_LOST = re.compile(
    r"timed out|timeout|connection (reset|closed|refused)|broken pipe|gloo|nccl|socket|tcpstore", re.IGNORECASE
)
_LATE = re.compile(r"timed out|timeout", re.IGNORECASE)
_STEP, _LEFT = "fastpref/step/", "fastpref/left/"  # keys of the store, by rank
_POLL_SECONDS = 0.2
_ROLL_CALL_SECONDS = 5.0  # those that wait for a lost rank give up at about the same time
_turns = itertools.count()


class RankLost(Exception):
    """A process of the run died or hangs; the message names it and says how to go on."""


@dataclass(frozen=True)
class World:
    """This process among the run's. The default is one process, to which every exchange is the identity.

    Args:
        control: gloo group for what is on the CPU; None: the default group.
        timeout: seconds a process may keep the others waiting.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    timeout: float = 0.0
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process' part of ``range(count)``: even, the first ones get the remainder."""
        whole, rest = divmod(count, self.size)
        start = self.rank * whole + min(self.rank, rest)
        return slice(start, start + whole + (self.rank < rest))

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """``(F, n)`` of every process, joined along the second dimension in rank order; n may differ."""
        if self.size == 1:
            return values
        group = None if values.is_cuda else self.control
        plain = values.view(torch.uint8) if values.dtype == torch.bool else values
        own = torch.tensor([plain.shape[1]])
        counts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(counts, own, group=self.control)
        sizes = [int(count) for count in counts]
        if max(sizes) == 0:
            return values
        padded = plain.new_zeros(plain.shape[0], max(sizes))
        padded[:, : plain.shape[1]] = plain
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        joined = torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)
        return joined.view(values.dtype)

    def sum_(self, tensors: list[torch.Tensor], bucket: int = 1 << 25) -> None:
        """Replace tensors of one device by their sums over the processes, about ``bucket`` elements at a time."""
        waiting: list[torch.Tensor] = []
        for number, tensor in enumerate(tensors, 1):
            waiting.append(tensor)
            following = tensors[number] if number < len(tensors) else None
            full = sum(part.numel() for part in waiting) >= bucket
            if following is None or full or following.dtype != tensor.dtype:
                flat = torch.cat([part.reshape(-1) for part in waiting])
                dist.all_reduce(flat, group=None if flat.is_cuda else self.control)
                for part, summed in zip(waiting, flat.split([part.numel() for part in waiting]), strict=True):
                    part.copy_(summed.view_as(part))
                waiting = []

    def most(self, value: int) -> int:
        """The largest ``value`` of all processes."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return int(found)

    def objects(self, value: Any) -> list[Any]:
        """``value`` (numbers, strings, lists) of every process, in rank order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def from_main(self, value: Any) -> Any:
        """Rank 0's ``value``."""
        return self.objects(value if self.is_main else None)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What a user caused in one process inside, all of them raise: nobody waits for one that has given up."""
        own: UserError | None = None
        try:
            yield
        except UserError as error:
            own = error
        self._raise_first(self.objects(own and (own.what, own.where, own.todo)), own)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Rank 0 works inside as long as it takes; the others have nothing to do and wait without a timeout.

        They leave together: rank 0 holds the store that the others ask, and may have nothing else to do than to exit.
        """
        if self.size == 1:
            yield
            return
        key, own = f"fastpref/alone/{next(_turns)}", None
        try:
            yield
        except UserError as error:
            own = error
        finally:
            if self.is_main:
                _store().set(key, "")
        while not _store().check([key]):
            time.sleep(_POLL_SECONDS)
        self._raise_first(self.objects(own and (own.what, own.where, own.todo)), own)

    def _raise_first(self, found: list[Any], own: UserError | None) -> None:
        for rank, parts in enumerate(found):
            if parts is not None:
                error = UserError(f"rank {rank}: {parts[0]}" if rank else parts[0], *parts[1:])
                error.shared = True
                raise error from own

    def beat(self, step: int) -> None:
        """Say that this process has come to 0-based ``step``."""
        if self.size > 1:
            _store().set(f"{_STEP}{self.rank}", str(step + 1))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn the failure of a collective into :class:`RankLost`."""
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if self.size == 1 or not _LOST.search(str(error)):
                raise
            raise RankLost(self._diagnosis(str(error))) from error

    def _diagnosis(self, message: str) -> str:
        """Whoever is left says so; the lost ones are those that do not."""
        lost, step = list(range(self.size)), "0"
        try:
            store = _store()
            store.set(f"{_LEFT}{self.rank}", "")
            until = time.monotonic() + _ROLL_CALL_SECONDS
            while lost and time.monotonic() < until:
                lost = [rank for rank in lost if not store.check([f"{_LEFT}{rank}"])]
                time.sleep(_POLL_SECONDS)
            if lost and store.check([f"{_STEP}{lost[0]}"]):
                step = store.get(f"{_STEP}{lost[0]}").decode()
        except (RuntimeError, dist.DistError):
            lost = [0]  # the store is where rank 0 was
        who = ", ".join(f"rank {rank}" for rank in lost) if lost else "the connection"
        where = f" in step {step}" if step != "0" else ""
        after = f" for {self.timeout:.0f} s (rank_timeout)" if _LATE.search(message) else ""
        todo = "start all ranks again with resume=auto; the newest checkpoint is whole"
        return f"{who} stopped answering{where}{after}, rank {self.rank} gives up: {todo}"


def open_world(config: Config, device: torch.device) -> World:
    """Join the run's processes.

    Raises:
        UserError: the launcher's environment is incomplete, or a process does not come within ``rank_timeout``.
    """
    ranks = Ranks.from_env()
    if ranks.size == 1 and config.engine == "local":
        return World()
    wait = timedelta(seconds=config.rank_timeout)
    if device.type == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    if not dist.is_initialized():
        _join(ranks, "nccl" if device.type == "cuda" else "gloo", wait)
    control = dist.new_group(backend="gloo", timeout=wait) if device.type == "cuda" else None
    return World(ranks.rank, ranks.size, ranks.local_rank, config.rank_timeout, control)


def close_world() -> None:
    """Leave, so that the process ends without a warning."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _join(ranks: Ranks, backend: str, wait: timedelta) -> None:
    if ranks.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        todo = "start with deepspeed, torchrun or srun, as in the README"
        raise UserError(f"{' and '.join(missing)} not set though WORLD_SIZE is {ranks.size}", "environment", todo)
    try:
        dist.init_process_group(backend, timeout=wait)
    except (RuntimeError, dist.DistError, ValueError) as error:
        what = f"the {ranks.size} ranks did not find each other within {wait.total_seconds():.0f} s"
        raise UserError(what, f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error)) from error


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
