"""The first loss scale of fp16: found on the first batch, exact over its micro-batches, then left to the scaler."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fastpref.config import Config, load_config
from fastpref.train.engine import LocalEngine, open_engine
from fastpref.train.job import TrainJob

MakeConfig = Callable[..., Config]


class Weight:
    """One number in training."""

    def __init__(self) -> None:
        self.trainable = {"w": torch.nn.Parameter(torch.zeros(()))}
        self.device = torch.device("cpu")

    def objective(self, slope: float) -> torch.Tensor:
        """Whose gradient is ``slope``, by way of fp16."""
        return self.trainable["w"].half().float() * slope


def opened(*more: str) -> tuple[Weight, LocalEngine]:
    model = Weight()
    engine = open_engine(model, load_config("", ["precision=fp16", "weight_decay=0", "max_grad_norm=null", *more]))
    assert isinstance(engine, LocalEngine)
    return model, engine


@pytest.mark.parametrize(
    ("slopes", "scale"),
    [
        ([2.0**-9], 2.0**16),  # 16 times it are 2^11
        ([3.0], 2.0**10),  # 16·3·2^10 = 49152 is below 65504, 16·3·2^11 is not
        ([3.0, 24.0], 2.0**7),
        ([24.0, 3.0], 2.0**7),
    ],
)
def test_it_is_the_largest_that_leaves_headroom_and_no_gradient_is_lost(slopes: list[float], scale: float) -> None:
    model, engine = opened()
    for slope in slopes:
        engine.backward(model.objective(slope))
    assert engine.step(1e-3) == sum(slopes), "all of them are numbers of fp16, and the scales are powers of two"
    assert engine.scaler.get_scale() == scale and model.trainable["w"].item() != 0


def test_from_the_first_update_on_the_scaler_skips_and_halves() -> None:
    model, engine = opened()
    engine.backward(model.objective(3.0))
    engine.step(1e-3)
    before = model.trainable["w"].item()
    engine.backward(model.objective(3000.0))
    assert engine.step(1e-3) is None and model.trainable["w"].item() == before
    assert engine.scaler.get_scale() == 2.0**9


def test_it_is_not_lowered_for_what_no_scale_helps() -> None:
    model, engine = opened()
    for objective in (model.objective(math.nan), model.trainable["w"].sqrt() * 1.0):  # whose gradient at 0 is infinite
        engine.backward(objective)
        assert engine.step(1e-3) is None
        assert engine.scaler.get_scale() < 2.0**16, "by the scaler, once a step"
        engine.scaler.load_state_dict(engine.scaler.state_dict() | {"scale": 2.0**16})
    engine.backward(model.objective(3.0))
    assert engine.step(1e-3) == 3.0


def test_a_resumed_run_goes_on_with_the_scale_it_had() -> None:
    model, engine = opened()
    engine.backward(model.objective(2.0**-9))
    engine.step(1e-3)
    other, resumed = opened()
    resumed.load_state(*engine.state())
    resumed.backward(other.objective(3.0))
    assert resumed.step(1e-3) is None, "as without the interruption"


def test_a_run_resumed_before_its_first_update_goes_on_searching() -> None:
    model, engine = opened()
    engine.backward(model.objective(math.nan))
    assert engine.step(1e-3) is None
    other, resumed = opened()
    resumed.load_state(*engine.state())
    resumed.backward(other.objective(3.0))
    assert resumed.step(1e-3) == 3.0, "as without the interruption"


def test_a_compiled_graph_is_differentiated_twice() -> None:
    """torch compiles it for one backward, in which its buffers are used again, unless told otherwise."""
    with torch._functorch.config.patch(donated_buffer=True):
        model, engine = opened("compile=true")
        cubed = torch.compile(lambda w: (torch.sin(w) + 1.0) ** 3, backend="aot_eager")
        engine.backward(cubed(model.trainable["w"]))
        assert engine.step(1e-3) == 3.0


@pytest.mark.parametrize(
    "method",
    [
        ["method=dpo", "beta=5000", "gradient_checkpointing=full"],
        ["method=spm", "train=full"],
        ["method=lrm", "train=full"],
    ],
)
def test_the_first_step_of_a_method_is_taken(one_level_config: MakeConfig, clip: str, method: list[str]) -> None:
    trainer = TrainJob.open(one_level_config(*method, f"clip={clip}", "precision=fp16", "batch_size=2")).trainer
    assert trainer.step(0)["grad_norm"] and trainer.skipped == 0
