"""The random pipelines used by other tests: they open with plain diffusers and draw the same picture for a seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fastpref.emoji.random_models import make_random_clip, make_random_sd15, make_random_sdxl


def draw(pipeline, seed: int) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipeline("a red cat", num_inference_steps=2, generator=generator, output_type="np").images[0]


@pytest.mark.parametrize(
    ("make", "pipeline_class", "factor", "prediction"),
    [
        (make_random_sdxl, StableDiffusionXLPipeline, 2, "v_prediction"),
        (make_random_sd15, StableDiffusionPipeline, 8, "epsilon"),
    ],
)
def test_pipeline_opens_and_is_deterministic(tmp_path: Path, make, pipeline_class, factor: int, prediction) -> None:
    folder = make(tmp_path / "a", seed=3, vae_factor=factor, prediction_type=prediction)
    pipeline = pipeline_class.from_pretrained(folder)
    picture = draw(pipeline, 1)
    assert picture.shape == (8 * factor, 8 * factor, 3)
    assert np.array_equal(picture, draw(pipeline, 1))
    assert not np.array_equal(picture, draw(pipeline, 2))
    assert pipeline.scheduler.config.prediction_type == prediction
    assert 1e5 <= sum(p.numel() for p in pipeline.unet.parameters()) <= 3e5


def test_seed_decides_the_weights(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_random_sd15(tmp_path / name, seed=seed)
        weights.append((tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_random_clip_opens_and_sees_text_and_pictures(tmp_path: Path) -> None:
    folder = make_random_clip(tmp_path)
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)
    pixels = processor(np.zeros((40, 50, 3), dtype=np.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32) and bool((pixels == -1.0).all())
    ids = tokenizer(["red cat", "blue heart"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        output = clip(input_ids=ids, pixel_values=pixels)
    assert output.logits_per_image.shape == (1, 2)
    assert float(output.logits_per_image[0, 0]) != float(output.logits_per_image[0, 1])
    assert json.loads((folder / "vocab.json").read_text()) == tokenizer.get_vocab()
