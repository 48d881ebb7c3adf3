"""What the GPU tests ask for is there: their code on the stand-in GPU, and their recipes opened on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fastpref.config import Config
from fastpref.train.job import TrainJob

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_in_gpu import StandInGpu

MakeConfig = Callable[..., Config]


def _module(name: str) -> ModuleType:
    """A module beside this one; those of other folders have the same names."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


memory, ranks = _module("test_memory"), _module("test_ranks")
RECIPES = {f"memory {name}": [*memory.BASE, *more] for name, more in memory.RECIPES.items()}
RECIPES |= {f"ranks {name}": [*ranks.BASE, *more, "device=cpu"] for name, more in ranks.METHODS.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_the_store_has_the_batches_that_a_gpu_test_asks_for(sdxl_config: MakeConfig, name: str) -> None:
    TrainJob.open(sdxl_config(*RECIPES[name]))


def test_an_spo_round_on_the_stand_in(sdxl: Path, clip: Path, few_records: Path, tmp_path: Path) -> None:
    with StandInGpu():
        ranks.test_an_spo_round_and_update(sdxl, clip, few_records, tmp_path, "fp16")
