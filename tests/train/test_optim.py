"""The learning rate as a function of the step, optimizers against their formulas, and exact resuming of each."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.runs import run_training
from fastpref.train.checkpoint import load_checkpoint
from fastpref.train.optim import build_optimizer, learning_rate_at, rate_jump

MakeConfig = Callable[..., Config]


def test_schedules_by_hand() -> None:
    base = ["learning_rate=1.0", "steps=110", "warmup_steps=10"]
    constant = load_config("", [*base, "lr_scheduler=constant"])
    assert [learning_rate_at(constant, s) for s in (0, 4, 9, 10, 109)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    linear = load_config("", [*base, "lr_scheduler=linear"])
    assert [learning_rate_at(linear, s) for s in (10, 60, 109)] == pytest.approx([1.0, 0.5, 0.01])
    cosine = load_config("", [*base, "lr_scheduler=cosine"])
    assert [learning_rate_at(cosine, s) for s in (10, 60)] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    ("scheduler", "step", "planned", "steps", "jump"),
    [
        ("cosine", 100, 100, 200, "from 0.000247 to 0.5"),  # (1 + cos(0.99 pi)) / 2, then half way
        ("linear", 100, 100, 200, "from 0.01 to 0.5"),
        ("linear", 50, 100, 60, "from 0.51 to 0.167"),  # fewer steps jump too
        ("constant", 100, 100, 200, ""),
        ("cosine", 100, 100, 100, ""),
        ("cosine", 0, 100, 200, ""),  # nothing was trained yet
        ("cosine", 100, None, 200, ""),  # a checkpoint from before this was noted
    ],
)
def test_other_steps_on_resume_say_how_the_rate_jumps(scheduler, step, planned, steps, jump) -> None:
    config = load_config("", ["learning_rate=1.0", f"steps={steps}", f"lr_scheduler={scheduler}"])
    said = rate_jump(config, step, planned)
    assert (jump in said and f"steps is {steps}, was {planned}" in said) if jump else said == ""


def test_a_resumed_run_says_that_its_rate_jumps(
    one_level_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ["name=longer", "method=sft", "lr_scheduler=cosine", "learning_rate=0.001"]
    run_training(one_level_config(*common, "steps=2"))
    assert "jumps" not in capfd.readouterr().err
    run_training(one_level_config(*common, "steps=8", "resume=auto"))
    # (1 + cos(pi/2)) / 2 of 0.001 in the last step, (1 + cos(pi/4)) / 2 in the next
    assert "jumps from 0.0005 to 0.000854: steps is 8, was 2" in " ".join(capfd.readouterr().err.split())


def test_adamw_takes_its_settings_from_the_config() -> None:
    config = load_config("", ["learning_rate=0.1", "adam_beta1=0.5", "adam_beta2=0.25", "weight_decay=0.5"])
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(config, [weight])
    weight.grad = torch.tensor([3.0])
    optimizer.step()
    # decoupled decay to 2 - 0.1*0.5*2 = 1.9; the bias-corrected first step is lr * g/|g| = 0.1
    assert weight.item() == pytest.approx(1.8, abs=1e-6)


def first_update(optimizer: str) -> torch.Tensor:
    """What one step without weight decay does to 64x128 zeros."""
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    opt = build_optimizer(load_config("", [f"optimizer={optimizer}", "learning_rate=0.1", "weight_decay=0"]), [weight])
    weight.grad = torch.randn(64, 128, generator=g)
    opt.step()
    return weight.detach() / weight.grad.sign()


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit", "lion8bit"])
def test_the_first_step_of_the_8bit_optimizers_is_the_sign(optimizer: str) -> None:
    """Adam's first step is lr * g/(|g| + eps), Lion's lr * sign(g)."""
    pytest.importorskip("bitsandbytes")
    assert torch.allclose(first_update(optimizer), torch.tensor(-0.1), atol=1e-4)


def test_missing_bitsandbytes_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optimizer lion8bit needs bitsandbytes.*pip install"):
        build_optimizer(load_config("", ["optimizer=lion8bit"]), [torch.nn.Parameter(torch.zeros(1))])


def test_an_unknown_optimizer_is_one_line() -> None:
    with pytest.raises(UserError, match=r"optimizer is 'adamm'.*adamw8bit"):
        load_config("", ["optimizer=adamm"])


IN_BACKWARD = ["train=full", "step_in_backward=true"]
RECIPES = {
    "adamw8bit": ["optimizer=adamw8bit", "train=full"],
    "lion8bit": ["optimizer=lion8bit", "train=full", "ema_decay=0.5"],
    "adafactor": ["optimizer=adafactor"],
    "in the backward": [*IN_BACKWARD, "ema_decay=0.5"],
    "pure bf16": [*IN_BACKWARD, "pure_bf16=true", "precision=bf16"],
    "pure bf16 adamw8bit": [*IN_BACKWARD, "pure_bf16=true", "precision=bf16", "optimizer=adamw8bit"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(one_level_config: MakeConfig, name: str) -> None:
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    settings = ["method=dpo", "beta=200", "batch_size=2", "learning_rate=1e-3", "threads=1", *RECIPES[name]]

    def trained(run: str, steps: int) -> dict[str, torch.Tensor]:
        config = one_level_config(*settings, f"name={run}", f"steps={steps}", "resume=auto")
        run_training(config)
        return load_checkpoint(config.run_dir / "checkpoints" / f"step-{steps:06d}").tensors

    whole, begun = trained("whole", 3), trained("parts", 1)
    assert any(not torch.equal(whole[key], begun[key]) for key in whole if key.startswith("policy."))
    parts = trained("parts", 3)
    assert whole.keys() == parts.keys() and any(key.startswith("optimizer.") for key in whole)
    for key, value in whole.items():
        assert value.dtype == parts[key].dtype and torch.equal(value, parts[key]), key
    moments = {value.dtype for key, value in whole.items() if key.endswith(("exp_avg", "state1"))}
    assert moments <= {torch.float32, torch.uint8}
