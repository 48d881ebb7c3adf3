"""One dtype in the pass: where casts are, what rounding costs against float64, and what the masters are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.config import Config
from fastpref.models.policy import Policy
from fastpref.runs import run_training
from fastpref.train.checkpoint import load_checkpoint
from fastpref.train.engine import LocalEngine
from fastpref.train.job import TrainJob
from fastpref.train.offline import OfflineTrainer

MakeConfig = Callable[..., Config]
# the UNet's ends: the prompts, the embeddings' sum, after the first convolution and before the last norm
ENDS = 4


class Casts(TorchDispatchMode):
    """Counts copies between floating dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func == torch.ops.aten._to_copy.default else args[1]
            if source.is_floating_point() and source.dtype != out.dtype:
                self.found[f"{source.dtype} to {out.dtype}"] += 1
        return out


def opened(config: Config) -> OfflineTrainer:
    trainer = TrainJob.open(config).trainer
    assert isinstance(trainer, OfflineTrainer)
    return trainer


def moved_away(policy: Policy, scale: float = 0.05) -> None:
    """Trained weights as if they had been trained: a LoRA that does something."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.trainable.items():
            step = scale if ".lora_B." in name else scale * 1e-2
            weight.add_(step * torch.randn(weight.shape, generator=random, dtype=torch.float32).to(weight.dtype))
    policy.masters.refresh()


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_nothing_is_cast_between_layers(one_level_config: MakeConfig, train: str, precision: str) -> None:
    trainer = opened(one_level_config("method=dpo", f"train={train}", f"precision={precision}", "fused_ops=false"))
    batch = trainer.batches.build(trainer.sampler.batch(0), slice(0, 2))
    inputs = batch.noisy, batch.timesteps, batch.conditioning
    for predict in (trainer.policy.predict, trainer.policy.predict_reference):
        with Casts() as casts:
            prediction = predict(*inputs)
        assert casts.found.total() == ENDS, casts.found
        assert prediction.dtype == torch.float32


def _predicted(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and a gradient of their errors, of weights that were moved away from the reference."""
    trainer = opened(config)
    moved_away(trainer.policy)
    loaded = trainer._take(0, 0)
    batch = trainer.batches.build(loaded.plan, loaded.rows, loaded.stored)
    scored = trainer._score(batch, trainer._reference_error(loaded, batch), graph=True)
    assert scored.backward is not None
    scored.backward(torch.tensor([1.0, -1.0] * batch.pairs).to(batch.noisy.dtype))
    found = [p.grad.flatten().double() for p in trainer.policy.trainable.values() if p.grad is not None]
    with torch.no_grad():
        prediction = trainer.policy.predict(batch.noisy, batch.timesteps, batch.conditioning)
    return prediction.double(), torch.cat(found)


def test_it_is_no_worse_than_autocast(sdxl_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the predictions and the gradient's angle, both against float64; benchmarks/numerics.py has more.

    The angles of one draw are equal to the spread of draws, some 40 % of 1 - cos.
    """
    monkeypatch.setattr("fastpref.train.offline.open_engine", LocalEngine)  # DeepSpeed's is no part of the comparison
    common = ["method=dpo", "beta=500", "batch_size=8", "learning_rate=1e-3"]
    exact, direction = _predicted(sdxl_config(*common, "precision=fp64"))
    errors, angles = [], []
    for engine in ("local", "deepspeed"):  # whose pass is autocast
        prediction, gradient = _predicted(sdxl_config(*common, "precision=bf16", f"engine={engine}"))
        errors.append(float((prediction - exact).square().mean().sqrt()))
        angles.append(1 - float(torch.nn.functional.cosine_similarity(gradient, direction, dim=0)))
    assert errors[0] <= errors[1] and angles[0] <= 1.8 * angles[1], (errors, angles)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_gradients_add_up_in_fp32_and_copies_follow_their_masters(one_level_config: MakeConfig, train: str) -> None:
    common = ["method=dpo", "precision=bf16", f"train={train}", "max_grad_norm=null", "learning_rate=1e-4"]
    trainer = opened(one_level_config(*common, "batch_size=3", "micro_batch_size=1"))
    masters = trainer.policy.masters
    pairs = [(masters.named[name], copy) for name, copy in masters.copies.items() if copy.dtype == torch.bfloat16]
    assert len(pairs) > 0.8 * len(masters.named) and all(master.dtype == torch.float32 for master, _ in pairs)
    halves: dict[int, list[torch.Tensor]] = {id(copy): [] for _, copy in pairs}
    for _, copy in pairs:
        own = halves[id(copy)]
        copy.register_hook(lambda gradient, own=own: own.append(gradient.float()))
    before = [master.detach().clone() for master, _ in pairs]
    sums: list[torch.Tensor] = []
    update = trainer.engine.optimizer.step  # type: ignore[attr-defined]

    def step() -> None:
        sums.extend(master.grad.clone() for master, _ in pairs)
        update()

    trainer.engine.optimizer.step = step  # type: ignore[attr-defined]
    trainer.step(0)
    for (master, copy), start, total in zip(pairs, before, sums, strict=True):
        assert copy.grad is None and master.grad is None
        assert torch.equal(copy, master.to(torch.bfloat16))
        assert torch.equal(total, reduce(torch.add, halves[id(copy)]))
        assert not torch.equal(master, start)
        assert (master - start).abs().max() <= 1.02e-4  # AdamW's first step: a bf16 weight near 1 would not move


@pytest.mark.parametrize("train", ["lora", "full"])
def test_what_is_saved_and_exported_are_the_masters(one_level_config: MakeConfig, train: str) -> None:
    """A run that stops goes on bit for bit, and its weights are not rounded to bf16."""
    common = ["method=dpo", "precision=bf16", f"train={train}", "ema_decay=0.5", "evaluate=false", "checkpoint_every=1"]
    states = []
    for name, parts in {"whole": ["steps=3"], "parts": ["steps=1", "steps=3"]}.items():
        for steps in parts:
            run_training(config := one_level_config(*common, f"name={name}", steps, "resume=auto"))
        states.append(load_checkpoint(config.run_dir / "checkpoints" / "step-000003").tensors)
    whole, resumed = states
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    average = {key.removeprefix("ema."): value for key, value in whole.items() if key.startswith("ema.")}
    exported = _exported(config.run_dir)
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    rounded = [torch.equal(value, value.bfloat16().float()) for value in average.values()]
    assert sum(rounded) < 0.5 * len(rounded)
    assert sum(map(_sum, average.values())) == pytest.approx(sum(map(_sum, exported.values())), rel=1e-12)


def _exported(run_dir: Path) -> dict[str, torch.Tensor]:
    file = run_dir / "pytorch_lora_weights.safetensors"
    return load_file(file if file.is_file() else run_dir / "unet" / "diffusion_pytorch_model.safetensors")


def _sum(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())
