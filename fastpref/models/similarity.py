"""CLIP as the measure of how related two prompts or two pictures are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpref.errors import UserError
from fastpref.memory import moved
from fastpref.models.loading import open_part
from fastpref.models.weights import weights_of

if TYPE_CHECKING:
    from PIL.Image import Image


def resolve_clip_dir(clip: str) -> Path:
    """The folder of a config's ``clip``; 'emoji' is the bundled one."""
    if clip == "emoji":
        from fastpref.emoji import CLIP_DIR

        return CLIP_DIR
    path = Path(clip)
    if not (path / "config.json").is_file():
        raise UserError("no CLIP model there", clip, "give a transformers CLIPModel folder on disk")
    return path


class ClipEncoder:
    """A CLIP on one device; text and image embeddings of unit norm in one space."""

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.device = torch.device(device)
        self.model: Any = open_part(
            partial(CLIPModel.from_pretrained, path, dtype=torch.float32, **weights_of(path).options), path
        )
        self.model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = open_part(partial(CLIPTokenizer.from_pretrained, path), path)
        self.processor = open_part(partial(CLIPImageProcessorPil.from_pretrained, path), path)
        self.width = int(self.model.config.projection_dim)

    @torch.no_grad()
    def text(self, captions: list[str]) -> torch.Tensor:
        """Captions to ``(n, E)`` unit fp32 rows."""
        length = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return embed_ids(self.model, *(moved(x, self.device) for x in (tokens.input_ids, tokens.attention_mask)))

    @torch.no_grad()
    def images(self, images: list[Image]) -> torch.Tensor:
        """RGB pictures of any size to ``(n, E)`` unit fp32 rows."""
        return embed_pixels(
            self.model, moved(self.processor(images=images, return_tensors="pt").pixel_values, self.device)
        )


@torch.no_grad()
def embed_ids(clip: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``(n, E)`` unit fp32 rows on the CPU of tokens ``(n, L)`` of a CLIPModel."""
    return _unit(clip.text_projection(clip.text_model(input_ids=ids, attention_mask=mask).pooler_output))


@torch.no_grad()
def embed_pixels(clip: Any, pixels: torch.Tensor) -> torch.Tensor:
    """``(n, E)`` unit fp32 rows on the CPU of normalised pictures ``(n, 3, S, S)`` of a CLIPModel."""
    return _unit(clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output))


def load_clip(path: Path, device: torch.device | str = "cpu") -> ClipEncoder:
    """Open a CLIPModel folder."""
    return ClipEncoder(path, device)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1).cpu()
