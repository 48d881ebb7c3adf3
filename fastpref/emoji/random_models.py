"""Tiny untrained pipelines for tests: real SDXL, SD1.5 and CLIP folders, random by seed, quick to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from fastpref.emoji.tokenizer import save_tokenizer_files, train_tokenizer

Prediction = Literal["epsilon", "v_prediction"]
TEXT_WIDTH = 32
WORDS = (
    "a red cat on the moon",
    "blue heart in green circle",
    "yellow dog with white hat",
    "a picture of the black sun",
)


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, projection: int) -> CLIPTextConfig:
    """Configuration of a small CLIP text model that fits ``tokenizer``."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(factor: int, scaling_factor: float) -> AutoencoderKL:
    levels = factor.bit_length()
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8 * factor,
        scaling_factor=scaling_factor,
        force_upcast=False,
    )


def _unet(cross_attention_dim: int, **sdxl: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=cross_attention_dim,
        **sdxl,
    )


def _schedule(prediction_type: Prediction) -> dict[str, Any]:
    return {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "steps_offset": 1,
    }


def make_random_sdxl(
    folder: str | Path, *, seed: int = 0, prediction_type: Prediction = "epsilon", vae_factor: int = 8
) -> Path:
    """Write a StableDiffusionXLPipeline folder (fp32, images of 8 x ``vae_factor`` pixels, latents 4x8x8)."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(list(WORDS))
    pooled = TEXT_WIDTH
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(vae_factor, 0.13025),
        text_encoder=CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, 2, pooled)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, TEXT_WIDTH, 3, pooled)),
        tokenizer=tokenizer,
        tokenizer_2=train_tokenizer(list(WORDS)),
        unet=_unet(
            2 * TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=pooled + 6 * 8,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **_schedule(prediction_type)),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    save_tokenizer_files(Path(folder), ("tokenizer", "tokenizer_2"))
    return Path(folder)


def make_random_sd15(
    folder: str | Path, *, seed: int = 0, prediction_type: Prediction = "epsilon", vae_factor: int = 8
) -> Path:
    """Write a StableDiffusionPipeline folder (fp32, images of 8 x ``vae_factor`` pixels, latents 4x8x8)."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(list(WORDS))
    pipeline = StableDiffusionPipeline(
        vae=_vae(vae_factor, 0.18215),
        text_encoder=CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, 2, TEXT_WIDTH)),
        tokenizer=tokenizer,
        unet=_unet(TEXT_WIDTH),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **_schedule(prediction_type)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    save_tokenizer_files(Path(folder), ("tokenizer",))
    return Path(folder)


def make_random_clip(folder: str | Path, *, seed: int = 0, image_size: int = 32) -> Path:
    """Write a CLIPModel folder with tokenizer and image processor (fp32, projection of 24)."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(list(WORDS))
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=8,
        projection_dim=24,
    )
    text = text_config(tokenizer, TEXT_WIDTH, 2, 24)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    clip_image_processor(image_size).save_pretrained(folder)
    save_tokenizer_files(Path(folder), ("",))
    return Path(folder)


def clip_image_processor(image_size: int) -> CLIPImageProcessor:
    """Resize and crop to ``image_size`` pixels, then CLIP's normalisation with mean and std 0.5."""
    return CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
