"""The UNets of the public base models, for planning without one on disk: their ``unet/config.json`` as published."""

from __future__ import annotations

from typing import Any

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}  # the rest is diffusers' default
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PUBLIC = {"sdxl": SDXL, "sd15": SD15}
PARAMETERS = {"sdxl": 2_567_463_684, "sd15": 859_520_964}
