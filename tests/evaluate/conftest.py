"""Random pipelines shared by the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from fastpref.emoji.random_models import make_random_sd15, make_random_sdxl
from fastpref.models.loading import load_unet
from fastpref.models.lora_file import save_lora


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random SDXL (32 x 32 pixels) and SD1.5 (64 x 64) folders."""
    folder = tmp_path_factory.mktemp("models")
    return {"sdxl": make_random_sdxl(folder / "sdxl", vae_factor=4), "sd15": make_random_sd15(folder / "sd15")}


@pytest.fixture(scope="session")
def loras(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA with alpha != rank for each of them."""
    files = {}
    for family, model in models.items():
        unet = load_unet(model, torch.float32)
        torch.manual_seed(1)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
        unet.add_adapter(LoraConfig(r=2, lora_alpha=6.0, init_lora_weights=False, target_modules=targets))
        files[family] = save_lora(unet, tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors")
    return files
