"""Captions to what the UNet attends to: tokenizers and text encoders of a pipeline folder, for captions of any length.

A CLIP text encoder takes 77 positions: a start token, 75 tokens, an end token. ``max_caption_tokens`` says how many
such blocks a caption gets: 77 one (the rest is cut off, as diffusers does), 150 two, 225 three. Tokens are filled into
the blocks 75 at a time; each block is wrapped in start and end, padded as its tokenizer pads and encoded on its own,
and the encoders' outputs are joined: 77, 154 or 231 positions. Blocks that a caption doesn't need are those of the
empty prompt, so that all captions have one shape. SDXL's pooled embedding is that of the first block.

ComfyUI, A1111 and its forks, and compel encode long prompts in the same blocks. kohya's ``max_token_length`` uses the
same blocks too but then drops the inner start and end rows (152 or 227 positions); here they stay, because a LoRA is
drawn with by those programs, and because the row of a block's end token is what CLIP pools.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastpref.errors import UserError
from fastpref.memory import moved
from fastpref.models.caption_length import BLOCKS
from fastpref.models.loading import Family, model_family, open_part, read_part_json
from fastpref.models.weights import weights_of


@dataclass(frozen=True)
class BlockTokenizer:
    """A CLIP tokenizer that fills blocks.

    Attributes:
        length: positions of a block, start and end included.
        blocks: of every caption.
    """

    tokenizer: Any
    length: int
    blocks: int

    @property
    def room(self) -> int:
        """Tokens of a caption that fit, without start and end."""
        return self.blocks * (self.length - 2)

    def token_ids(self, captions: Sequence[str]) -> torch.Tensor:
        """``(n, blocks, length)`` int64; what doesn't fit is cut off."""
        found = self.tokenizer(list(captions), truncation=True, max_length=self.room + 2).input_ids
        rows = [[self._block(ids[1:-1], number) for number in range(self.blocks)] for ids in found]
        return torch.tensor(rows, dtype=torch.int64)

    def _block(self, tokens: list[int], number: int) -> list[int]:
        own, size = self.tokenizer, self.length - 2
        piece = tokens[number * size : (number + 1) * size]
        return [own.bos_token_id, *piece, own.eos_token_id] + [own.pad_token_id] * (size - len(piece))


@dataclass
class TextStack:
    """Tokenizers and text encoders of one pipeline, ready to encode.

    Attributes:
        max_caption_tokens: 77, 150 or 225.
        rows: blocks encoded so far.
    """

    family: Family
    tokenizers: list[Any]
    encoders: list[Any]
    device: torch.device
    max_caption_tokens: int = 77
    rows: int = 0

    @classmethod
    def of_pipeline(cls, pipeline: Any, max_caption_tokens: int) -> TextStack:
        """The parts of a loaded diffusers pipeline, with whatever is on them."""
        two = hasattr(pipeline, "text_encoder_2")
        names = ("", "_2") if two else ("",)
        tokenizers, encoders = ([getattr(pipeline, part + name) for name in names] for part in _PARTS)
        return cls("sdxl" if two else "sd15", tokenizers, encoders, pipeline.device, max_caption_tokens)

    @property
    def blocks(self) -> int:
        """Rows of a text encoder that one caption costs."""
        return BLOCKS[self.max_caption_tokens]

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Captions to what the UNet attends to; with one block, bit for bit as the diffusers pipelines compute it.

        Returns:
            ``prompt_embeds (n, blocks·L, D)`` and, for SDXL, ``pooled_prompt_embeds (n, P)``, in the encoders' dtype.
        """
        ids = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            length = _length(tokenizer, encoder.config.max_position_embeddings)
            ids.append(BlockTokenizer(tokenizer, length, self.blocks).token_ids(captions))
        return self.encode_ids(ids)

    @torch.no_grad()
    def encode_ids(self, ids: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """:meth:`encode` of captions in tokens, for each encoder ``(n, blocks, L)`` int64 on the CPU."""
        hidden, pooled = [], None
        for tokens, encoder in zip(ids, self.encoders, strict=True):
            output = encoder(moved(tokens.flatten(0, 1), self.device), output_hidden_states=self.family == "sdxl")
            if self.family == "sdxl":
                states, pooled = output.hidden_states[-2], output[0][:: self.blocks]
            else:
                states = output[0]
            hidden.append(states.unflatten(0, tokens.shape[:2]).flatten(1, 2))
        self.rows += len(ids[0]) * self.blocks
        return torch.cat(hidden, dim=-1), pooled


_PARTS = ("tokenizer", "text_encoder")


def load_text_stack(path: Path, dtype: torch.dtype, device: torch.device, max_caption_tokens: int = 77) -> TextStack:
    """The text side of a pipeline folder."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds: dict[str, Any] = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
    family, encoders = model_family(path), []
    for suffix in _suffixes(path):
        folder = path / f"text_encoder{suffix}"
        load = partial(kinds[suffix].from_pretrained, folder, dtype=dtype, **weights_of(folder).options)
        encoders.append(open_part(load, path).to(device).eval().requires_grad_(False))
    return TextStack(family, [_tokenizer(path, s) for s in _suffixes(path)], encoders, device, max_caption_tokens)


def load_block_tokenizers(path: Path, max_caption_tokens: int) -> list[BlockTokenizer]:
    """The tokenizers of a pipeline folder alone; no weights are read."""
    tokenizers = [_tokenizer(path, suffix) for suffix in _suffixes(path)]
    return [BlockTokenizer(own, own.model_max_length, BLOCKS[max_caption_tokens]) for own in tokenizers]


def _suffixes(path: Path) -> Iterable[str]:
    return ("", "_2") if model_family(path) == "sdxl" else ("",)


def _tokenizer(path: Path, suffix: str) -> Any:
    from transformers import CLIPTokenizer

    tokenizer: Any = open_part(partial(CLIPTokenizer.from_pretrained, path / f"tokenizer{suffix}"), path)
    if None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        todo = "copy the tokenizer's files from the base model again"
        raise UserError("the tokenizer has no start, end or padding token", str(path / f"tokenizer{suffix}"), todo)
    positions = read_part_json(path / f"text_encoder{suffix}" / "config.json").get("max_position_embeddings", 77)
    tokenizer.model_max_length = _length(tokenizer, positions)
    return tokenizer


def _length(tokenizer: Any, positions: int) -> int:
    """Of a block: what the tokenizer's files say, which may be nothing, and no more than the encoder's positions."""
    return min(int(tokenizer.model_max_length), int(positions))
