"""LAION Aesthetic: how much people like a picture, whatever the prompt, from its CLIP embedding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastpref.errors import UserError
from fastpref.evaluate.scorers.checkpoint import square_pixels
from fastpref.evaluate.scorers.clip import FolderClip
from fastpref.models.state_dict import read_state_dict, refuse

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_WIDTHS = (1024, 128, 64, 16, 1)
_POSITIONS = (0, 2, 4, 6, 7)  # of the linear layers among the published dropouts


class LinearHead(torch.nn.Module):
    """Five linear layers with no activation between them, named as in the published heads: ``layers.N.weight``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict()
        for position, out in zip(_POSITIONS, _WIDTHS, strict=True):
            self.layers[str(position)] = torch.nn.Linear(width, out)
            width = out

    def forward(self, features: Tensor) -> Tensor:
        """``(N, width)`` to ``(N,)``."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)


def load_head(state: dict[str, Tensor], path: Path) -> LinearHead:
    """A head with exactly the weights of ``state``; any other layout is a UserError."""
    first = state.get("layers.0.weight")
    head = LinearHead(first.shape[-1] if first is not None and first.ndim == 2 else 768)
    own = head.state_dict()
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    refuse(path, missing, unexpected, {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape})
    head.load_state_dict(state)
    return head.float().eval().requires_grad_(False)


class AestheticScore:
    """A rating from 1 to 10, learned from SAC, Logos and AVA (github: christophschuhmann/improved-aesthetic-predictor).

    The picture goes through OpenAI's CLIP preprocessing and ViT-L/14; its projected embedding, of unit norm, through
    the head of ``sac+logos+ava1-l14-linearMSE.pth``. The prompt is not looked at.

    Args:
        path: the head. clip: ``openai/clip-vit-large-patch14`` as a CLIPModel folder.
    """

    name = "aesthetic"

    def __init__(self, path: Path, *, clip: Path, device: torch.device | str = "cpu") -> None:
        self.head = load_head(read_state_dict(path), path).to(device)
        self.clip = FolderClip(clip, device)
        wanted = self.head.layers["0"].in_features
        if wanted != self.clip.width:
            what = f"the head takes embeddings of {wanted} values, this CLIP gives {self.clip.width}"
            raise UserError(what, str(clip), "give the CLIP it was trained on: ViT-L/14 for the published heads")

    @torch.no_grad()
    def score(self, images: list[Image], prompts: list[str]) -> Tensor:
        """``(N,)`` fp32."""
        model, device = self.clip.model, self.clip.device
        pixels = square_pixels(images, model.config.vision_config.image_size).to(device)
        features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        return self.head(torch.nn.functional.normalize(features, dim=-1)).cpu()
