"""The public base models' configurations as published, for working without their folders.

Facts of stabilityai/stable-diffusion-xl-base-1.0 and stable-diffusion-v1-5/stable-diffusion-v1-5.
"""

from __future__ import annotations

from typing import Any

_SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD15_UNET: dict[str, Any] = {"sample_size": 64, "layers_per_block": 2, "cross_attention_dim": 768}
# What is not said is diffusers' default.
UNETS: dict[str, dict[str, Any]] = {"sdxl": _SDXL_UNET, "sd15": _SD15_UNET}
PARAMETERS = {"sdxl": 2_567_463_684, "sd15": 859_520_964}  # of the UNets

_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAES = {
    "sdxl": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "sd15": {**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
}

_CLIP_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "projection_dim": 768,
    "bos_token_id": 0,  # this and the next are wrong in the published files too
    "eos_token_id": 2,  # transformers then takes the highest id of a prompt as its end, which is <|endoftext|>
    "pad_token_id": 1,
}
_BIG_G_TEXT = _CLIP_TEXT | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
TEXT_ENCODERS: dict[str, dict[str, dict[str, Any]]] = {
    "sdxl": {"text_encoder": _CLIP_TEXT, "text_encoder_2": _BIG_G_TEXT},
    "sd15": {"text_encoder": _CLIP_TEXT},
}
PAD_TOKENS = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}

_NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "sdxl": {"_class_name": "EulerDiscreteScheduler", **_NOISE, "timestep_spacing": "leading"},
    "sd15": {"_class_name": "PNDMScheduler", **_NOISE},
}
