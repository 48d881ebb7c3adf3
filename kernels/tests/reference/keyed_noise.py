"""Philox4x32-10 in Python integers and Box-Muller in float64 of fp32 uniforms, an element at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from ctypes import c_float

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def derive_key(seed: int, epoch: int, sample: int, draw: int, purpose: int) -> int:
    counter = (sample & MASK, sample >> 32 & MASK, epoch, draw << 8 | purpose)
    low, high, _, _ = philox4x32(counter, (seed & MASK, seed >> 32 & MASK))
    key = low | high << 32
    return key - (1 << 64) if key >> 63 else key


def uniform(word: int) -> float:
    return c_float(c_float(word).value / 2**32 + 2**-32).value


def normal(key: int, element: int) -> float:
    words = philox4x32((element // 4, 0, 0, 0), (key & MASK, key >> 32 & MASK))
    pair = element % 4 // 2 * 2
    u, v = (uniform(word) for word in words[pair : pair + 2])
    radius = math.sqrt(-2 * math.log(u))
    return radius * (math.sin if element % 2 else math.cos)(2 * math.pi * v)


def noise(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """(N, *shape) float64."""
    elements = range(math.prod(shape))
    rows = [[normal(key, e) for e in elements] for key in keys.tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(-1, *shape)


def velocity(keys: Tensor, x0: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """p * noise + q * x0 in float64."""
    p, q = (x.double().view(-1, *[1] * (x0.dim() - 1)) for x in (p, q))
    return p * noise(keys, x0.shape[1:]) + q * x0.double()
