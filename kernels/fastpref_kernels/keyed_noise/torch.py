"""Noise of keys in torch: Philox words, Box-Muller, and what is added to clean latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.dispatch import accumulation_dtype
from ..common.philox_torch import key_words, philox4x32

_CHUNK = 1 << 15  # Philox blocks of four words worked on at a time
# Blocks for log, cos and sin: whole SIMD vectors and below torch's threshold for splitting over threads, so no
# element ever falls into a scalar tail, whose last bit may differ: a row's noise has the same bits in any batch.
_BLOCK, _LANES = 1 << 14, 64


def _uniform(words: Tensor, out: Tensor) -> Tensor:
    """32-bit words to (0, 1] in fp32."""
    return out.copy_(words).mul_(2.0**-32).add_(2.0**-32)


def _box_muller(radius_words: Tensor, angle_words: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals, r cos(a) and r sin(a), of every pair of words; flat fp32."""
    count = radius_words.numel()
    padded = -(-count // _LANES) * _LANES
    u = torch.ones(padded, dtype=torch.float32, device=radius_words.device)
    angle = torch.zeros_like(u)
    _uniform(radius_words.reshape(-1), u[:count])
    _uniform(angle_words.reshape(-1), angle[:count])
    sine = torch.empty_like(u)
    for start in range(0, padded, _BLOCK):
        block = slice(start, start + _BLOCK)
        radius = u[block].log_().mul_(-2.0).sqrt_()
        a = angle[block].mul_(6.283185307179586)
        torch.sin(a, out=sine[block]).mul_(radius)
        a.cos_().mul_(radius)
    return angle[:count], sine[:count]


def normals(keys: Tensor, first: int, blocks: int) -> Tensor:
    """Normals of the Philox blocks first .. first + blocks: (N,) keys to (N, 4 * blocks) fp32."""
    low, high = key_words(keys)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=keys.device)
    counter = torch.arange(first, first + blocks, device=keys.device).unsqueeze(0)
    w0, w1, w2, w3 = philox4x32((counter, zero, zero, zero), (low.unsqueeze(1), high.unsqueeze(1)))
    out = torch.empty(keys.shape[0], blocks, 2, 2, dtype=torch.float32, device=keys.device)
    for pair, (radius, angle) in enumerate(((w0, w1), (w2, w3))):
        cosine, sine = _box_muller(radius, angle)
        out[:, :, pair, 0] = cosine.view_as(w0)
        out[:, :, pair, 1] = sine.view_as(w0)
    return out.flatten(1)


def _tiles(rows: int, blocks: int) -> list[tuple[slice, int, int]]:
    """(rows, first Philox block, number of blocks) of tiles of about _CHUNK blocks."""
    width = min(blocks, _CHUNK)
    step = max(1, _CHUNK // width)
    return [
        (slice(row, row + step), first, min(width, blocks - first))
        for row in range(0, rows, step)
        for first in range(0, blocks, width)
    ]


def keyed_noise(keys: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard normals (N, *shape)."""
    out = torch.empty(keys.shape[0], *shape, dtype=dtype, device=keys.device)
    flat = out.view(keys.shape[0], -1)
    for rows, first, blocks in _tiles(flat.shape[0], -(-flat.shape[1] // 4)):
        place = flat[rows, 4 * first : 4 * (first + blocks)]
        place.copy_(normals(keys[rows], first, blocks)[:, : place.shape[1]])
    return out


def rows(x: Tensor, like: Tensor) -> Tensor:
    """Coefficients (N,) as (N, 1, ...), to broadcast with `like`, in its accumulation dtype."""
    return x.to(accumulation_dtype(like.dtype)).view(-1, *[1] * (like.dim() - 1))


def add_keyed_noise(x0: Tensor, keys: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """a[n] * x0[n] + s[n] * noise of keys[n], contiguous, in x0's dtype."""
    dtype = accumulation_dtype(x0.dtype)
    scale, sigma = a.to(dtype).view(-1, 1), s.to(dtype).view(-1, 1)
    out = torch.empty_like(x0, memory_format=torch.contiguous_format)
    flat, clean = out.view(x0.shape[0], -1), x0.reshape(x0.shape[0], -1)
    for some, first, blocks in _tiles(flat.shape[0], -(-flat.shape[1] // 4)):
        columns = slice(4 * first, 4 * (first + blocks))
        place = flat[some, columns]
        noise = normals(keys[some], first, blocks)[:, : place.shape[1]].to(dtype).mul_(sigma[some])
        place.copy_(clean[some, columns].to(dtype).mul(scale[some]).add_(noise))
    return out
