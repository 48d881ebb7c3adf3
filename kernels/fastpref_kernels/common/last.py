"""One launch where a sum needs two stages: the last program to finish adds up what the others left.

Programs store their parts and count themselves in (`is_last`); whoever completes the count sees all parts, adds them
in one order and leaves the counter at 0 for the next launch. The integer atomics decide which program does that work,
never its result. Counters start at 0 and nothing else may use them meanwhile (`counters`).
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from .dispatch import jit, tl

F = TypeVar("F", bound=Callable[..., Any])
_LEAST, _RECORDED = 1024, 1 << 16  # counters of a stream at least; of all CUDA graphs that a device records
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_for_graphs: dict[torch.device, Tensor] = {}  # those that no graph has yet
_here = threading.local()


@jit
def is_last(counter_ptr, programs):
    """Whether all of `programs` programs have come here; it is true for one of them, which sees what every one of them
    stored before it came."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


def traced(function: F) -> F:
    """The function, with counters made by every call: a compiler's CUDA graphs let nothing outlive a call."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        previous, _here.traced = getattr(_here, "traced", False), True
        try:
            return function(*arguments)
        finally:
            _here.traced = previous

    return run  # type: ignore[return-value]


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` zeros (int32) that no launch in flight uses, once this stream's earlier work is done.

    A stream has its own, made once. A CUDA graph, which may be replayed on any stream, has its own for every launch.
    """
    if getattr(_here, "traced", False):
        return _zeros(device, count)
    stream = 0
    if device.type == "cuda":
        if torch._C._cuda_isCurrentStreamCapturing():
            return _recorded(device, count)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    found = _of_stream.get((device, stream))
    if found is None or found.shape[0] < count:
        found = _of_stream[device, stream] = _zeros(device, max(_LEAST, count))
        if device not in _for_graphs:
            _for_graphs[device] = _zeros(device, _RECORDED if device.type == "cuda" else 0)
    return found


def _recorded(device: torch.device, count: int) -> Tensor:
    """Zeros made before any recording began; where those are used up, the graph makes its own at every replay."""
    left = _for_graphs.get(device)
    if left is None or left.shape[0] < count:
        return _zeros(device, count)
    step = -(-count // 4) * 4  # the next ones also begin at a multiple of 16 bytes
    _for_graphs[device] = left[step:]
    return left[:count]


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
