"""The style encoder: a small CNN trained to tell styles and concepts apart, whose features see both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastpref.emoji import STYLES
from fastpref.errors import UserError

FEATURES = 96


class StyleOutput(NamedTuple):
    """features (N, F) before the two heads, style_logits (N, 2) in the order of ``STYLES``, concept_logits (N, C)."""

    features: Tensor
    style_logits: Tensor
    concept_logits: Tensor


class StyleEncoder(nn.Module):
    """Three strided convolution blocks, average pooling, a feature layer and two linear heads."""

    def __init__(self, concepts: int, width: int = 24, features: int = FEATURES):
        super().__init__()
        self.config = {"concepts": concepts, "width": width, "features": features, "styles": list(STYLES)}
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            layers += [nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        self.blocks = nn.Sequential(*layers)
        self.to_features = nn.Linear(channels * 4, features)
        self.style_head = nn.Linear(features, len(STYLES))
        self.concept_head = nn.Linear(features, concepts)

    def forward(self, images: Tensor) -> StyleOutput:
        """``images`` are (N, 3, 32, 32) floats in [0, 1]."""
        hidden = self.blocks(images * 2.0 - 1.0)
        pooled = nn.functional.adaptive_avg_pool2d(hidden, 2).flatten(1)
        features = torch.tanh(self.to_features(pooled))
        return StyleOutput(features, self.style_head(features), self.concept_head(features))


def load_style_encoder(path: str | Path) -> StyleEncoder:
    """The encoder of a folder with ``config.json`` and ``model.safetensors``, fp32, frozen, in eval mode."""
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        raise UserError("no style encoder", str(path), "expected config.json and model.safetensors")
    config = json.loads(config_file.read_text())
    encoder = StyleEncoder(config["concepts"], config["width"], config["features"])
    weights = load_file(Path(path) / "model.safetensors")
    encoder.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return encoder.eval().requires_grad_(False)
