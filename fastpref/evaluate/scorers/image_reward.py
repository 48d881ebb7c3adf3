"""ImageReward: a BLIP that reads the prompt while looking at the picture, and a head that rates what it read."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastpref.errors import UserError
from fastpref.evaluate.scorers.aesthetic import load_head
from fastpref.evaluate.scorers.checkpoint import count_layers, load_weights, square_pixels
from fastpref.models.loading import open_part
from fastpref.models.state_dict import read_state_dict

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the rewards on the authors' validation prompts
TOKENS = 35
_HEAD_WIDTH = 64  # of the vision transformer, whose config is not published as a file: 1024 / 16
_VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"norm\.", "post_layernorm."),
)


class ImageReward:
    """Rewards of mean 0 and standard deviation 1 over the authors' pictures (Xu et al., arXiv 2304.05977).

    Published as ``ImageReward.pt``: BLIP's ViT-L/16 (``blip.visual_encoder``), its BERT with cross-attention to the
    picture (``blip.text_encoder``, described by ``med_config.json``) and the head ``mlp`` on the first token. Pictures
    as OpenAI's CLIP prepares them; prompts lower-cased, padded or cut to 35 tokens.

    Args:
        path: the checkpoint. config: ``med_config.json``, by default the one beside it.
        tokenizer: folder with the ``vocab.txt`` of bert-base-uncased, by default the checkpoint's.
    """

    name = "imagereward"

    def __init__(
        self,
        path: Path,
        *,
        config: Path | None = None,
        tokenizer: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        state = read_state_dict(path)
        vision = {_renamed(name): tensor for name, tensor in _part(state, "blip.visual_encoder.", path).items()}
        text = _part(state, "blip.text_encoder.", path)
        text.pop("embeddings.position_ids", None)  # a buffer in older files
        settings = _read_config(config or path.parent / "med_config.json")
        self.tokenizer = _bert_tokenizer(tokenizer or path.parent, settings["vocab_size"])
        self.device = torch.device(device)
        vision_config = _vision_config(vision, path)
        text_config = _text_config(settings, vision_config.hidden_size)
        self.image_size = vision_config.image_size
        self.vision = load_weights(BlipVisionModel, vision_config, vision, path).to(self.device)
        self.text = load_weights(BlipTextModel, text_config, text, path, add_pooling_layer=False).to(self.device)
        self.head = load_head(_part(state, "mlp.", path), path).to(self.device)

    @torch.no_grad()
    def score(self, images: list[Image], prompts: list[str]) -> Tensor:
        """``(N,)`` fp32."""
        pixels = square_pixels(images, self.image_size).to(self.device)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return (self.head(read[:, 0]).cpu() - MEAN) / STD


def _part(state: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not part:
        raise UserError(f"the checkpoint has nothing under {prefix}", str(path), "give ImageReward.pt as published")
    return part


def _renamed(name: str) -> str:
    for pattern, replacement in _VISION:
        new, found = re.subn(f"^{pattern}", replacement, name)
        if found:
            return new
    return name


def _vision_config(state: dict[str, Tensor], path: Path) -> Any:
    from transformers import BlipVisionConfig

    patches, positions = state.get("embeddings.patch_embedding.weight"), state.get("embeddings.position_embedding")
    inner = state.get("encoder.layers.0.mlp.fc1.weight")
    if patches is None or positions is None or inner is None:
        raise UserError(
            "the checkpoint holds no BLIP vision transformer", str(path), "give ImageReward.pt as published"
        )
    width, patch = patches.shape[0], patches.shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner.shape[0],
        num_hidden_layers=count_layers(state, "encoder.layers"),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        image_size=patch * round((positions.shape[1] - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(settings: dict[str, Any], vision_width: int) -> Any:
    from transformers import BlipTextConfig

    # BLIP's "decoder" is a BERT with cross-attention; it is causal only where a call asks for that.
    return BlipTextConfig(**settings, encoder_hidden_size=vision_width, is_decoder=True, use_cache=False)


def _read_config(path: Path) -> dict[str, Any]:
    wanted = {
        "vocab_size": int,
        "hidden_size": int,
        "intermediate_size": int,
        "num_hidden_layers": int,
        "num_attention_heads": int,
        "max_position_embeddings": int,
        "hidden_act": str,
        "layer_norm_eps": float,
        "pad_token_id": int,
    }
    try:
        found = json.loads(path.read_text())
        return {key: kind(found[key]) for key, kind in wanted.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no usable med_config.json ({type(error).__name__}: {error})"
        raise UserError(what, str(path), "put it beside ImageReward.pt or give config=FILE") from None


def _bert_tokenizer(folder: Path, vocab_size: int) -> Any:
    from transformers import BertTokenizer

    if not any((folder / file).is_file() for file in ("vocab.txt", "tokenizer.json")):
        raise UserError("no BERT tokenizer", str(folder), "give tokenizer=FOLDER with bert-base-uncased's vocab.txt")
    tokenizer = open_part(partial(BertTokenizer.from_pretrained, folder), folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) != vocab_size:
        what = f"the tokenizer has {len(tokenizer)} tokens, the checkpoint {vocab_size}"
        raise UserError(what, str(folder), "give bert-base-uncased's vocab.txt")
    return tokenizer
