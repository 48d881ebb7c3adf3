"""Prompts as the UNet takes them, each one through the text encoders once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import repeat
from pathlib import Path

import torch

from fastpref.memory import moved
from fastpref.models.guidance import empty_conditioning
from fastpref.models.loading import model_family
from fastpref.models.policy import Conditioning
from fastpref.models.text import TextStack
from fastpref.models.time_ids import target_time_ids
from fastpref.models.work import Work


class PromptBook:
    """Encodes a prompt when it is first asked for and keeps the result on the CPU, in the encoders' dtype.

    Each prompt is encoded alone: in a batch its last bits would depend on the others, and a run that is resumed meets
    them in another order.

    Args:
        size: (height, width) in pixels of the pictures to be drawn; SDXL is told.
        work: ``text_forwards`` counts the blocks encoded.
    """

    def __init__(
        self, texts: TextStack, model_dir: Path, size: tuple[int, int], device: torch.device, work: Work
    ) -> None:
        self.texts, self.size, self.device, self.work = texts, size, device, work
        self._model_dir = model_dir
        self._sdxl = model_family(model_dir) == "sdxl"
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt, on the device."""
        self._learn([prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known])
        rows = [self._known[prompt] for prompt in prompts]
        pooled = [row for _, row in rows if row is not None]
        return Conditioning(
            moved(torch.stack([row for row, _ in rows]), self.device),
            moved(torch.stack(pooled), self.device) if pooled else None,
            moved(target_time_ids(self.size, len(rows)), self.device) if self._sdxl else None,
        )

    def empty(self) -> Conditioning:
        """What guidance leads away from, one row (see :func:`fastpref.models.guidance.empty_conditioning`)."""
        known = self.conditioning([""])
        return empty_conditioning(self._model_dir, known.prompt_embeds, known.pooled_prompt_embeds)

    def _learn(self, prompts: list[str]) -> None:
        if not prompts:
            return
        encoded = [self.texts.encode([prompt]) for prompt in prompts]
        self.work.text_forwards += self.texts.blocks * len(prompts)
        embeds = torch.cat([rows for rows, _ in encoded]).cpu()  # the device is waited for once, not prompt by prompt
        found = [rows for _, rows in encoded if rows is not None]
        pooled: Iterable[torch.Tensor | None] = torch.cat(found).cpu() if found else repeat(None, len(prompts))
        self._known.update(zip(prompts, zip(embeds, pooled, strict=True), strict=True))


def prompt_id(prompt: str) -> int:
    """The first 64 bits of the prompt's sha256, as a signed integer: what stands for it in the keys of noise."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big", signed=True)
