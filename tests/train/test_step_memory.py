"""What a step leaves in memory: its graph is freed by reference counts, not by the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from fastpref.config import Config
from fastpref.models import compiled
from fastpref.plan.meter import PeakMemory
from fastpref.train.job import TrainJob

MakeConfig = Callable[..., Config]
COMMON = ["batch_size=4", "micro_batch_size=2"]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """The cyclic garbage collector is off."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    "extra",
    [
        ["method=rpo", "precision=bf16", "gradient_checkpointing=full"],
        ["method=rpo", "accumulation=keep_graphs", "attention=sliced", "gradient_checkpointing=full"],
        ["method=dpo", "train=full", "fused_ops=true", "gradient_checkpointing=full"],
        ["method=dpo", "compile=true", "gradient_checkpointing=full"],
        ["method=rpo", "precision=bf16", "gradient_checkpointing=selective"],
        ["method=dpo", "train=full", "fused_ops=true", "gradient_checkpointing=selective"],
    ],
)
def test_nothing_of_the_graph_outlives_its_backward(
    one_level_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, extra: list[str]
) -> None:
    monkeypatch.setitem(compiled.OPTIONS, "backend", "aot_eager")
    trainer = TrainJob.open(one_level_config(*COMMON, *extra)).trainer
    policy = trainer.policy
    trainer.step(0)  # makes the optimizer's state, and compiles
    gc.collect()
    assert all(parameter.grad is None for parameter in policy.trainable.values())
    with PeakMemory(policy.tensors()) as memory:
        trainer.step(1)
        assert memory.peak > 1e6
        left = memory.live
        gc.collect()
        assert memory.live == left
        assert left < 0.01 * memory.peak, f"{left} of {memory.peak} bytes"
    torch._dynamo.reset()
