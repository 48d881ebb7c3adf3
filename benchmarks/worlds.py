"""Models, records and prepared stores that the offline benchmarks train on, each made once in a folder."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from common import ROOT, provenance
from devices import CPU, device_of, name_of, open_device

from fastpref.config import Config, load_config
from fastpref.data.prepare import prepare
from fastpref.emoji import MODEL_DIR, TRAIN_PARQUET
from fastpref.errors import UserError
from fastpref.models import public
from fastpref.models.loading import model_dir_of, resolve_device
from fastpref.train.offline import OfflineTrainer, open_trainer
from fastpref.train.reference import prepare_reference

MODELS = {
    "emoji": "the bundled SDXL, a UNet of 9.6 M parameters, 32 px",
    "mid": "a random UNet of 109 M parameters in its place",
    "full": "SDXL's UNet of 2,567 M parameters, VAE and text encoders, random bf16 weights, 512 px, 1 pair a forward",
    "random": "a random SDXL for trying things out",
}
COMPILED = {"False": "", "True": ", compiled", "unet": ", one graph"}  # the setting compile, in a row and a table
ENCODERS = ("vae", "text_encoder", "text_encoder_2")
BATCH = 8
COMMON = ["evaluate=false", "tracker=none", f"batch_size={BATCH}", "lora_rank=8", "beta=100", "learning_rate=1e-4"]
MID = {"block_out_channels": (96, 192, 384), "transformer_layers_per_block": (1, 2, 4), "attention_head_dim": (3, 6, 6)}
_HOST = torch.device("cpu")


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a measured row stands in a table: the CPU first, eager first, models as :data:`MODELS` lists them."""
    return device_of(row) != CPU, device_of(row), str(row["compile"]), list(MODELS).index(row["model"])


def setting_of(row: dict[str, Any]) -> str:
    """What a table calls the row's model, compiled or not, and its device unless that is the CPU."""
    where = "" if device_of(row) == CPU else f", {device_of(row)}"
    return f"{row['model']}{COMPILED[str(row['compile'])]}{where}"


def add_compile(parser: argparse.ArgumentParser, help: str) -> None:
    """``--compile [blocks|unet]``, stored as a key of :data:`COMPILED`."""
    parser.set_defaults(compile="False")
    parser.add_argument("--compile", nargs="?", const="blocks", choices=("blocks", "unet"), action=_Compile, help=help)


class _Compile(argparse.Action):
    def __call__(self, _: Any, found: argparse.Namespace, value: Any, option: str | None = None) -> None:
        found.compile = "True" if value == "blocks" else value


def open_world(model: str, folder: Path, device: Sequence[str] = (), pairs: int = 64) -> list[str]:
    """Settings of a recipe on ``model`` with a prepared store of the bundled pairs; ``device`` is among them."""
    if model == "full":
        return open_full_size(device)
    records, clip = folder / "records" / "train.parquet", "emoji"  # alone in its folder, as public scripts want it
    pipeline = {"emoji": "emoji", "mid": str(folder / "mid"), "random": str(folder / "model")}[model]
    if not records.is_file():
        records.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(TRAIN_PARQUET).slice(0, pairs), records)
    if model == "random":
        from fastpref.emoji.random_models import make_random_clip, make_random_sdxl

        clip = str(folder / "clip")
        if not (folder / "clip" / "config.json").is_file():
            make_random_sdxl(pipeline, vae_factor=2)
            make_random_clip(clip)
    if model == "mid":
        make_mid(Path(pipeline))
    where = [f"model={pipeline}", f"clip={clip}", f"records={records}", f"store={folder / 'store'}", "resolution=32"]
    settings = [*COMMON, *where, *device]
    prepare(load_config("", settings), progress=False)
    return settings


def make_mid(folder: Path) -> None:
    """The bundled model with a UNet of its shape made wider and deeper, with random weights."""
    from diffusers import UNet2DConditionModel

    if (folder / "unet" / "config.json").is_file():
        return
    shutil.copytree(MODEL_DIR, folder, ignore=lambda _, names: {"unet"} & set(names), dirs_exist_ok=True)
    shape = json.loads((MODEL_DIR / "unet" / "config.json").read_text())
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(shape | blocks | MID | {"layers_per_block": 2}).save_pretrained(folder / "unet")


def open_full_size(device: Sequence[str] = ()) -> list[str]:
    """As :func:`open_world`, kept for the next time: the UNet of sdxl_full_size.py, made if it is not there yet."""
    import sdxl_full_size as full_size

    inputs = ROOT / "runs" / "sdxl_full_size"
    full_size.make_inputs(inputs)
    folder, records = inputs / "whole", inputs / "records.parquet"
    if not (folder / "made").is_file():
        shutil.copytree(inputs / "model", folder, dirs_exist_ok=True, copy_function=os.link)  # 5 GB, twice on no disk
        make_full_encoders(folder)
        (folder / "made").touch()
    where = [f"model={folder}", f"clip={inputs / 'clip'}", f"records={records}", f"store={inputs / 'whole_store'}"]
    size = ["precision=bf16", "gradient_checkpointing=full", "resolution=512", "batch_size=1", "micro_batch_size=1"]
    settings = [*COMMON, *where, *size, *device]
    prepare(load_config("", settings), progress=False)
    return settings


def make_full_encoders(folder: Path, device: torch.device = _HOST, parts: Sequence[str] = ENCODERS) -> None:
    """Put a VAE and text encoders of SDXL's public shapes, with random bf16 weights, in place of the small ones.

    Args:
        device: where the weights are drawn.
        parts: which of :data:`ENCODERS`.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        with device:
            for name in parts:
                if name == "vae":
                    _replace(folder / name, AutoencoderKL(**public.VAES["sdxl"]))
                else:
                    _replace(folder / name, kinds[name](CLIPTextConfig(**public.TEXT_ENCODERS["sdxl"][name] | ends)))
    finally:
        torch.set_default_dtype(before)


def _replace(folder: Path, model: Any) -> None:
    shutil.rmtree(folder)  # its files are also those of another folder
    model.save_pretrained(folder)


def trainer_of(settings: list[str], *overrides: str) -> OfflineTrainer:
    """A recipe's trainer; with reference=ledger its ledger is made first."""
    config = config_of(settings, *overrides)
    if config.reference == "ledger":
        prepare_reference(config, progress=False)
    return open_trainer(config, model_dir_of(config), resolve_device(config.device))


def config_of(settings: list[str], *overrides: str) -> Config:
    """The recipe; past one epoch its draws repeat."""
    return load_config("", [*settings, "draws=1", *overrides])


def remeasured(
    rows: Sequence[dict[str, Any]],
    models: Sequence[str],
    options: argparse.Namespace,
    measure: Callable[[list[str], str], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """``rows`` with those of ``models`` on the chosen device measured anew.

    Args:
        measure: is given the settings of a model's recipes and the model's name.

    Raises:
        UserError: there is no such device, or there are no rows at all.
    """
    device, found = name_of(open_device(options)), list(rows)
    for model in models:
        about = {"model": model, "device": device, "threads": torch.get_num_threads()}
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(open_world(model, Path(folder), [f"device={options.device}"]), model)
        kept = [row for row in found if (row["model"], device_of(row)) != (model, device)]
        found = [*kept, *(about | row | provenance() for row in measured)]
    if not found:
        raise UserError("no rows to report", str(options.out), "run the benchmark first")
    return found
