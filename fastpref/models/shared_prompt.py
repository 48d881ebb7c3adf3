"""Cross-attention keys and values of the prompt that winner and loser share, computed once a pair.

They are functions of the prompt alone, so for rows [winners; losers] the second half of them is the first half again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def share_prompts(unet: torch.nn.Module) -> None:
    """From now on every forward of ``unet`` takes 2n rows whose prompts n..2n-1 are those of 0..n-1."""
    from diffusers.models.attention_processor import Attention

    for module in unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            for projection in (module.to_k, module.to_v):
                projection.register_forward_pre_hook(_first_half)
                projection.register_forward_hook(_twice)


def _first_half(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    prompts, *rest = inputs
    return (prompts[: len(prompts) // 2], *rest)


def _twice(_: Any, __: Any, output: Tensor) -> Tensor:
    return torch.cat([output, output])
