"""CUDA graphs of the GPU in ``stand_in_gpu``: recorded ops, and their replay on the tensors they were recorded with.

As on a GPU nothing that is recorded takes effect, what would make the host wait raises, and so does a copy from the
CPU. Graphs of one pool share memory: a replay fills whatever the pool's other graphs computed, and this one does not
read, with NaN, as a real one might.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class CaptureError(RuntimeError):
    """What a GPU cannot record."""


class Recorder:
    """Ops in the order in which they were called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, torch.Tensor]]]] = []
        self.made: dict[int, torch.Tensor] = {}  # by storage: what the ops computed
        self.read: set[int] = set()  # storages of their arguments
        self._before: dict[int, tuple[torch.Tensor, torch.UntypedStorage]] = {}

    def protect(self, func: Any, args: Any, kwargs: Any) -> None:
        """Keep what an op is about to write over, unless it was made while recording."""
        for tensor in _written(func, args, kwargs):
            where = tensor.untyped_storage()._cdata
            if where not in self.made and where not in self._before:
                self._before[where] = tensor, tensor.untyped_storage().clone()

    def note(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        given = {_where(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        new = [(place, x) for place, x in enumerate(tree_leaves(found)) if isinstance(x, torch.Tensor)]
        new = [(place, x) for place, x in new if _where(x) not in given]
        if new or any(True for _ in _written(func, args, kwargs)):  # else it is a view
            self.calls.append((func, args, kwargs, new))
        self.read |= given
        self.made |= {_where(x): x for _, x in new}

    def undo(self) -> None:
        """Nothing has happened."""
        for tensor, before in self._before.values():
            tensor.untyped_storage().copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, new in self.calls:
            found = tree_leaves(func(*args, **kwargs))
            for place, tensor in new:
                tensor.copy_(found[place])


class Graph:
    """In the place of :class:`torch.cuda.CUDAGraph`."""

    replays = 0  # of all graphs

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded: Recorder | None = None
        self.pool: Pool | None = None

    def replay(self) -> None:
        assert self.recorded is not None and self.pool is not None, "replayed before it was recorded"
        Graph.replays += 1
        read = self.recorded.read
        for other in self.pool.graphs:
            if other is not self and other.recorded is not None:
                for where, tensor in other.recorded.made.items():
                    if where not in read and tensor.is_floating_point():
                        tensor.fill_(torch.nan)
        with torch.utils._python_dispatch._disable_current_modes():
            self.recorded.replay()


class Pool:
    def __init__(self) -> None:
        self.graphs: list[Graph] = []


class Recording:
    """Whether something is being recorded, and where to."""

    recorder: Recorder | None = None

    @classmethod
    @contextmanager
    def graph(cls, graph: Graph, pool: Pool | None = None, **_: Any) -> Iterator[None]:
        """In the place of :class:`torch.cuda.graph`."""
        assert cls.recorder is None, "recording within a recording"
        cls.recorder = recorder = Recorder()
        try:
            yield
        finally:
            cls.recorder = None
            with torch.utils._python_dispatch._disable_current_modes():
                recorder.undo()
        graph.recorded, graph.pool = recorder, pool or Pool()
        graph.pool.graphs.append(graph)

    @classmethod
    def refuse(cls, what: str) -> None:
        """Raise :class:`CaptureError` if something is being recorded."""
        if cls.recorder is not None:
            raise CaptureError(f"{what} while a graph is recorded")


def _where(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@functools.cache
def _outputs(func: Any) -> list[tuple[int, str]]:
    """The arguments that an op writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    for place, name in _outputs(func):
        value = args[place] if place < len(args) else kwargs.get(name)
        yield from (x for x in tree_leaves(value) if isinstance(x, torch.Tensor))
