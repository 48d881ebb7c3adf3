"""HPSv2 and v2.1: a ViT-H/14 CLIP tuned on people's choices, published with open_clip's names."""

from __future__ import annotations

import html
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpref.errors import UserError
from fastpref.evaluate.scorers.checkpoint import count_layers, load_weights, normalise, to_float
from fastpref.models.loading import open_part
from fastpref.models.state_dict import read_state_dict

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_HEAD_WIDTH = {"vision_model": 80, "text_model": 64}  # ViT-H/14: 1280 / 16 and 1024 / 16
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies from the left


def from_open_clip(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """An open_clip ViT state dict under the names of transformers' CLIPModel; an unknown name is a UserError."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = _BLOCK.fullmatch(name)
        if block:
            tower = "vision_model" if block[1] else "text_model"
            renamed |= _rename_in_block(f"{tower}.encoder.layers.{block[2]}", block[3], tensor, path)
        elif name in _OUTSIDE:
            renamed[_OUTSIDE[name]] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
        else:
            raise UserError(f"the checkpoint has the unknown {name}", str(path), "give the file as published")
    return renamed


def _rename_in_block(layer: str, name: str, tensor: Tensor, path: Path) -> dict[str, Tensor]:
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.rpartition("_")[2]
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}.self_attn.{part}_proj.{kind}": rows.contiguous() for part, rows in parts}
    stem, _, kind = name.rpartition(".")
    if stem not in _IN_BLOCK:
        raise UserError(f"the checkpoint has the unknown {name} in a block", str(path), "give the file as published")
    return {f"{layer}.{_IN_BLOCK[stem]}.{kind}": tensor}


def clip_config(state: dict[str, Tensor], path: Path) -> Any:
    """The CLIPConfig that renamed weights have; heads as wide as ViT-H/14's, exact GELU."""
    from transformers import CLIPConfig

    patches = state.get("vision_model.embeddings.patch_embedding.weight")
    positions = state.get("vision_model.embeddings.position_embedding.weight")
    tokens = state.get("text_model.embeddings.token_embedding.weight")
    places = state.get("text_model.embeddings.position_embedding.weight")
    projection = state.get("visual_projection.weight")
    if patches is None or positions is None or tokens is None or places is None or projection is None:
        raise UserError("the checkpoint is no open_clip ViT", str(path), "give HPS_v2_compressed.pt or HPS_v2.1's")
    patch = patches.shape[-1]

    def tower(name: str, width: int) -> dict[str, Any]:
        inner = state.get(f"{name}.encoder.layers.0.mlp.fc1.bias")
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width if inner is None else len(inner),
            "num_hidden_layers": count_layers(state, f"{name}.encoder.layers"),
            "num_attention_heads": max(1, width // _HEAD_WIDTH[name]),
            "hidden_act": "gelu",
            "projection_dim": projection.shape[0],
        }

    image_size = patch * round((len(positions) - 1) ** 0.5)
    vision = {**tower("vision_model", patches.shape[0]), "image_size": image_size, "patch_size": patch}
    text = {
        **tower("text_model", tokens.shape[1]),
        "vocab_size": tokens.shape[0],
        "max_position_embeddings": places.shape[0],
        "bos_token_id": tokens.shape[0] - 2,
        "eos_token_id": tokens.shape[0] - 1,
        "pad_token_id": tokens.shape[0] - 1,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection.shape[0])


def padded_pixels(images: list[Image], size: int) -> Tensor:
    """Pictures to ``(n, 3, size, size)`` fp32 as HPSv2 sees them.

    The longer side resized to ``size`` on float pixels (bicubic, antialiased, torchvision's default since 0.17), the
    rest black, evenly on both sides. Source: ``ResizeMaxSize`` of hpsv2/src/open_clip/transform.py.
    """
    rows = []
    for image in images:
        pixels = to_float(image.convert("RGB"))
        height, width = pixels.shape[1:]
        scale = size / max(height, width)
        new = (max(1, round(height * scale)), max(1, round(width * scale)))
        if new != (height, width):
            pixels = torch.nn.functional.interpolate(
                pixels[None], new, mode="bicubic", align_corners=False, antialias=True
            )[0]
        down, right = size - new[0], size - new[1]
        rows.append(torch.nn.functional.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2)))
    return normalise(torch.stack(rows))


class HpsV2:
    """Cosine of picture and prompt, about 0.2 to 0.35 (Wu et al., arXiv 2306.09341; tables often show it times 100).

    Args:
        path: ``HPS_v2_compressed.pt`` or ``HPS_v2.1_compressed.pt``: weights under ``state_dict``.
        tokenizer: a folder with CLIP's tokenizer, which the checkpoint lacks; any SD1.5 or SDXL pipeline's
            ``tokenizer`` is one. By default the checkpoint's own folder. The published tokenizer also repairs broken
            Unicode (ftfy); here only HTML entities are resolved.
    """

    name = "hpsv2"

    def __init__(self, path: Path, *, tokenizer: Path | None = None, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer

        state = from_open_clip(read_state_dict(path, "state_dict"), path)
        config = clip_config(state, path)
        folder = tokenizer or path.parent
        if not any((folder / file).is_file() for file in ("vocab.json", "tokenizer.json")):
            raise UserError(
                "no CLIP tokenizer", str(folder), "give tokenizer=FOLDER, e.g. an SDXL pipeline's tokenizer"
            )
        self.tokenizer: Any = open_part(partial(CLIPTokenizer.from_pretrained, folder), folder)
        if len(self.tokenizer) != config.text_config.vocab_size:
            what = f"the tokenizer has {len(self.tokenizer)} tokens, the checkpoint {config.text_config.vocab_size}"
            raise UserError(what, str(folder), "give CLIP's own tokenizer")
        self.device = torch.device(device)
        self.model = load_weights(CLIPModel, config, state, path).to(self.device)

    @torch.no_grad()
    def score(self, images: list[Image], prompts: list[str]) -> Tensor:
        """``(N,)`` fp32."""
        model, config = self.model, self.model.config
        pixels = padded_pixels(images, config.vision_config.image_size).to(self.device)
        tokens = self.tokenizer(
            [html.unescape(html.unescape(prompt)).strip() for prompt in prompts],
            padding="max_length",
            max_length=config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        text = model.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output
        image = model.vision_model(pixel_values=pixels).pooler_output
        features = model.visual_projection(image), model.text_projection(text)
        image, text = (torch.nn.functional.normalize(rows, dim=-1) for rows in features)
        return (image * text).sum(dim=-1).cpu()
