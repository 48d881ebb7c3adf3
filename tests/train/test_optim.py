"""The learning rate as a function of the step, and an optimizer step against its formula."""

from __future__ import annotations

import pytest
import torch

from fastpref.config import load_config
from fastpref.train.optim import build_optimizer, learning_rate_at


def test_schedules_by_hand() -> None:
    base = ["learning_rate=1.0", "steps=110", "warmup_steps=10"]
    constant = load_config("", [*base, "lr_scheduler=constant"])
    assert [learning_rate_at(constant, s) for s in (0, 4, 9, 10, 109)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])
    linear = load_config("", [*base, "lr_scheduler=linear"])
    assert [learning_rate_at(linear, s) for s in (10, 60, 109)] == pytest.approx([1.0, 0.5, 0.01])
    cosine = load_config("", [*base, "lr_scheduler=cosine"])
    assert [learning_rate_at(cosine, s) for s in (10, 60)] == pytest.approx([1.0, 0.5])


def test_adamw_takes_its_settings_from_the_config() -> None:
    config = load_config("", ["learning_rate=0.1", "adam_beta1=0.5", "adam_beta2=0.25", "weight_decay=0.5"])
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(config, [weight])
    weight.grad = torch.tensor([3.0])
    optimizer.step()
    # decoupled decay to 2 - 0.1*0.5*2 = 1.9; the bias-corrected first step is lr * g/|g| = 0.1
    assert weight.item() == pytest.approx(1.8, abs=1e-6)
