"""Steps of every method on a device that is not the CPU: see ``stand_in_gpu``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_in_gpu import CUDA, MixedDevices, StandInGpu

from fastpref.config import Config, load_config
from fastpref.data.prepare import prepare
from fastpref.data.store import Store
from fastpref.models.loading import DTYPES
from fastpref.runs import run_training
from fastpref.train.checkpoint import load_checkpoint
from fastpref.train.job import TrainJob
from fastpref.train.reference import prepare_reference
from fastpref.train.stepwise import StepwiseTrainer
from fastpref.watch import Watch

Recipe = Callable[..., Config]
FULL = ["method=dpo", "train=full", "step_in_backward=true"]
STEPWISE = [
    *("resolution=16", "sample_steps=6", "plain_steps=2", "candidates=2", "rollout_prompts=2", "score_threshold=0"),
    *("batch_size=2", "micro_batch_size=1"),
]
METHODS = {
    "sft": ["method=sft"],
    "dpo": ["method=dpo", "micro_batch_size=2", "safeguard=0.9", "ema_decay=0.9", "caption_dropout=0.5"],
    "dpo fp16": ["method=dpo", "precision=fp16"],
    "rpo, all graphs, bf16": ["method=rpo", "micro_batch_size=2", "accumulation=keep_graphs", "precision=bf16"],
    "rpo, norms recomputed": ["method=rpo", "gradient_checkpointing=selective", "fused_ops=true"],
    "dpo, all recomputed": ["method=dpo", "gradient_checkpointing=full", "attention=sliced"],
    "rpo, a copy as reference": ["method=rpo", "micro_batch_size=2", "train=full", "reference=copy"],
    "rpo, ledger": ["method=rpo", "reference=ledger", "max_grad_norm=null"],
    "dpo, ledger, bf16": ["method=dpo", "reference=ledger", "micro_batch_size=2", "precision=bf16"],
    "adafactor": ["method=dpo", "train=full", "optimizer=adafactor"],
    "step in backward": [*FULL, "ema_decay=0.9"],
    "pure bf16, adamw8bit": [*FULL, "pure_bf16=true", "precision=bf16", "optimizer=adamw8bit"],
    "spm": ["method=spm", "train=full"],
    "lrm": ["method=lrm", "train=full"],
    "spo": ["method=spo", *STEPWISE],
    "lpo": ["method=lpo", *STEPWISE, "resolution=32"],
    "spo, inner steps, fp16": ["method=spo", "inner_steps=1", "precision=fp16", *STEPWISE],
}


# bitsandbytes and Adafactor wait at every tensor themselves
WAITING = ("elif bool(finite)", "self.optimizer.step()", "elif bool(bad):  # Adafactor and bitsandbytes")


@pytest.fixture
def recipe(sdxl_config: Recipe, clip: Path, few_records: Path, one_level_unet: Path) -> Recipe:
    files = [f"clip={clip}", f"records={few_records}", f"unet={one_level_unet}"]
    return lambda *more: sdxl_config(*files, "vae_precision=fp32", "batch_size=4", "resolution=32", *more)


def launched(config: Config, run_dir: Path, gpu: StandInGpu | None = None) -> list[dict[str, Any]]:
    """Metrics of two steps; ``gpu`` has counted what the second waits for, in which nothing is new."""
    if config.reference == "ledger":
        prepare_reference(config, progress=False)
    trainer = TrainJob.open(config).trainer
    run_dir.mkdir()
    trainer.begin(run_dir, Watch())
    first = trainer.launch(0)
    if gpu is not None:
        gpu.waits.clear()
    second = trainer.launch(1)
    if gpu is not None:
        assert gpu.waits.keys() <= {wait for wait in gpu.waits if any(place in wait for place in WAITING)}
    return [first(), second()]


@pytest.mark.parametrize("name", METHODS)
def test_a_step_on_a_gpu_is_that_of_the_cpu_and_waits_for_nothing(recipe: Recipe, tmp_path: Path, name: str) -> None:
    """To some roundings of what the step computes in: attention is another formula there."""
    settings = [*METHODS[name], "steps=2"]
    if name == "lpo":
        TrainJob.open(recipe(*METHODS["lrm"])).trainer.export(tmp_path)
        settings.append(f"scorer={tmp_path / 'latent_reward_model'}")
    with StandInGpu() as gpu:
        found = launched(recipe(*settings, "device=cuda"), tmp_path / "gpu", gpu)
    config = recipe(*settings, "device=cpu")
    expected = launched(config, tmp_path / "cpu")
    for key in ("err_winner", "score_winner", "ratio_winner"):
        if found[0].get(key) is not None:
            assert found[0][key] == pytest.approx(expected[0][key], rel=64 * torch.finfo(DTYPES[config.precision]).eps)
    assert all(line["grad_norm"] for line in found)


@pytest.mark.parametrize("name", ["dpo", "spo"])
def test_a_run_on_a_gpu_from_checkpoint_to_pictures(recipe: Recipe, name: str) -> None:
    """Resumed between two steps it is the run in one go, bit for bit; at its end it draws."""
    settings = [*METHODS[name], "device=cuda", "checkpoint_every=1", "resume=auto", "eval_prompts=1", "eval_seeds=1"]
    runs = {"whole": ["steps=2"], "parts": ["steps=1", "steps=2"]}
    weights = []
    with StandInGpu():
        for run, parts in runs.items():
            for steps in parts:
                drawn = f"evaluate={str(len(parts) == 1).lower()}"
                run_training(config := recipe(*settings, f"name={run}", steps, drawn))
            weights.append(load_checkpoint(config.run_dir / "checkpoints" / "step-000002").tensors)
    whole, resumed = weights
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", ["spo", "lpo"])
def test_a_round_waits_for_the_gpu_once_it_is_rolled_out(recipe: Recipe, tmp_path: Path, name: str) -> None:
    """Between its first and its last UNet call, with the scoring that is launched there, the host is never kept."""
    settings = [*METHODS[name], "steps=2"]
    if name == "lpo":
        TrainJob.open(recipe(*METHODS["lrm"])).trainer.export(tmp_path)
        settings.append(f"scorer={tmp_path / 'latent_reward_model'}")
    seen: list[int] = []
    with StandInGpu() as gpu:
        trainer = TrainJob.open(recipe(*settings, "device=cuda")).trainer
        assert isinstance(trainer, StepwiseTrainer)
        trainer.begin(tmp_path, Watch())
        predict = trainer.policy.predict
        trainer.policy.predict = lambda *rows: (seen.append(gpu.waits.total()), predict(*rows))[1]  # type: ignore
        trainer._collect(0)
    assert len(seen) > 1 and len(set(seen)) == 1, gpu.waits


def test_a_store_prepared_on_a_gpu_is_that_of_the_cpu(
    sdxl: Path, clip: Path, few_records: Path, sdxl_store: Path, tmp_path: Path
) -> None:
    """In fp32, to some roundings."""
    settings = [f"model={sdxl}", f"clip={clip}", f"records={few_records}", f"store={tmp_path}", "device=cuda"]
    more = ["resolution=32", "posterior=true", "flips=true", "vae_precision=fp32", "shard_size=10"]
    with StandInGpu():
        prepare(load_config("", [*settings, *more]), progress=False)
    found, expected = Store.open(tmp_path), Store.open(sdxl_store)
    rows = np.arange(len(expected))
    for one, other in ((found.batch(rows), expected.batch(rows)), (found.clip_batch(rows), expected.clip_batch(rows))):
        for field in fields(other):
            value = getattr(other, field.name)
            if value is not None:  # kept in half precision
                torch.testing.assert_close(getattr(one, field.name).float(), value.float(), rtol=1e-2, atol=4e-3)


def test_the_stand_in_refuses_what_a_gpu_refuses_and_counts_what_it_waits_for() -> None:
    with StandInGpu() as gpu:
        there, here = torch.zeros(2, device=CUDA), torch.ones(2)
        for mixed in (
            lambda: there + here,
            lambda: torch.stack([there[0], here[0]]),
            lambda: torch.cat([there, here]),
            lambda: there.index_select(0, torch.tensor([0])),
            lambda: there.random_(generator=torch.Generator()),
        ):
            with pytest.raises(MixedDevices):
                mixed()
        assert not gpu.waits
        assert torch.equal((there + here[0]).cpu(), here) and gpu.waits.total() == 1
        gpu.waits.clear()
        waits = [there.sum().item, there.nonzero, lambda: bool(there.any()), lambda: there[there > 0], there.cpu]
        waits += [lambda: here.to(CUDA), lambda: there.copy_(here), lambda: there[torch.tensor([0])]]
        for wait in waits:
            wait()
        assert gpu.waits.total() == len(waits)
        pinned, table = here.pin_memory(), torch.ones(2, 3).pin_memory()
        assert pinned.is_pinned() and pinned[1:].is_pinned() and pinned.pin_memory() is pinned and not here.is_pinned()
        (
            pinned.to(CUDA, non_blocking=True),
            there.copy_(pinned, non_blocking=True),
            table[1:].to(CUDA, non_blocking=True),
        )
        with pytest.raises(RuntimeError, match="single memory location"):
            here[:1].expand(2).pin_memory()
        arrived = there.to("cpu", non_blocking=True)
        arrived.copy_(there, non_blocking=True)
        assert gpu.waits.total() == len(waits)
        pageable = [lambda: here.to(CUDA, non_blocking=True), lambda: here.copy_(there, non_blocking=True)]
        pageable += [lambda: there.copy_(here, non_blocking=True), lambda: table.T.to(CUDA, non_blocking=True)]
        pageable += [lambda: torch._foreach_copy_([there, there], [here, pinned], non_blocking=True)]
        for copy in pageable:
            copy()
        assert gpu.waits.total() == len(waits) + len(pageable)
        weight = torch.nn.Parameter(there)
        with torch.autocast("cuda", torch.bfloat16):
            assert (weight[None] @ weight[:, None]).dtype == torch.bfloat16
