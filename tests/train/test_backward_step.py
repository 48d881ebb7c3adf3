"""The optimizer step inside the backward and stochastic rounding: equal to the ordinary step, in the mean for bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.models.half_pass import wide_names
from fastpref.train.backward_step import BackwardEngine, round_to_bf16
from fastpref.train.engine import LocalEngine, open_engine
from fastpref.train.job import TrainJob

MakeConfig = Callable[..., Config]
FULL = ["method=dpo", "beta=200", "batch_size=2", "train=full", "learning_rate=1e-3"]
BACKWARD = ["train=full", "step_in_backward=true", "method=dpo"]
PURE = [*BACKWARD, "pure_bf16=true", "precision=bf16"]


class Weights:
    """A few parameters in training."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.trainable = {f"w{i}": torch.nn.Parameter(t) for i, t in enumerate(tensors)}
        self.device = torch.device("cpu")


def small_engine(model: Weights, *overrides: str) -> BackwardEngine:
    engine = open_engine(model, load_config("", [*BACKWARD, "weight_decay=0", "max_grad_norm=null", *overrides]))
    assert isinstance(engine, BackwardEngine)
    return engine


def test_it_is_the_ordinary_step_bit_for_bit(one_level_config: MakeConfig) -> None:
    results = []
    inside_backward = "step_in_backward=true"
    kinds = ([], [inside_backward], *([inside_backward, f"gradient_checkpointing={m}"] for m in ("selective", "full")))
    for extra in kinds:
        trainer = TrainJob.open(one_level_config(*FULL, "max_grad_norm=null", "warmup_steps=2", *extra)).trainer
        metrics = [trainer.step(step) for step in range(3)]
        results.append((metrics, {n: p.detach().clone() for n, p in trainer.policy.trainable.items()}))
    plain, expected = results.pop(0)
    for inside, found in results:
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        for a, b in zip(plain, inside, strict=True):
            assert a["loss"] == b["loss"] and a["lr"] == b["lr"]
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)


def count_gradients(parameters: list[torch.nn.Parameter]) -> int:
    return sum(parameter.grad is not None for parameter in parameters)


def test_gradients_are_never_all_alive(one_level_config: MakeConfig) -> None:
    """When a tensor is updated, no gradient of another one waits."""
    trainer = TrainJob.open(one_level_config(*FULL, "step_in_backward=true")).trainer
    parameters, alive = list(trainer.policy.trainable.values()), []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters))
        )
    trainer.step(0)
    assert len(alive) == len(parameters) and max(alive) == 0


def test_clipping_is_tensor_by_tensor_and_a_bad_tensor_is_skipped_and_counted() -> None:
    model = Weights(torch.zeros(4), torch.zeros(4), torch.zeros(1))
    engine = small_engine(model, "max_grad_norm=2.0", "adam_epsilon=1e3", "learning_rate=1.0")
    a, b, c = model.trainable.values()
    engine.begin(0, 1.0)
    engine.backward((a * 3.0).sum() + (b * 0.5).sum() + c.sqrt().sum())
    # with a large epsilon the first step is lr * g / epsilon: clipped from norm 6 to 2, and from 1 to 1
    assert torch.allclose(a, torch.tensor(-1e-3), rtol=2e-3) and torch.allclose(b, torch.tensor(-5e-4), rtol=2e-3)
    assert c.item() == 0.0 and engine.skipped_tensors == 1
    assert engine.step(1.0) is None


def test_a_bad_tensor_does_not_stop_the_good_ones_of_the_next_step() -> None:
    model = Weights(torch.zeros(4))
    engine = small_engine(model)
    (weight,) = model.trainable.values()
    engine.begin(0, 1.0)
    engine.backward((weight * torch.nan).sum())
    assert engine.step(1.0) is None and engine.skipped_tensors == 0 and not weight.any()
    engine.begin(1, 1.0)
    engine.backward((weight * 3.0).sum())
    assert engine.step(1.0) == pytest.approx(6.0) and torch.allclose(weight, torch.tensor(-1.0))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit", "adafactor"])
@pytest.mark.parametrize("bad", ["the tensor", "the objective"])
@pytest.mark.parametrize("when", [0, 1])
def test_a_tensor_that_is_skipped_keeps_its_weights_and_its_optimizer_state(
    optimizer: str, bad: str, when: int
) -> None:
    """As if that step had not been; under an objective that is not finite that holds for every tensor."""
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    found = []
    for spoilt in (True, False):
        model = Weights(torch.ones(4100), torch.ones(3))
        engine = small_engine(model, f"optimizer={optimizer}", "max_grad_norm=1.0", "ema_decay=0.5")
        a, b = model.trainable.values()
        for step in range(3):
            left_out = step == when and not spoilt
            if left_out and bad == "the objective":
                continue
            engine.begin(step, 1e-2)
            first = torch.zeros(()) if left_out else (a * 1.5).sin().sum()
            if step == when and spoilt:
                first = first + (a * 0).sqrt().sum() if bad == "the tensor" else first * torch.nan
            engine.backward(first + (b * b).sum())
            norm = engine.launch(1e-2, torch.zeros(()))
            assert bool(torch.isfinite(norm)) == (not spoilt or step != when)
        assert engine.skipped_tensors == (spoilt and bad == "the tensor")
        tensors, values = engine.state()
        found.append((dict(tensors), values["optimizer"]))
    (tensors, numbers), (expected, expected_numbers) = found
    # what a fused optimizer or EMA makes for a tensor it has not updated yet are zeros, or the weights
    assert tensors.keys() == expected.keys() and numbers == expected_numbers
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_the_mean_of_many_roundings_is_the_value() -> None:
    g = torch.Generator().manual_seed(3)
    values = torch.randn(4096, generator=g) * torch.logspace(-6, 3, 4096)
    draws = torch.stack([round_to_bf16(values, key).double() for key in range(2000)])
    inner, one = (values.view(torch.int32) & -(1 << 16)), 1 << 16
    low, high = inner.view(torch.float32).double(), (inner + one).view(torch.float32).double()
    assert bool(((draws == low) | (draws == high)).all())
    error = (draws.mean(dim=0) - values.double()).abs() / (high - low).abs()
    # the mean of 2000 coins has a standard deviation of at most 0.5/sqrt(2000) = 0.0112 steps; 4096 are looked at
    assert float(error.max()) < 5.0 * 0.0112
    assert float(error.mean()) < 0.0112
    exact = values.bfloat16().float()
    assert torch.equal(round_to_bf16(exact, 0).float(), exact)
    assert torch.equal(round_to_bf16(values, 7), round_to_bf16(values, 7))
    assert not torch.equal(round_to_bf16(values, 7), round_to_bf16(values, 8))


def updated(weights: torch.Tensor, *overrides: str) -> torch.Tensor:
    model = Weights(weights.clone())
    engine = small_engine(model, *overrides)
    (weight,) = model.trainable.values()
    engine.begin(0, 2e-5)
    engine.backward(weight.float().sum())
    engine.step(2e-5)
    return weight.detach()


def test_at_2e_5_plain_bf16_loses_most_updates_and_stochastic_rounding_none_in_the_mean(
    one_level_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of standard deviation 0.02, as SDXL's are; one AdamW step, which is the learning rate."""
    g = torch.Generator().manual_seed(0)
    weights = (0.02 * torch.randn(512, 512, generator=g)).bfloat16()
    wanted = (updated(weights.float()) - weights.float()).double()
    assert torch.allclose(wanted, torch.tensor(-2e-5, dtype=torch.float64), rtol=1e-2)
    nearest = updated(weights.float()).bfloat16() - weights
    lost = float((nearest == 0).double().mean())
    moved = torch.stack([(updated(weights, *PURE, f"seed={s}") - weights).double() for s in range(8)])
    mean = float(moved.mean() / wanted.mean())
    plain = float(nearest.double().mean() / wanted.mean())
    with capsys.disabled():
        print(
            f"\nbf16 at lr 2e-5: rounding to nearest leaves {lost:.0%} of the weights as they were and makes ", end=""
        )
        print(f"{plain:.2f} of the mean update; stochastic rounding makes {mean:.3f} of it")
    assert lost > 0.6
    assert abs(mean - 1.0) < 0.02
    accumulated = weights.clone()
    for step in range(200):
        accumulated = round_to_bf16(accumulated.float() - 2e-5, step)
    assert float((accumulated.double() - weights.double()).mean()) == pytest.approx(-200 * 2e-5, rel=0.01)


def test_pure_bf16_weights_and_training(one_level_config: MakeConfig) -> None:
    trainer = TrainJob.open(one_level_config(*FULL, *PURE, "max_grad_norm=1.0")).trainer
    before = {n: p.detach().clone() for n, p in trainer.policy.trainable.items()}
    losses = [trainer.step(step)["loss"] for step in range(3)]
    wide = wide_names(trainer.policy.unet)
    for name, parameter in trainer.policy.trainable.items():
        assert parameter.dtype == (torch.float32 if name in wide else torch.bfloat16), name
    assert all(torch.isfinite(torch.tensor(losses)))
    changed = [not torch.equal(p, before[n]) for n, p in trainer.policy.trainable.items()]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize(
    "settings",
    [
        ["train=lora"],
        ["method=spo"],
        ["micro_batch_size=4"],
        ["precision=fp16"],
        ["engine=deepspeed"],
        ["pure_bf16=true"],
        ["pure_bf16=true", "precision=bf16", "ema_decay=0.9"],
    ],
)
def test_what_does_not_go_with_it_is_one_line(settings: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load_config("", [*BACKWARD, *settings])
    assert "\n" not in str(refused.value)


def test_the_ordinary_engine_is_the_default() -> None:
    assert type(open_engine(Weights(torch.zeros(1)), load_config("", []))) is LocalEngine
