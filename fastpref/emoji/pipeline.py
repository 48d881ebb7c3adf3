"""The UNet stage: latents encoded once, UNet and text encoders trained, a StableDiffusionXLPipeline folder written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from fastpref.emoji import MODEL_DIR
from fastpref.emoji.records import EmojiImages
from fastpref.emoji.tokenizer import save_tokenizer_files, train_tokenizer
from fastpref.emoji.training import (
    Fit,
    FitResult,
    FitSettings,
    Workspace,
    declare_float32,
    load_finished,
    to_tensor,
)
from fastpref.emoji.unet import LatentWorld, TextToLatents, new_scheduler
from fastpref.emoji.vae import encode_mean, finished_vae

BATCH = 32
SETTINGS = FitSettings(
    "unet", steps=4000, learning_rate=7e-4, warmup=150, weight_decay=0.01, betas=(0.9, 0.99), ema_decay=0.998
)
REFINE = FitSettings(
    "refine", steps=6500, learning_rate=6e-4, warmup=200, weight_decay=0.01, betas=(0.9, 0.99), ema_decay=0.998
)
# (Until this step, this share of flat colour.) Trained on equal parts the model draws line art, the simpler style, in
# two thirds of its pictures of held-out captions.
REFINE_FLAT_SHARE = ((3000, 0.58), (REFINE.steps, 0.68))


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(N, model_max_length) token ids, padded as SDXL's pipeline pads them."""
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def latent_world(images: EmojiImages, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> LatentWorld:
    """Encode both styles once and tokenize the captions."""
    scale = vae.config.scaling_factor
    latents = [encode_mean(vae, to_tensor(style) * 2.0 - 1.0) * scale for style in (images.flat, images.line)]
    return LatentWorld(
        torch.stack(latents),
        token_ids(tokenizer, images.captions),
        token_ids(tokenizer, [""])[0],
        new_scheduler().alphas_cumprod,
    )


def export_pipeline(model: TextToLatents, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the fp16 pipeline folder to a temporary name beside ``folder``, then put it in place."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=model.unet,
        scheduler=new_scheduler(),
        force_zeros_for_empty_prompt=False,  # the dropped caption of the training is the encoded empty prompt
        add_watermarker=False,
    )
    live = {name: module.state_dict() for name, module in pipeline.components.items() if hasattr(module, "state_dict")}
    live = {name: {k: v.clone() for k, v in state.items()} for name, state in live.items()}
    pipeline.to(torch.float16).save_pretrained(temporary)
    pipeline.to(torch.float32)
    for name, state in live.items():
        getattr(pipeline, name).load_state_dict(state)
    save_tokenizer_files(temporary, ("tokenizer", "tokenizer_2"))
    for name in ("text_encoder", "text_encoder_2"):
        declare_float32(temporary / name / "config.json")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def build_pipeline(images: EmojiImages, work: Workspace) -> FitResult:
    """Train UNet and text encoders on the training captions and export ``fastpref/emoji/model``."""
    vae, tokenizer = finished_vae(work), train_tokenizer(images.captions)
    world = latent_world(images, vae, tokenizer)
    model = TextToLatents(tokenizer, work.seed)

    def export() -> None:
        export_pipeline(model, vae, tokenizer, MODEL_DIR)

    result = Fit(model, SETTINGS, work).run(lambda _, generator: world.loss(model, BATCH, generator), export)
    export()
    return result


def refine_pipeline(images: EmojiImages, work: Workspace) -> FitResult:
    """A second, longer cycle from the averaged weights of the first, in bf16 autocast and with the styles balanced."""
    vae, tokenizer = finished_vae(work), train_tokenizer(images.captions)
    world = latent_world(images, vae, tokenizer)
    model = TextToLatents(tokenizer, work.seed)
    load_finished(model, SETTINGS, work)

    def loss(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        flat_share = next(share for end, share in REFINE_FLAT_SHARE if step < end)
        with torch.autocast("cpu", torch.bfloat16):
            return world.loss(model, BATCH, generator, flat_share=flat_share)

    result = Fit(model, REFINE, work).run(loss)
    export_pipeline(model, vae, tokenizer, MODEL_DIR)
    return result
