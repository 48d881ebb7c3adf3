"""Calls of a VAE: in slices, in a precision it survives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from fastpref.models import vae
from fastpref.models.loading import load_vae, vae_dtype

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loud(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random SDXL with a VAE that overflows in fp16, as SDXL's first one does: widths of 1e5 behind its norms."""
    import shutil

    folder = tmp_path_factory.mktemp("models") / "loud"
    shutil.copytree(sdxl, folder)
    model: Any = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        for half in (model.encoder, model.decoder):
            half.conv_norm_out.weight.mul_(3e5)
            half.conv_out.weight.div_(3e5)
    model.save_pretrained(folder / "vae")
    return folder


def rows_of_calls(module: torch.nn.Module) -> list[int]:
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def test_slices_hold_the_latents_of_one_picture_of_1024_pixels(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what they give is what a call of all rows gives, to fp64's rounding."""
    assert [vae.rows_at_once((side // 8) ** 2) for side in (512, 1024, 1536)] == [4, 1, 1]
    model: Any = load_vae(sdxl, "fp64", CPU)
    seen = rows_of_calls(model.encoder), rows_of_calls(model.decoder)
    g = torch.Generator().manual_seed(0)
    pixels = torch.rand(5, 3, 16, 16, generator=g, dtype=torch.float64) * 2 - 1
    latents = torch.randn(5, 4, 8, 8, generator=g, dtype=torch.float64)
    whole = vae.encode(model, pixels).parameters, vae.decode(model, latents)
    monkeypatch.setattr(vae, "SLICE", 2 * 8 * 8 + 5)
    parts = vae.encode(model, pixels).parameters, vae.decode(model, latents)
    assert seen == ([5, 2, 2, 1], [5, 2, 2, 1])
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_auto_is_bf16_on_a_gpu_for_pictures_that_are_judged_in_bf16_alone() -> None:
    kinds = ("fp32", "bf16", "fp16", "fp64")
    half = {
        (device, p) for device in ("cpu", "cuda") for p in kinds if vae_dtype("auto", device, judged_in=p).itemsize < 4
    }
    assert half == {("cuda", "bf16")} and vae_dtype("auto", "cuda") == torch.float32
    assert vae_dtype("fp16", "cuda", judged_in="bf16") == torch.float16  # what is asked for is done


def test_what_overflows_in_fp16_is_computed_in_fp32(loud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does, with the weights as they are on disk; the others stay in fp16, and bf16 never overflows."""
    g = torch.Generator().manual_seed(0)
    latents, pixels = torch.randn(3, 4, 8, 8, generator=g), torch.rand(2, 3, 16, 16, generator=g) * 2 - 1
    exact, half = (load_vae(loud, precision, CPU) for precision in ("fp32", "fp16"))
    monkeypatch.setattr(vae, "SLICE", 8 * 8)
    with torch.no_grad():
        assert not half.decode(latents.half() / half.config.scaling_factor).sample.isfinite().all()
        assert torch.equal(vae.decode(half, latents), vae.decode(exact, latents))
        assert torch.equal(vae.encode(half, pixels).mean, vae.encode(exact, pixels).mean)
        assert vae.decode(load_vae(loud, "bf16", CPU), latents).isfinite().all()
        latents[1] = torch.nan  # nothing to mend: that is a row of another's making
        found = vae.decode(half, latents)
    assert found[[0, 2]].isfinite().all() and found[1].isnan().all()


def test_a_vae_that_survives_fp16_is_not_opened_twice(sdxl: Path) -> None:
    half: Any = load_vae(sdxl, "fp16", CPU)
    setattr(half, vae._IN_FP32, pytest.fail)
    with torch.no_grad():
        assert vae.decode(half, torch.zeros(1, 4, 8, 8)).isfinite().all()
