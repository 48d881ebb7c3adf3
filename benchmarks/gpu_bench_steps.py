"""The training steps of gpu_bench.py: ours by arm, full fine-tuning, the UNet's layers, DeepSpeed, the bare passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from common import ROOT
from devices import forget_peak, peak_device_bytes, seconds
from gpu_bench_measure import (
    Row,
    begin,
    busy_ms,
    capture,
    graphs,
    guarded,
    operations,
    recomputation,
    reserved,
    run_steps,
)
from gpu_bench_world import World
from limit import Bare

from fastpref.train.world import close_world, open_world

WARM, WINDOW = 4, 3  # steps of an arm that compile and capture, and steps of a repeat


@dataclass(frozen=True)
class Arm:
    """One way to run a step."""

    name: str
    settings: tuple[str, ...]


def arm(name: str, method: str, *settings: str, pairs: int = 4, keep: str = "none", graph: str = "auto") -> Arm:
    """An arm of ``pairs`` pairs a forward."""
    batch = [f"batch_size={pairs}"] if not any(s.startswith("batch_size=") for s in settings) else []
    group = [f"group_size={pairs}"] if method == "rpo" and batch else []
    return Arm(name, (f"method={method}", *settings, *batch, *group, *recomputation(keep), *graphs(graph)))


LEDGER = "reference=ledger"
FOUR = ("batch_size=4", "micro_batch_size=1")  # four micro-batches
KEPT = ("group_size=4", "accumulation=keep_graphs")
FULL = ("train=full", "optimizer=adamw8bit", "step_in_backward=true", "pure_bf16=true", "learning_rate=1e-6")
FULL_ARMS: dict[str, tuple[str, ...]] = {"rpo-full": (), "rpo-full-ledger": (LEDGER,)}
CHOICES: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "fused_ops": ("fused_ops=true",),
    "compile": ("compile=true",),
    "compile, fused_ops": ("compile=true", "fused_ops=true"),
}
TRAINED: dict[str, tuple[str, ...]] = {"lora": (), "all weights": ("train=full",)}
ENGINES: dict[str, tuple[str, ...]] = {
    "local": (),
    **{
        name: ("engine=deepspeed", f"deepspeed={ROOT / 'configs' / 'deepspeed' / f'{name}.json'}")
        for name in ("zero2", "zero2_offload")
    },
}
BARE_ARMS: dict[str, tuple[str, ...]] = {
    "dpo-4-ledger": (LEDGER,),
    "dpo-1-ledger": (LEDGER, "batch_size=1"),
    "dpo-4": (),
}


def step_arms() -> list[Arm]:
    """The most decisive first."""
    return [
        arm("dpo-4-ledger", "dpo", LEDGER),
        arm("dpo-4", "dpo"),
        arm("dpo-1-ledger", "dpo", LEDGER, pairs=1),
        arm("dpo-4-recompute", "dpo", keep="full"),
        arm("rpo-4-ledger", "rpo", LEDGER),
        arm("rpo-4", "rpo"),
        arm("dpo-4x1-ledger", "dpo", LEDGER, *FOUR),
        arm("rpo-4x1-kept-ledger", "rpo", LEDGER, *FOUR, *KEPT),
        arm("sft-4", "sft"),
        arm("dpo-4-ledger-selective", "dpo", LEDGER, keep="selective"),
        arm("dpo-4-ledger-no-graph", "dpo", LEDGER, graph="off"),
        arm("dpo-1-ledger-no-graph", "dpo", LEDGER, pairs=1, graph="off"),
        arm("dpo-4-no-graph", "dpo", graph="off"),
        arm("dpo-1", "dpo", pairs=1),
        arm("dpo-1-ledger-recompute", "dpo", LEDGER, pairs=1, keep="full"),
        arm("dpo-4-ledger-recompute", "dpo", LEDGER, keep="full"),
    ]


def ours(world: World) -> Iterator[Row]:
    """Our step, arm by arm."""
    for chosen in step_arms():
        yield from _each(world, "steps", chosen)


def full(world: World) -> Iterator[Row]:
    """Full fine-tuning, one pair a forward: RPO, 8-bit AdamW in the backward, recomputation."""
    for name, more in FULL_ARMS.items():
        yield from _each(world, "full", arm(name, "rpo", *FULL, *more, pairs=1, keep="full"), count="all weights")


def choices(world: World) -> Iterator[Row]:
    """The UNet's layers as they are, by the kernels, and compiled: what ``auto`` is to take."""
    for name, more in CHOICES.items():
        yield from _each(world, "choices", arm(name, "sft", *more))


def deepspeed(world: World) -> Iterator[Row]:
    """ZeRO on one device beside the local engine: a LoRA, then all weights."""
    ranks = open_world(world.config("method=dpo", "engine=deepspeed"), world.device)  # DeepSpeed wants one for all arms
    try:
        for trained, more in TRAINED.items():
            for engine, settings in ENGINES.items():
                chosen = arm(f"{trained}, {engine}", "dpo", *more, *settings, pairs=1)
                yield from _each(world, "deepspeed", chosen, ranks=ranks)
    finally:
        close_world()


def _each(world: World, part: str, chosen: Arm, **more: Any) -> Iterator[Row]:
    yield from guarded(world, part, chosen.name, partial(_arm, world, chosen, **more))


def _arm(world: World, chosen: Arm, count: str = "", **more: Any) -> Iterator[Row]:
    """Repeats of an arm, then the time that the device was busy, and the operations of a row if ``count`` says so."""
    trainer, device = world.trainer(*chosen.settings, **more), world.device
    if count:
        yield from operations(trainer, count)
    forget_peak(device)
    note = begin(trainer)
    run_steps(trainer, 1, WARM)
    first, policy = 1 + WARM, trainer.policy
    for repeat in range(world.repeats):
        rows = policy.forwards, policy.backwards
        taken = seconds(partial(run_steps, trainer, first, WINDOW), device)
        first += WINDOW
        yield {
            **{"repeat": repeat, "ms": round(1e3 * taken / WINDOW, 4), "pairs": trainer.config.batch_size},
            "forward_rows": (policy.forwards - rows[0]) / WINDOW,
            "backward_rows": (policy.backwards - rows[1]) / WINDOW,
            **{"peak_device_bytes": peak_device_bytes(device), "reserved_device_bytes": reserved(device)},
            **{"train": trainer.config.train, "settings": " ".join(chosen.settings), "note": note},
        }
    if device.type == "cuda":
        yield {"busy_ms": round(busy_ms(partial(run_steps, trainer, first, 2), device) / 2, 4), "note": note}


def bare(world: World) -> Iterator[Row]:
    """The passes alone, launched one by one, and on a GPU replayed from a CUDA graph."""
    for name, settings in BARE_ARMS.items():
        chosen = arm(name, "dpo", *settings)
        yield from guarded(world, "bare", name, partial(_bare, world, chosen, captured=False))
        if world.device.type == "cuda":
            yield from guarded(world, "bare", f"{name}, graph", partial(_bare, world, chosen, captured=True))


def _bare(world: World, chosen: Arm, *, captured: bool) -> Iterator[Row]:
    off = graphs("off")
    passes = Bare(world.trainer(*chosen.settings, *off))
    forget_peak(world.device)
    for _ in range(2):
        passes.step()
    call = capture(passes.step) if captured else passes.step
    for repeat in range(world.repeats):
        peak = {"peak_device_bytes": peak_device_bytes(world.device)}
        yield {"repeat": repeat, "ms": round(1e3 * seconds(call, world.device), 4), **peak}
