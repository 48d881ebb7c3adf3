"""How gpu_bench.py measures: steps as training runs them, the device's busy time, operations, captured calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from devices import wait
from gpu_bench_world import OverLimit, World
from limit import Bare, inputs_of

from fastpref.errors import UserError
from fastpref.plan.meter import Operations
from fastpref.train.offline import OfflineTrainer

Row = dict[str, Any]


def recomputation(mode: str) -> list[str]:
    """Overrides for ``gradient_checkpointing``: none, selective or full."""
    return [f"gradient_checkpointing={mode}"]


def graphs(mode: str) -> list[str]:
    """Overrides for ``cuda_graphs``: auto, on or off."""
    return ["cuda_graphs=" + {"on": "true", "off": "false"}.get(mode, mode)]


def guarded(world: World, part: str, name: str, measure: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The arm's rows unless they are there already; what stops it is a row too, and the next arm goes on."""
    if world.done(part, name):
        return
    try:
        for row in measure():
            yield {"arm": name, **row}
    except OverLimit:
        raise
    except Exception as error:  # a kernel, a package or the memory of this device: the others are to be measured
        if time.perf_counter() >= world.deadline:
            raise OverLimit("it was cut off at its limit") from error  # which a library had caught
        said = " ".join(str(error).split())[:200]
        yield {"arm": name, "note": f"failed: {type(error).__name__}: {said}"}


def run_steps(trainer: OfflineTrainer, first: int, count: int) -> None:
    """``count`` steps as training runs them: the figures of one are read when the next is under way."""
    before: Callable[[], Any] | None = None
    for step in range(first, first + count):
        figures = trainer.launch(step)
        if before is not None:
            before()
        before = figures
    if before is not None:
        before()


def begin(trainer: OfflineTrainer) -> str:
    """Take the first step. What a ledger is refused for is said, and does not change how long a step takes."""
    try:
        trainer.step(0)
    except UserError as error:
        if trainer.ledger is None:
            raise
        return f"refused: {error.what}"
    return ""


def reserved(device: torch.device) -> int | str:
    """Most bytes that torch held of the device at once, pools of CUDA graphs among them."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else ""


def busy_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds in which the device ran a kernel or a copy, whatever the profiler does to the host."""
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        wait(device)
    events = [event for event in found.profiler.kineto_results.events() if event.device_type() == DeviceType.CUDA]
    marks = ("fastpref", "Optimizer.", "ProfilerStep")  # they span the gaps between kernels
    kernels = [event for event in events if not (event.is_user_annotation() or event.name().startswith(marks))]
    return union([(event.start_ns(), event.start_ns() + event.duration_ns()) for event in kernels]) / 1e6


def union(spans: list[tuple[int, int]]) -> int:
    """Length of what the spans (begin, end) cover together."""
    covered, until = 0, 0
    for begin_, end in sorted(spans):
        covered += max(0, end - max(begin_, until))
        until = max(until, end)
    return covered


def operations(trainer: OfflineTrainer, trained: str) -> Iterator[Row]:
    """Operations of a row, counted while it passes the UNet: forward, and backward without recomputation."""
    flags = {module: module.gradient_checkpointing for module in trainer.policy.unet.modules() if _recomputes(module)}
    for module in flags:
        module.gradient_checkpointing = False
    bare = Bare(trainer)
    batch = bare.batches[0]
    with Operations() as forward:
        error = (trainer.policy.predict(*inputs_of(batch)) - batch.target).square().mean()
    trainer.engine.begin(0, 0.0)
    with Operations() as backward:
        error.backward()
    trainer.engine.discard()
    for module, flag in flags.items():
        module.gradient_checkpointing = flag
    for name, counted in (("forward", forward), ("backward", backward)):
        yield {"flops": counted.total / batch.rows, "quantity": f"{name} of a row, {trained}"}


def _recomputes(module: Any) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as a CUDA graph's replay."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
