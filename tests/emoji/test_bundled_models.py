"""The models in the repository: they open with plain diffusers and transformers and reach stated floors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fastpref.emoji import CLIP_DIR, HELDOUT_PARQUET, MODEL_DIR, STYLE_DIR, TRAIN_PARQUET
from fastpref.emoji.clip import embed_images, embed_texts, retrieval
from fastpref.emoji.pipeline import token_ids
from fastpref.emoji.records import EmojiImages, read_records
from fastpref.emoji.style import load_style_encoder
from fastpref.emoji.style_training import Labelled, style_accuracy
from fastpref.emoji.training import to_tensor
from fastpref.emoji.vae import encode_mean, reconstruction_psnr
from fastpref.errors import UserError


@pytest.fixture(scope="module")
def heldout() -> EmojiImages:
    return read_records(HELDOUT_PARQUET)


@pytest.fixture(scope="module")
def train() -> EmojiImages:
    return read_records(TRAIN_PARQUET)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_everything_fits_in_30_megabytes() -> None:
    folders = (MODEL_DIR, CLIP_DIR, STYLE_DIR)
    assert sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file()) < 30e6


def test_reconstruction_is_sharp_and_latents_are_whitened(train: EmojiImages, heldout: EmojiImages) -> None:
    vae = AutoencoderKL.from_pretrained(MODEL_DIR / "vae").eval()
    for images in (heldout.flat, heldout.line):
        assert reconstruction_psnr(vae, to_tensor(images) * 2 - 1) > 32.0
    pixels = torch.cat([to_tensor(train.flat[::4]), to_tensor(train.line[::4])]) * 2 - 1
    latents = encode_mean(vae, pixels) * vae.config.scaling_factor
    assert latents.shape[1:] == (4, 16, 16)
    assert float(latents.std()) == pytest.approx(1.0, abs=0.05)
    assert latents.mean((0, 2, 3)) == pytest.approx(torch.zeros(4), abs=0.1)


def test_pipeline_draws_by_seed_and_caption(pipeline: StableDiffusionXLPipeline) -> None:
    def draw(caption: str, seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return pipeline(caption, num_inference_steps=8, generator=generator, output_type="np").images[0]

    picture = draw("red heart", 0)
    assert picture.shape == (32, 32, 3)
    assert np.array_equal(picture, draw("red heart", 0))
    assert np.abs(picture - draw("red heart", 1)).mean() > 0.02
    assert np.abs(picture - draw("telephone", 0)).mean() > 0.02
    assert {m.dtype for m in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)} == {torch.float32}


def test_unet_predicts_the_noise_of_training_pictures(pipeline: StableDiffusionXLPipeline, train: EmojiImages) -> None:
    rows = np.arange(0, len(train.captions), 21)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        clean = encode_mean(pipeline.vae, to_tensor(train.line[rows]) * 2 - 1) * pipeline.vae.config.scaling_factor
        captions = [train.captions[i] for i in rows]
        embeds, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.full((len(rows),), 400)
        abar = pipeline.scheduler.alphas_cumprod[400]
        time_ids = torch.tensor([32.0, 32.0, 0.0, 0.0, 32.0, 32.0]).expand(len(rows), 6)

        def error(prompt_embeds: torch.Tensor, text_embeds: torch.Tensor) -> float:
            conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
            noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
            output = pipeline.unet(noisy, timesteps, prompt_embeds, added_cond_kwargs=conditions).sample
            return float((output - noise).pow(2).mean())

        own, others = error(embeds, pooled), error(embeds.roll(1, 0), pooled.roll(1, 0))
    assert own < 0.1
    assert others > 1.2 * own, "the right caption must help"


def test_style_encoder_tells_real_styles(train: EmojiImages, heldout: EmojiImages) -> None:
    encoder = load_style_encoder(STYLE_DIR)
    stated = json.loads((STYLE_DIR / "config.json").read_text())["style_accuracy"]
    assert style_accuracy(encoder, Labelled.of_emoji(heldout), 0)["clean"] == pytest.approx(
        stated["heldout"]["clean"], abs=0.01
    )
    assert min(style_accuracy(encoder, Labelled.of_emoji(train), 0).values()) > 0.97
    # Some pictures, such as the black heart, are black and white in both sets: no one could tell their style.
    apart = np.sqrt(((heldout.flat / 255.0 - heldout.line / 255.0) ** 2).mean((1, 2, 3))) > 0.25
    captions = [c for c, keep in zip(heldout.captions, apart, strict=True) if keep]
    distinct = EmojiImages(captions, heldout.flat[apart], heldout.line[apart])
    assert len(captions) > 60
    assert min(style_accuracy(encoder, Labelled.of_emoji(distinct), 0).values()) > 0.97
    features = encoder(to_tensor(distinct.line)).features
    assert features.dtype == torch.float32 and features.shape == (len(captions), encoder.config["features"])


def test_missing_style_encoder_is_a_user_error(tmp_path) -> None:
    with pytest.raises(UserError, match="no style encoder"):
        load_style_encoder(tmp_path)


def test_clip_retrieves_captions_of_real_pictures(train: EmojiImages, heldout: EmojiImages) -> None:
    clip, tokenizer = CLIPModel.from_pretrained(CLIP_DIR).eval(), CLIPTokenizer.from_pretrained(CLIP_DIR)
    for images, floor in ((train, 0.9), (heldout, 0.4)):
        ids = token_ids(tokenizer, images.captions)
        for style in ("flat", "line"):
            assert retrieval(clip, ids, to_tensor(getattr(images, style)))["top5"] > floor
    processor = CLIPImageProcessor.from_pretrained(CLIP_DIR)
    pixels = processor(heldout.flat[0], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, to_tensor(heldout.flat[:1]) * 2 - 1)
    with torch.no_grad():
        ids = token_ids(tokenizer, heldout.captions[:2])
        output = clip(input_ids=ids, pixel_values=pixels)
        torch.testing.assert_close(output.text_embeds, embed_texts(clip, ids))
        torch.testing.assert_close(output.image_embeds, embed_images(clip, to_tensor(heldout.flat[:1])))
