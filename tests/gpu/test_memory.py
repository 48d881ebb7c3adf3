"""Memory on the GPU: optimizers in 8 bits, the step inside the backward, exact resuming; what the plan says of phases
beside the step."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastpref.config import Config, load_config
from fastpref.data.encode import Encoders
from fastpref.data.job import make_job
from fastpref.data.records import open_records
from fastpref.models.prompt_book import PromptBook
from fastpref.models.public import VAES
from fastpref.models.text import load_text_stack
from fastpref.models.work import Work
from fastpref.plan.report import make_plan
from fastpref.rollout.scorers import open_scorer
from fastpref.runs import run_training
from fastpref.train.checkpoint import load_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
]
MakeConfig = Callable[..., Config]
BASE = ["method=dpo", "beta=200", "batch_size=2", "learning_rate=1e-3"]
IN_BACKWARD = ["train=full", "step_in_backward=true", "pure_bf16=true", "precision=bf16"]
RECIPES = {
    "adamw8bit": ["optimizer=adamw8bit", "train=full"],
    "paged_adamw8bit": ["optimizer=paged_adamw8bit", "train=full"],
    "lion8bit": ["optimizer=lion8bit", "train=full"],
    "pure bf16": [*IN_BACKWARD],
    "pure bf16 adamw8bit": [*IN_BACKWARD, "optimizer=adamw8bit"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_is_the_uninterrupted_one(sdxl_config: MakeConfig, name: str) -> None:
    """To the rounding of the GPU's own operators, some of which add up in any order."""
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    settings = [*BASE, *RECIPES[name]]

    def trained(run: str, steps: int) -> dict[str, torch.Tensor]:
        config = sdxl_config(*settings, f"name={run}", f"steps={steps}", "resume=auto")
        run_training(config)
        return load_checkpoint(config.run_dir / "checkpoints" / f"step-{steps:06d}").tensors

    whole, _ = trained("whole", 3), trained("parts", 1)
    parts = trained("parts", 3)
    assert whole.keys() == parts.keys()
    for key in (key for key in whole if key.startswith("policy.")):
        assert torch.allclose(whole[key].float(), parts[key].float(), rtol=1e-2, atol=2e-3), key


@pytest.fixture(scope="module")
def wide_vae(sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random SDXL with random weights in the published VAE's shape: small models are less than what cuBLAS keeps
    for itself."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("models") / "wide_vae"
    shutil.copytree(sdxl, folder)
    shutil.rmtree(folder / "vae")
    AutoencoderKL.from_config(VAES["sdxl"]).save_pretrained(folder / "vae")
    return folder


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes on the GPU at most, from what is there before."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def large(folder: Path, few_records: Path, clip: Path, tmp_path: Path, *more: str) -> Config:
    places = [f"model={folder}", f"records={few_records}", f"clip={clip}", f"store={tmp_path / 'store'}"]
    return load_config("", [*places, "resolution=1024", "precision=bf16", f"output_dir={tmp_path}", *more])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prepare_at_1024_pixels_needs_what_the_plan_says(
    wide_vae: Path, clip: Path, few_records: Path, tmp_path: Path, precision: str
) -> None:
    more = [f"vae_precision={precision}", "prepare_batch_size=4", "max_enlargement=null"]
    config = large(wide_vae, few_records, clip, tmp_path, "method=dpo", *more)
    encoders = Encoders(make_job(config, open_records(config.records)), torch.device("cuda"))
    found = peak_of(lambda: encoders.images([Image.new("RGB", (1024, 1024), (9, 99, 199))] * 4))
    assert abs(make_plan(config, 1, "h100").preparing["prepare"].total / found - 1) < 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scoring_at_1024_pixels_needs_what_the_plan_says(
    wide_vae: Path, clip: Path, few_records: Path, tmp_path: Path, precision: str
) -> None:
    config = large(wide_vae, few_records, clip, tmp_path, "method=spo", f"vae_precision={precision}")
    device, opened = torch.device("cuda"), []

    def score() -> None:
        texts = load_text_stack(wide_vae, torch.bfloat16, device)
        book = PromptBook(texts, wide_vae, (1024, 1024), device, Work())
        opened.append(scorer := open_scorer(config, wide_vae, device, [0], book, Work()))
        latents = torch.randn(4, 4, 128, 128, device=device)
        scorer.score(latents, latents, 0, ["a red heart"] * 4)

    found = peak_of(score)
    scoring = make_plan(config, 1, "h100").scoring
    assert scoring is not None and abs((scoring.resident + scoring.activations) / found - 1) < 0.1
