"""Tiny random pipelines and a prepared store of real emoji pairs, made once per process."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers of several folders' tests are modules beside this one
os.environ.setdefault("HF_HUB_OFFLINE", "1")
SMALL = ["records=RECORDS", "resolution=32", "evaluate=false", "tracker=none", "shard_size=10"]
# The modules that take longest, first: none of them runs alone at the end while the other workers have nothing to do.
LONGEST = [
    *("train/test_ranks", "plan/test_plan", "train/test_device", "train/test_compiled", "tests/test_keyed_targets"),
    *("tests/test_ddim_pool_step", "tests/test_workloads", "tests/test_rpo_loss", "train/test_lost_ranks"),
    *("train/test_offline", "tests/test_implicit_reward", "train/test_stepwise", "models/test_single_file"),
    *("tests/test_paired_preference_loss", "models/test_lora_files", "tests/test_custom_ops", "train/test_run"),
    *(
        "train/test_survival",
        "execution/test_execution",
        "train/test_lrm",
        "train/test_step_memory",
        "tests/test_patch",
    ),
    *("gpu/test_stand_in", "tests/test_keyed_noise", "tests/test_packaging", "benchmarks/test_gpu_bench"),
    *("train/test_spm", "tests/test_export", "train/test_size_conditioning", "static/test_static", "train/test_graphs"),
    *("train/test_ledger", "train/test_ledger_precision", "train/test_long_captions", "tests/test_quickstart"),
    *("benchmarks/test_devices", "plan/test_choice", "plan/test_phases", "fuzz/test_fuzz", "data/test_resume"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(f"{item.path.parent.name}/{item.path.stem}", len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Importing the modules leaves a million objects and no garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        _freeze()


def _freeze() -> None:
    """What libraries have left stays: no collection looks through it again, which took a tenth of all tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def imported_later() -> None:
    """Libraries import more of themselves when it is first used."""
    if len(gc.get_objects(generation=2)) > 50_000:
        _freeze()


@pytest.fixture(autouse=True)
def threads_as_given() -> Iterator[None]:
    """A run with ``threads=1`` leaves no trace: processes that later tests start have the number that was given, and
    bits depend on it."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    yield
    if torch and torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL folder, ε-prediction."""
    from fastpref.emoji.random_models import make_random_sdxl

    return make_random_sdxl(tmp_path_factory.mktemp("models") / "sdxl", vae_factor=2)


@pytest.fixture(scope="session")
def one_level_unet(tmp_path_factory: pytest.TempPathFactory, sdxl: Path) -> Path:
    """A UNet for it of one level with attention on its way down: for what costs by the module."""
    import torch
    from diffusers import UNet2DConditionModel

    one_level = {"down_block_types": ["CrossAttnDownBlock2D"], "mid_block_type": "UNetMidBlock2D"}
    one_level |= {"up_block_types": ["UpBlock2D"], "block_out_channels": [16]}
    settings = json.loads((sdxl / "unet" / "config.json").read_text())
    folder = tmp_path_factory.mktemp("models") / "one_level_unet"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel.from_config({**settings, **one_level}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD1.5 folder, v-prediction."""
    from fastpref.emoji.random_models import make_random_sd15

    return make_random_sd15(tmp_path_factory.mktemp("models") / "sd15", vae_factor=2, prediction_type="v_prediction")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP folder."""
    from fastpref.emoji.random_models import make_random_clip

    return make_random_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def few_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 of the bundled pairs as a parquet file of their own."""
    import pyarrow.parquet

    from fastpref.emoji import TRAIN_PARQUET

    path = tmp_path_factory.mktemp("records") / "few.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(TRAIN_PARQUET).slice(0, 40), path)
    return path


@pytest.fixture(scope="session")
def sdxl_store(tmp_path_factory: pytest.TempPathFactory, sdxl: Path, clip: Path, few_records: Path) -> Path:
    """The 40 pairs prepared for the random SDXL, with CLIP embeddings, posterior and flips."""
    store = tmp_path_factory.mktemp("stores") / "sdxl"
    _prepare(sdxl, few_records, store, f"clip={clip}", "posterior=true", "flips=true")
    return store


@pytest.fixture(scope="session")
def sd15_store(tmp_path_factory: pytest.TempPathFactory, sd15: Path, clip: Path, few_records: Path) -> Path:
    """The 40 pairs prepared for the random SD1.5."""
    store = tmp_path_factory.mktemp("stores") / "sd15"
    _prepare(sd15, few_records, store, f"clip={clip}")
    return store


@pytest.fixture(scope="session")
def sdxl_config_in(sdxl: Path, sdxl_store: Path) -> Callable[..., Any]:
    """``sdxl_config_in(folder)("steps=3", …)``: a small recipe on the random SDXL, writing below the folder."""
    return lambda folder: _recipe(sdxl, sdxl_store, folder)


@pytest.fixture
def sdxl_config(sdxl_config_in: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """The same, writing below the test's own folder."""
    return sdxl_config_in(tmp_path)


@pytest.fixture
def one_level_config(sdxl_config: Callable[..., Any], one_level_unet: Path) -> Callable[..., Any]:
    """``sdxl_config`` with the UNet of one level."""
    return lambda *overrides: sdxl_config(f"unet={one_level_unet}", *overrides)


@pytest.fixture(scope="session")
def sd15_config_in(sd15: Path, sd15_store: Path) -> Callable[..., Any]:
    """``sdxl_config_in`` on the random SD1.5."""
    return lambda folder: _recipe(sd15, sd15_store, folder)


@pytest.fixture
def sd15_config(sd15_config_in: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """The same, writing below the test's own folder."""
    return sd15_config_in(tmp_path)


def _recipe(model: Path, store: Path, tmp_path: Path) -> Callable[..., Any]:
    from fastpref.config import load_config

    base = [f"model={model}", f"store={store}", f"output_dir={tmp_path}/runs", "batch_size=8", "lora_rank=4"]
    return lambda *overrides: load_config("", [*SMALL[1:], *base, *overrides])


def _prepare(model: Path, records: Path, store: Path, *overrides: str) -> None:
    from fastpref.config import load_config
    from fastpref.data.prepare import prepare

    settings = [f"model={model}", f"store={store}", f"records={records}", *SMALL[1:], *overrides]
    prepare(load_config("", settings), progress=False)
