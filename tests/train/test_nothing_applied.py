"""A run that changed nothing, or whose weights are not finite, is an error and leaves no result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.runs import run_training
from fastpref.train.engine import LocalEngine

Recipe = Callable[..., Config]
RESULTS = ("*.safetensors", "unet/*", "step_preference_model/*", "latent_reward_model/*", "exports/*/*", "best/*")
SPO = ("sample_steps=6", "plain_steps=2", "candidates=3", "rollout_prompts=3", "resolution=16", "score_threshold=0.05")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``poison(n)``: the gradients of the first n steps are NaN."""
    launch = LocalEngine.launch

    def install(count: int) -> None:
        left = [count]

        def poisoned(self: LocalEngine, rate: float, loss: torch.Tensor) -> torch.Tensor:
            if left[0] > 0:
                left[0] -= 1
                for parameter in self.parameters:
                    if parameter.grad is not None:
                        parameter.grad.fill_(torch.nan)
            return launch(self, rate, loss)

        monkeypatch.setattr(LocalEngine, "launch", poisoned)

    return install


@pytest.fixture
def brightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A scorer for SPO."""
    (tmp_path / "nothing_scorer.py").write_text(
        "def score(images, prompts, t):\n    return 100 * images.mean(dim=(1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "nothing_scorer:score"


def results(config: Config) -> list[Path]:
    return [path for pattern in RESULTS for path in config.run_dir.glob(pattern)]


@pytest.mark.parametrize(
    "settings",
    [
        ("method=dpo", "steps=1"),
        ("method=dpo", "steps=1", "precision=fp16"),
        ("method=sft", "train=full", "steps=3", "ema_decay=0.9", "export_checkpoints=true", "checkpoint_every=1"),
        ("method=rpo", "weight=uniform", "steps=2", "keep_best=loss", "checkpoint_every=1"),
        ("method=lrm", "train=full", "steps=1"),
        ("method=spm", "train=full", "steps=1", "clip=CLIP"),
        ("method=spo", "steps=1", "records=RECORDS", "scorer=SCORER", *SPO),
    ],
    ids=lambda settings: " ".join(settings[:3]),
)
def test_a_run_of_which_no_step_was_applied_is_an_error_without_a_result(
    one_level_config: Recipe, clip: Path, few_records: Path, brightness: str, poison: Any, settings: tuple[str, ...]
) -> None:
    names = {"CLIP": str(clip), "RECORDS": str(few_records), "SCORER": brightness}
    for name, value in names.items():
        settings = tuple(setting.replace(f"={name}", f"={value}") for setting in settings)
    config = one_level_config("name=a", *settings)
    poison(config.steps)
    with pytest.raises(UserError, match=rf"none of {config.steps} steps was applied") as caught:
        run_training(config)
    assert "\n" not in str(caught.value)
    assert (config.run_dir / "metrics.jsonl").is_file() and not results(config)


def test_one_applied_step_is_a_result(one_level_config: Recipe, poison: Any) -> None:
    config = one_level_config("name=a", "method=dpo", "steps=2", "export_checkpoints=true", "checkpoint_every=1")
    poison(1)
    run_training(config)
    assert {path.parent.name for path in results(config)} == {"a", "step-000002"}, "the first changed nothing"


@pytest.mark.parametrize("settings", [("method=dpo",), ("method=sft", "train=full"), ("method=lrm", "train=full")])
def test_weights_that_are_not_finite_are_not_exported(one_level_config: Recipe, settings: tuple[str, ...]) -> None:
    """A finite gradient and a learning rate that fp32 does not hold."""
    config = one_level_config("name=a", "steps=1", "learning_rate=1e39", *settings)
    with pytest.raises(UserError, match=r"NaN or infinite .* nothing is exported"):
        run_training(config)
    assert not results(config)
