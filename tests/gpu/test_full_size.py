"""The full-size SDXL UNet on a GPU: RPO, SPO and full DPO steps, and their memory against the plan.

Its weights are drawn on the device, and a run is its steps alone: what a run writes is the same at any size.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import sdxl_full_size as full_size  # noqa: E402
from gpu_bench_world import DeviceWeights, draw_weights  # noqa: E402

import fastpref.models.policy  # noqa: E402
from fastpref.config import Config, parse_config  # noqa: E402
from fastpref.models.loading import empty_unet, resolve_device  # noqa: E402
from fastpref.models.recompute import MODES, set_recomputation  # noqa: E402
from fastpref.plan.report import make_plan, with_mode  # noqa: E402
from fastpref.train.job import TrainJob  # noqa: E402
from fastpref.train.reference import prepare_reference  # noqa: E402
from fastpref.watch import Watch  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sdxl")
    full_size.make_inputs(place, weights=False)
    return place


@pytest.fixture(scope="module")
def weights(folder: Path) -> Iterator[DeviceWeights]:
    """What every UNet that is opened meanwhile has."""
    empty, device = empty_unet(folder / "model" / "unet"), resolve_device("auto")
    made = DeviceWeights(empty, lambda: draw_weights(empty, device))
    with mock.patch.object(fastpref.models.policy, "load_unet", made.load_unet):
        yield made


@pytest.mark.parametrize("run", ["rpo", "spo", "dpo"])
def test_a_step_is_finite_and_needs_what_the_plan_says(
    folder: Path, weights: DeviceWeights, tmp_path: Path, run: str
) -> None:
    """To a tenth, which on the tiny models of other tests is what cuBLAS keeps for itself."""
    if run == "dpo":
        pytest.importorskip("bitsandbytes")
    config = parse_config(full_size.settings_of(run, folder) | {"device": "cuda"})
    measured = peak_of_finite_steps(config, weights, tmp_path)
    plan = make_plan(config, 1, "h100")
    assert abs(plan.peak(plan.best) / measured - 1) < 0.1


def peak_of_finite_steps(config: Config, weights: DeviceWeights, run_dir: Path) -> int:
    """Bytes of the device that the recipe's steps, of which each updates the weights, need at most."""
    weights.lent = config.train == "lora"
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer = TrainJob.open(config).trainer
    trainer.begin(run_dir, Watch())
    lines = [trainer.step(step) for step in range(config.steps)]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    return torch.cuda.max_memory_allocated()


def peaks_by_mode(config: Config) -> dict[str, int]:
    """Bytes at the peak of a step with every mode of gradient_checkpointing; the model is loaded once for all, and no
    step is recorded."""
    trainer, found = TrainJob.open(config).trainer, {}
    for number, mode in enumerate(reversed(MODES)):
        set_recomputation(trainer.policy.unet, mode)  # type: ignore[attr-defined]
        trainer.step(2 * number)  # the first one makes the optimizer's state
        torch.cuda.reset_peak_memory_stats()
        trainer.step(2 * number + 1)
        found[mode] = torch.cuda.max_memory_allocated()
    return found


def test_every_mode_of_recomputation_needs_what_the_plan_says(folder: Path, weights: DeviceWeights) -> None:
    weights.lent = True
    config = parse_config(full_size.settings_of("rpo", folder) | {"device": "cuda", "cuda_graphs": False})
    measured = peaks_by_mode(config)
    for mode in MODES:
        assert abs(make_plan(with_mode(config, mode), 1, "h100").best.total / measured[mode] - 1) < 0.1, measured


def test_a_ledger_needs_what_the_plan_says(folder: Path, weights: DeviceWeights) -> None:
    """Its fp32 weights are a copy of the bf16 ones, which are there before."""
    weights.lent = True
    weights.load_unet(folder, torch.bfloat16)
    config = parse_config(full_size.settings_of("rpo", folder) | {"device": "cuda", "reference": "ledger", "steps": 1})
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prepare_reference(config, progress=False)
    measured = torch.cuda.max_memory_allocated() - before
    assert abs(make_plan(config, 1, "h100").preparing["prepare --reference"].total / measured - 1) < 0.1
