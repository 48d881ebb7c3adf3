"""CLIP score and PickScore: the cosine of a CLIP's picture and prompt embeddings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpref.errors import UserError
from fastpref.models.loading import open_part
from fastpref.models.similarity import ClipEncoder
from fastpref.models.state_dict import refuse
from fastpref.models.weights import weights_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class FolderClip(ClipEncoder):
    """A CLIPModel folder, refused if a weight is missing; tokenizer and image processor may lie in another folder."""

    def __init__(self, path: Path, device: torch.device | str = "cpu", processor: Path | None = None) -> None:
        from safetensors import SafetensorError
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        extra = processor or path
        for folder, file in ((path, "config.json"), (extra, "preprocessor_config.json"), (extra, "vocab.json")):
            if not (folder / file).is_file() and not (file == "vocab.json" and (folder / "tokenizer.json").is_file()):
                todo = "give a CLIPModel folder, or processor=FOLDER with the tokenizer and image processor"
                raise UserError(f"no {file}", str(folder), todo)
        options = weights_of(path).options
        load = partial(CLIPModel.from_pretrained, path, dtype=torch.float32, output_loading_info=True, **options)
        try:
            self.model, info = open_part(load, path)
        except SafetensorError as error:
            raise UserError("cannot read the weights", str(path), str(error)) from error
        refuse(path, info["missing_keys"])
        self.device = torch.device(device)
        self.model.to(self.device).eval().requires_grad_(False)
        self.tokenizer: Any = open_part(partial(CLIPTokenizer.from_pretrained, extra), extra)
        self.processor: Any = open_part(partial(CLIPImageProcessorPil.from_pretrained, extra), extra)
        self.width = int(self.model.config.projection_dim)


class ClipScore:
    """100 times the cosine of picture and prompt in any CLIPModel folder.

    Hessel et al. 2021 (arXiv 2104.08718) clip it at zero and weight it by 2.5; neither is done here, so that rankings
    keep what lies below zero. Pictures and prompts are prepared as the folder's own processor does it.
    """

    name = "clip"

    def __init__(self, path: Path, *, processor: Path | None = None, device: torch.device | str = "cpu") -> None:
        self.clip = FolderClip(path, device, processor)

    def score(self, images: list[Image], prompts: list[str]) -> Tensor:
        """``(N,)`` fp32."""
        return 100 * (self.clip.images(images) * self.clip.text(prompts)).sum(dim=-1)


class PickScore(ClipScore):
    """The cosine times the learned temperature: about 20 to 22 for good pictures (Kirstain et al., arXiv 2305.01569).

    ``yuvalkirstain/PickScore_v1`` is a CLIPModel of ViT-H/14; ``processor`` is the folder of the tokenizer and image
    processor of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, where the model's folder lacks them: shorter side 224
    (bicubic), centre crop, CLIP's mean and standard deviation, prompts cut at 77 tokens.
    """

    name = "pickscore"

    def score(self, images: list[Image], prompts: list[str]) -> Tensor:
        """``(N,)`` fp32."""
        scale = self.clip.model.logit_scale.exp().float().cpu()
        return scale * (self.clip.images(images) * self.clip.text(prompts)).sum(dim=-1)
