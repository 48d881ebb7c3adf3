"""The benchmark of the full-size SDXL: its recipes hold, and its weights are bf16 and complete, on a small UNet."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import sdxl_full_size as full_size  # noqa: E402

from fastpref.config import parse_config  # noqa: E402
from fastpref.models.loading import load_unet  # noqa: E402


@pytest.mark.parametrize("run", ["rpo", "spo", "dpo"])
def test_recipes_are_valid(run: str) -> None:
    config = parse_config(full_size.settings_of(run, Path("somewhere")))
    assert config.precision == "bf16" and config.gradient_checkpointing == "full" and config.resolution == 512


def test_weights_are_whole_bf16_and_of_torchs_scale(
    sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full_size, "SHARD_BYTES", 1 << 15)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sdxl / "unet"))
    unet.save_config(tmp_path)
    full_size.write_weights(unet, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load_unet(sdxl, torch.bfloat16, str(tmp_path))
    weights = {name: weight.detach() for name, weight in loaded.named_parameters()}
    assert weights.keys() == dict(unet.named_parameters()).keys()
    assert {p.dtype for p in weights.values()} == {torch.bfloat16}
    matrix = weights["conv_in.weight"].float()
    bound = (4 * 9) ** -0.5
    assert 0.9 * bound < matrix.abs().max() <= 1.01 * bound
    assert float(weights["conv_norm_out.weight"].float().mean()) == 1.0 and not weights["conv_norm_out.bias"].any()


def test_the_table_says_how_far_the_plan_was_off() -> None:
    gib = 1 << 30
    row = {"run": "rpo", "peak_rss_bytes": str(8 * gib), "planned_bytes": str(9 * gib)}
    row |= {"unet_forwards": "36", "unet_recomputed": "12", "unet_backwards": "12"}
    line = full_size.table([row]).splitlines()[-1]
    assert "| 9.0 GiB (+12%) | 8.0 GiB (at most 9) | 36 + 12 again / 12 |" in line
