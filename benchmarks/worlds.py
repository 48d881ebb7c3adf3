"""Models, records and prepared stores that the offline benchmarks train on, each made once in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import torch

from fastpref.config import Config, load_config
from fastpref.data.prepare import prepare
from fastpref.emoji import MODEL_DIR, TRAIN_PARQUET
from fastpref.models.loading import resolve_model_dir
from fastpref.train.offline import OfflineTrainer, open_trainer
from fastpref.train.reference import prepare_reference

MODELS = {
    "emoji": "the bundled SDXL, a UNet of 9.6 M parameters, 32 px",
    "mid": "a random UNet of 109 M parameters in its place",
    "random": "a random SDXL for trying things out",
}
BATCH = 8
COMMON = ["evaluate=false", "tracker=none", f"batch_size={BATCH}", "lora_rank=8", "beta=100", "learning_rate=1e-4"]
MID = {"block_out_channels": (96, 192, 384), "transformer_layers_per_block": (1, 2, 4), "attention_head_dim": (3, 6, 6)}


def open_world(model: str, folder: Path, pairs: int = 64) -> list[str]:
    """Settings of a recipe on ``model`` with a prepared store of the bundled pairs."""
    records, pipeline, clip, unet = folder / "records.parquet", "emoji", "emoji", ""
    folder.mkdir(parents=True, exist_ok=True)
    if not records.is_file():
        pq.write_table(pq.read_table(TRAIN_PARQUET).slice(0, pairs), records)
    if model == "random":
        from fastpref.emoji.random_models import make_random_clip, make_random_sdxl

        pipeline, clip = str(folder / "model"), str(folder / "clip")
        if not (folder / "clip" / "config.json").is_file():
            make_random_sdxl(pipeline, vae_factor=2)
            make_random_clip(clip)
    if model == "mid":
        unet = f"unet={mid_unet(folder / 'mid')}"
    where = [f"model={pipeline}", f"clip={clip}", f"records={records}", f"store={folder / 'store'}", "resolution=32"]
    settings = [*COMMON, *where, *([unet] if unet else [])]
    prepare(load_config("", settings), progress=False)
    return settings


def mid_unet(folder: Path) -> Path:
    """The bundled UNet's shape made wider and deeper, with random weights."""
    from diffusers import UNet2DConditionModel

    if not (folder / "config.json").is_file():
        shape = json.loads((MODEL_DIR / "unet" / "config.json").read_text())
        blocks = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        }
        torch.manual_seed(0)
        UNet2DConditionModel.from_config(shape | blocks | MID | {"layers_per_block": 2}).save_pretrained(folder)
    return folder


def trainer_of(settings: list[str], *overrides: str) -> OfflineTrainer:
    """A recipe's trainer; with reference=ledger its ledger is made first."""
    config = config_of(settings, *overrides)
    if config.reference == "ledger":
        prepare_reference(config, progress=False)
    return open_trainer(config, resolve_model_dir(config.model), torch.device("cpu"))


def config_of(settings: list[str], *overrides: str) -> Config:
    """The recipe; past one epoch its draws repeat."""
    return load_config("", [*settings, "draws=1", *overrides])
