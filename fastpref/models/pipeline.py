"""A whole diffusers pipeline for sampling, made of the parts as training opens them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpref.models.loading import load_unet, open_part, open_vae
from fastpref.models.text import load_text_stack

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load_pipeline(path: Path, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    """The whole pipeline for sampling: no safety checker, no progress bar of its own."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    # Each part on its own, as training opens it: one may have a variant alone and the next none.
    parts: dict[str, Any] = {"unet": load_unet(path, dtype), "vae": open_vae(path, dtype)}
    text = load_text_stack(path, dtype, torch.device("cpu"))
    parts |= {f"text_encoder{suffix}": encoder for suffix, encoder in zip(("", "_2"), text.encoders, strict=False)}
    if text.family == "sdxl":
        load: Any = partial(StableDiffusionXLPipeline.from_pretrained, path, add_watermarker=False)
    else:
        off = {"safety_checker": None, "requires_safety_checker": False}
        load = partial(StableDiffusionPipeline.from_pretrained, path, **off)
    pipe = open_part(partial(load, dtype=dtype, **parts), path)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
