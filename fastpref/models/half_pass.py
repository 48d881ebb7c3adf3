"""A UNet's pass in one half-precision dtype, without autocast, and the few places that stay in fp32.

Weights, activations and the copies of trained weights are bf16 or fp16, so that nothing is cast between layers. In
fp32, because it costs next to nothing and what they lose is never made up for: the timestep's and the sizes' embedding,
the first convolution, which sees the noisy latents, and the last norm and convolution, which give the prediction.
Statistics of norms and the softmax are in fp32 inside their kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_WIDE = ("time_embedding", "add_embedding", "conv_in", "conv_norm_out", "conv_out")


class _Narrowed(nn.Module):
    """What follows the embeddings' sum: one cast for all residual blocks."""

    def __init__(self, act: nn.Module | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.act, self.dtype = act, dtype

    def forward(self, embedding: Tensor) -> Tensor:
        return (embedding if self.act is None else self.act(embedding)).to(self.dtype)


def set_half_pass(unet: Any, dtype: torch.dtype) -> None:
    """Have ``unet``, a UNet2DConditionModel with or without adapters, compute in ``dtype`` (bf16 or fp16).

    It then takes fp32 latents and pooled embeddings and prompt embeddings in ``dtype``, and predicts in fp32. Frozen
    weights get their dtype here; trained ones, if not named by :func:`wide_names`, from
    :class:`fastpref.models.masters.Masters`.
    """
    wide = wide_names(unet)
    for name, parameter in unet.named_parameters():
        if name in wide:
            parameter.data = parameter.data.to(torch.float32)
        elif not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if computes_in_half(unet):
        return
    unet.time_embed_act = _Narrowed(unet.time_embed_act, dtype)
    unet.conv_in.register_forward_hook(lambda _, __, output: output.to(dtype))
    last = unet.conv_out if unet.conv_norm_out is None else unet.conv_norm_out
    last.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.float32), *inputs[1:]))


def computes_in_half(unet: Any) -> bool:
    """Whether :func:`set_half_pass` was called."""
    return isinstance(unet.time_embed_act, _Narrowed)


def wide_names(unet: nn.Module) -> set[str]:
    """Names of the parameters that stay in fp32."""
    parts = [f"{part}." for part in _WIDE]
    return {name for name, _ in unet.named_parameters() if name.startswith(tuple(parts))}
