"""Philox4x32-10 in torch integer arithmetic: the integers of `philox.py`, on any device.

Words are kept in int64: a product of two 32-bit words wraps modulo 2^64, from which shift and mask give its exact
halves.
"""

from __future__ import annotations

from torch import Tensor

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10 (Salmon et al. 2011, section 4.3) on broadcastable int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_and_(MASK) ^ c1 ^ k0
        c2 = (product0 >> 32).bitwise_and_(MASK) ^ c3 ^ k1
        c1, c3 = product1 & MASK, product0 & MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & MASK, (k1 + _KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def key_words(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) 32-bit words of 64-bit keys."""
    return keys & MASK, (keys >> 32) & MASK
