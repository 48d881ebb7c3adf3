"""What the scorers share: exactly the weights of a published checkpoint, and square pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from fastpref.models.loading import open_part
from fastpref.models.state_dict import refuse

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_weights(kind: Any, config: Any, state: dict[str, Tensor], path: Path, **options: Any) -> Any:
    """A transformers model of class ``kind`` in fp32 and eval mode with exactly the weights of ``state``.

    Args:
        options: further arguments of its constructor.

    Raises:
        UserError: a weight is missing, left over or of another shape.
    """

    def build() -> tuple[Any, dict[str, Any]]:
        return kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )

    model, info = open_part(build, path)
    refuse(path, info["missing_keys"], info["unexpected_keys"], [entry[0] for entry in info["mismatched_keys"]])
    return model.eval().requires_grad_(False)


def count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers N there are in ``<prefix>.N.<rest>``."""
    return len({name[len(prefix) + 1 :].split(".")[0] for name in state if name.startswith(f"{prefix}.")})


def square_pixels(images: list[Image.Image], size: int) -> Tensor:
    """Pictures to ``(n, 3, size, size)`` fp32 as OpenAI's CLIP sees them.

    RGB; the shorter side resized to ``size`` (bicubic, by Pillow), the centre cut out, CLIP's mean and standard
    deviation. Source: github.com/openai/CLIP, ``_transform`` of clip/clip.py; torchvision's rounding.
    """
    return normalise(torch.stack([to_float(_centre(image.convert("RGB"), size)) for image in images]))


def to_float(image: Image.Image) -> Tensor:
    """RGB to ``(3, H, W)`` fp32 in [0, 1]."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)


def normalise(pixels: Tensor) -> Tensor:
    """``(n, 3, H, W)`` in [0, 1] to CLIP's mean 0 and standard deviation 1."""
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def _centre(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    new = (size if width == short else size * width // short, size if height == short else size * height // short)
    if new != image.size:
        image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))
