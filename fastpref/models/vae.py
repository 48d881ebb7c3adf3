"""Calls of a VAE: no more pictures at once than memory should be spent on, and no overflow in fp16."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

SLICE = 1 << 14
"""Positions in the latents of one call, those of a picture of 1024². At that size more pictures at once gain no time
and need gigabytes each; smaller pictures share a call. It is a constant, and not what happens to be free, so that the
same pictures give the same bits in any run."""


_IN_FP32 = "opened_in_fp32"


def encode(vae: Any, pixels: Tensor) -> Any:
    """The posterior of pictures (N, 3, H, W) in [-1, 1]: diffusers' ``DiagonalGaussianDistribution`` in fp32, or fp64
    if the VAE is."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    positions = pixels.shape[-1] * pixels.shape[-2] // scale_factor(vae) ** 2
    return DiagonalGaussianDistribution(_sliced(_moments, vae, pixels, positions))


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents (N, C, h, w), scaled as the UNet takes them, to pictures (N, 3, H, W) in [-1, 1] or a bit beyond.

    fp32, or fp64 if the VAE is. An AutoencoderTiny will do too.
    """
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    return _sliced(_pictures, vae, latents / scale + shift, latents.shape[-1] * latents.shape[-2])


def survives_fp16(vae: Any, in_fp32: Callable[[], Any]) -> Any:
    """``vae``; if it is in fp16, which ends at 65504, what overflows is computed again by the model that ``in_fp32``
    opens, once. bf16 reaches as far as fp32."""
    if vae.dtype == torch.float16:
        setattr(vae, _IN_FP32, cache(in_fp32))
    return vae


def scale_factor(vae: Any) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def rows_at_once(positions: int) -> int:
    """Rows of so many latent positions each that one call takes."""
    return max(1, SLICE // positions)


def _moments(vae: Any, pixels: Tensor) -> Tensor:
    return vae.encode(pixels).latent_dist.parameters


def _pictures(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents, return_dict=False)[0]


def _sliced(call: Callable[[Any, Tensor], Tensor], vae: Any, rows: Tensor, positions: int) -> Tensor:
    wide, open_wide = torch.promote_types(vae.dtype, torch.float32), getattr(vae, _IN_FP32, None)
    parts = []
    for part in rows.split(rows_at_once(positions)):
        found = call(vae, part.to(vae.dtype)).to(wide)
        if open_wide is not None and bool(part.isfinite().all()) and not bool(found.isfinite().all()):
            found = call(open_wide(), part.to(wide))
        parts.append(found)
    return torch.cat(parts)
