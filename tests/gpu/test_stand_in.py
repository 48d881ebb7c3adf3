"""What the GPU tests ask for is there: their code on the stand-in GPU, and their recipes opened on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from diffusers import UNet2DConditionModel

from fastpref.config import Config
from fastpref.models import public
from fastpref.train.job import TrainJob

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_in_gpu import StandInGpu, on_gpu

MakeConfig = Callable[..., Config]


def _module(name: str) -> ModuleType:
    """A module beside this one; those of other folders have the same names."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


full_size, ledger, memory, ranks = (_module(f"test_{name}") for name in ("full_size", "ledger", "memory", "ranks"))
RECIPES = {f"memory {name}": [*memory.BASE, *more] for name, more in memory.RECIPES.items()}
RECIPES |= {f"ranks {name}": [*ranks.BASE, *more, "device=cpu"] for name, more in ranks.METHODS.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_store_has_the_batches_that_a_gpu_test_asks_for(sdxl_config: MakeConfig, name: str) -> None:
    TrainJob.open(sdxl_config(*RECIPES[name]))


def test_an_spo_round_on_the_stand_in(sdxl: Path, clip: Path, few_records: Path, tmp_path: Path) -> None:
    with StandInGpu():
        ranks.test_an_spo_round_and_update(sdxl, clip, few_records, tmp_path, "fp16")


SMALL = {
    **{"block_out_channels": (32, 32, 64), "transformer_layers_per_block": (1, 1, 1), "layers_per_block": 1},
    "attention_head_dim": (1, 1, 2),
}


def test_full_size_steps_on_the_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's UNet with few channels; SPO's round and the 8-bit optimizer are tried elsewhere, and recomputation."""
    shape = public.UNETS["sdxl"] | SMALL
    with torch.device("meta"):
        count = sum(p.numel() for p in UNet2DConditionModel(**shape).parameters())
    monkeypatch.setitem(public.UNETS, "sdxl", shape)
    monkeypatch.setitem(public.PARAMETERS, "sdxl", count)
    monkeypatch.setitem(full_size.full_size.COMMON, "resolution", 64)
    full_size.full_size.make_inputs(tmp_path, weights=False)
    settings = full_size.full_size.settings_of("rpo", tmp_path) | {"device": "cuda", "resolution": 64, "steps": 2}
    settings["gradient_checkpointing"] = "none"
    with StandInGpu(), mock.patch.object(torch.cuda, "reset_peak_memory_stats", lambda *_: None):
        empty, device = full_size.empty_unet(tmp_path / "model" / "unet"), full_size.resolve_device("auto")
        weights = full_size.DeviceWeights(empty, lambda: full_size.draw_weights(empty, device))
        with mock.patch.object(full_size.fastpref.models.policy, "load_unet", weights.load_unet):
            assert full_size.peak_of_finite_steps(full_size.parse_config(settings), weights, tmp_path) == 0
        assert {on_gpu(weight) for weight in weights._weights.values()} == {True}


def test_every_mode_of_recomputation_on_the_stand_in(sdxl_config: MakeConfig) -> None:
    with StandInGpu():
        found = full_size.peaks_by_mode(sdxl_config("method=rpo", "batch_size=2", "device=cuda", "cuda_graphs=false"))
    assert [*found] == ["full", "selective", "none"]


def test_the_probe_of_the_ledger_on_the_stand_in(capsys: pytest.CaptureFixture[str]) -> None:
    """On which every forward is repeatable and most changes change nothing."""
    tiny = {"block_out_channels": (32, 64), "transformer_layers_per_block": (1, 1), "attention_head_dim": (1, 2)}
    with StandInGpu():
        ledger.check_causes(capsys, {**tiny, "layers_per_block": 1}, rows=4, side=8)
