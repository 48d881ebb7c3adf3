"""The style encoder: a small CNN trained to tell styles, concepts and degradations; its features see all three."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastpref.emoji import IMAGE_SIZE, STYLES
from fastpref.errors import UserError

FEATURES = 48
DEGRADATIONS = ("noise", "blur")  # order of the degradation head


class StyleOutput(NamedTuple):
    """features (N, F) before the heads, style_logits (N, 2) in the order of the config's ``styles``, concept_logits
    (N, C), degradations (N, 2): how noisy and how blurred, 0 for none, 1 for the most that was trained on."""

    features: Tensor
    style_logits: Tensor
    concept_logits: Tensor
    degradations: Tensor


class StyleEncoder(nn.Module):
    """Three strided convolution blocks, average pooling, a feature layer and three linear heads.

    Args:
        concepts: number of captions.
        image_size: pixels, height and width, that pictures are resized to.
        styles: names of the two styles.
    """

    def __init__(
        self,
        concepts: int,
        width: int = 24,
        features: int = FEATURES,
        image_size: int = IMAGE_SIZE,
        styles: tuple[str, ...] = STYLES,
    ):
        super().__init__()
        self.config: dict[str, Any] = {"concepts": concepts, "width": width, "features": features}
        self.config |= {"image_size": image_size, "styles": list(styles)}
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            layers += [nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        self.blocks = nn.Sequential(*layers)
        self.to_features = nn.Linear(channels * 4, features)
        self.style_head = nn.Linear(features, len(styles))
        self.concept_head = nn.Linear(features, concepts)
        self.degradation_head = nn.Linear(features, len(DEGRADATIONS))

    def forward(self, images: Tensor) -> StyleOutput:
        """``images`` are (N, 3, H, W) floats in [0, 1]; other sizes than the encoder's own are resized (bicubic)."""
        size = (self.config["image_size"],) * 2
        if images.shape[2:] != size:
            images = nn.functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        hidden = self.blocks(images * 2.0 - 1.0)
        pooled = nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1)
        features = torch.tanh(self.to_features(pooled))
        heads = (self.style_head, self.concept_head, self.degradation_head)
        return StyleOutput(features, *(head(features) for head in heads))


def load_style_encoder(path: str | Path) -> StyleEncoder:
    """The encoder of a folder with ``config.json`` and ``model.safetensors``, fp32, frozen, in eval mode."""
    config_file, weights_file = Path(path) / "config.json", Path(path) / "model.safetensors"
    if not config_file.is_file() or not weights_file.is_file():
        raise UserError("no style encoder", str(path), "expected config.json and model.safetensors")
    try:
        config = json.loads(config_file.read_text())
        encoder = StyleEncoder(
            config["concepts"], config["width"], config["features"], config["image_size"], tuple(config["styles"])
        )
        encoder.config = config
        weights = load_file(weights_file)
        encoder.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError("cannot read the style encoder", str(path), str(error).splitlines()[0]) from None
    return encoder.eval().requires_grad_(False)
