"""CUDA graphs: work that repeats in every step is recorded once for each shape and replayed, with no Python between.

What is recorded: a forward without gradient, a forward and the backward that belongs to it, the optimizer's step. All
of it takes its inputs from static buffers, into which each call's tensors are copied, and gives copies of its results.
A call of a new shape runs as plain code the first time, which makes the optimizer's state, chooses algorithms and
compiles; the second time it is recorded, from then on replayed. Recorded or not, results are equal bit for bit.

All graphs lie in one memory pool, since none is replayed between a forward and its backward, where activations of the
one lie in memory that others use at other times. Where several forwards wait for their backwards (``keep_graphs``) that
is not so: each has a pool of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastpref.config import Config

Inputs = Sequence[Tensor | None]
_PLAIN_CALLS = 1  # of a shape before it is recorded
MOST_SHAPES = 16  # of one piece of work; further ones run as plain code


def capture_fault(config: Config, device: torch.device) -> str | None:
    """Why nothing of a recipe's step can be recorded on ``device``; None if it can."""
    if device.type != "cuda":
        return "they need a GPU"
    if config.cuda_graphs is False:
        return "cuda_graphs is false"
    if config.engine == "deepspeed":
        return "DeepSpeed runs Python in every pass"
    return None


def plain_forward(
    function: Callable[..., tuple[Tensor | None, ...]], backward: Callable[[Tensor, Tensor], None], inputs: Inputs
) -> tuple[tuple[Tensor | None, ...], Callable[[Tensor], None]]:
    """What :meth:`Graphs.forward` gives, without recording anything."""
    found = function(*inputs)
    first = found[0]
    assert first is not None
    return _detached(found), lambda weight: backward(first, weight)


class Graphs:
    """The recorded work of one trainer.

    Args:
        device: a GPU. keeps: several forwards wait for their backwards.
        strict: raise where something cannot be recorded, instead of running it as plain code and warning.
    """

    def __init__(self, device: torch.device, *, keeps: bool = False, strict: bool = True) -> None:
        self.device, self.keeps, self.strict = device, keeps, strict
        self.stream = torch.cuda.Stream(device)
        self._pools: dict[Any, Any] = {}
        self._works: dict[tuple[str, Any], dict[Any, _Work]] = {}  # by what they do, then by shapes

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Inside, all work goes to the stream on which graphs are recorded, and is waited for by what comes after."""
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)

    @torch.no_grad()
    def run(self, name: str, function: Callable[..., Any], inputs: Inputs, key: Any = ()) -> Any:
        """``function(*inputs)``, a tensor or a tuple of tensors and None, without gradients.

        Args:
            name: of the work. key: what else than shapes and dtypes decides what ``function`` does.
        """
        work = self._work(name, key, inputs, slot="passes")
        if not self._ready(name, work, function, inputs):
            return function(*inputs)
        work.forward.replay()
        return _copied(work.outputs)

    def forward(
        self,
        name: str,
        function: Callable[..., tuple[Tensor | None, ...]],
        backward: Callable[[Tensor, Tensor], None],
        inputs: Inputs,
        slot: int = 0,
        key: Any = (),
    ) -> tuple[tuple[Tensor | None, ...], Callable[[Tensor], None]]:
        """Results of ``function(*inputs)``, without a graph, and what back-propagates from the first of them.

        Args:
            backward: is given that first result, with its graph, and the argument of what is returned.
            slot: counts the forwards that wait for their backwards. key: as for :meth:`run`.
        """
        slot = slot if self.keeps else 0
        work = self._work(name, (slot, key), inputs, slot if self.keeps else "passes")
        with torch.enable_grad():
            if not self._ready(name, work, function, inputs):
                return plain_forward(function, backward, inputs)
        work.forward.replay()
        return _copied(_detached(work.outputs)), lambda weight: work.replay_backward(self, backward, weight)

    def _ready(self, name: str, work: _Work, function: Callable[..., Any], inputs: Inputs) -> bool:
        """Whether the work can be replayed: it is recorded, and ``inputs`` are where it reads them."""
        if work.forward is not None:
            work.take(inputs)
            return True
        if work.calls <= _PLAIN_CALLS or work.fault is not None:
            return False
        try:
            work.record_forward(self, function, inputs)
        except RuntimeError as error:
            if self.strict:
                raise
            work.fault = str(error).splitlines()[0]
            warnings.warn(f"no CUDA graph of {name}, which runs as plain code: {work.fault}", stacklevel=2)
        return work.fault is None

    def _work(self, name: str, key: Any, inputs: Inputs, slot: Any) -> _Work:
        works = self._works.setdefault((name, key), {})
        shapes = tuple(None if x is None else (tuple(x.shape), x.dtype) for x in inputs)
        work = works.get(shapes)
        if work is None:
            work = works[shapes] = _Work(slot)
            if len(works) > MOST_SHAPES:
                work.fault = f"{MOST_SHAPES} shapes are recorded"
            if len(works) == MOST_SHAPES + 1:
                warnings.warn(f"no CUDA graph of {name} in further shapes: {work.fault}", stacklevel=2)
        work.calls += 1
        return work

    @contextmanager
    def recording(self, graph: Any, slot: Any) -> Iterator[None]:
        """Record what is called inside; nothing of it runs. Other threads may use the GPU's allocator meanwhile."""
        if slot not in self._pools:
            self._pools[slot] = torch.cuda.graph_pool_handle()
        pool = self._pools[slot]
        with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
            yield


class _Work:
    """One piece of work at one shape."""

    def __init__(self, slot: Any) -> None:
        self.calls, self.slot = 0, slot
        self.fault: str | None = None  # why it cannot be recorded
        self.forward: Any = None
        self.backward: Any = None
        self.outputs: Any = None
        self._inputs: tuple[Tensor | None, ...] = ()
        self._weight: Tensor | None = None

    def record_forward(self, graphs: Graphs, function: Callable[..., Any], inputs: Inputs) -> None:
        # Not written to until the backward is recorded, which refuses what has changed since the forward.
        self._inputs = tuple(None if x is None else x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        with graphs.recording(graph, self.slot):
            self.outputs = function(*self._inputs)
        self.forward = graph

    def take(self, inputs: Inputs) -> None:
        """Copy a call's inputs to where the graph reads them."""
        for static, given in zip(self._inputs, inputs, strict=True):
            if static is not None and given is not None:
                static.copy_(given)

    def replay_backward(self, graphs: Graphs, backward: Callable[[Tensor, Tensor], None], weight: Tensor) -> None:
        if self.backward is None:
            self._weight = torch.empty_like(weight)
            graph = torch.cuda.CUDAGraph()
            with graphs.recording(graph, self.slot):
                backward(self.outputs[0], self._weight)
            self.backward, self.outputs = graph, _detached(self.outputs)
        assert self._weight is not None
        self._weight.copy_(weight)
        self.backward.replay()


def _detached(results: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.detach() for x in results)


def _copied(results: Any) -> Any:
    """Results that the next replay does not overwrite."""
    if isinstance(results, Tensor):
        return results.clone()
    return tuple(None if x is None else x.clone() for x in results)
