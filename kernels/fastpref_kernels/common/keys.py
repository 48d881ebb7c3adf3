"""Keys of counter-based random numbers: which stream a draw comes from, and the first word of a stream.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .philox_torch import MASK, key_words, philox4x32

PURPOSES = {
    "noise": 0,
    "timestep": 1,
    "flip": 2,
    "posterior": 3,
    "caption": 4,
    "permutation": 5,
    "sample": 6,
    "init": 7,
    "label": 8,
    "candidate": 9,
    "choice": 10,
    "rounding": 11,
}


def check_keys(op: str, keys: Tensor) -> None:
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ValueError(f"{op}: keys must be an int64 vector, got {keys.dtype} of shape {tuple(keys.shape)}")
    if keys.numel() == 0:
        raise ValueError(f"{op}: keys are empty")


def _check_word(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"derive_keys: {name} must be in [0, 2^{bits}), got {value}")


def derive_keys(seed: int, epoch: int | Tensor, ids: Tensor, draw: int, purpose: str | int) -> Tensor:
    """64-bit Philox keys of (seed, epoch, id, draw, purpose), from which all randomness of a run follows.

    seed: 64 bits.
    epoch: in [0, 2^32), one number or an int64 tensor that broadcasts with ids.
    ids: int64 (N,), of samples or groups.
    draw: in [0, 2^24).
    purpose: a name in `PURPOSES` or a number in [0, 256).

    Returns (N,) int64 on ids' device: the first two words of Philox4x32-10 with the seed as key and (id low, id high,
    epoch, draw << 8 | purpose) as counter. Plain torch, exact on every device.
    Raises ValueError for a value out of range.
    """
    if isinstance(purpose, str):
        if purpose not in PURPOSES:
            raise ValueError(f"derive_keys: purpose must be one of {', '.join(PURPOSES)}, got {purpose!r}")
        purpose = PURPOSES[purpose]
    if ids.dtype != torch.int64:
        raise ValueError(f"derive_keys: ids must be int64, got {ids.dtype}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"derive_keys: seed must fit 64 bits, got {seed}")
    _check_word("draw", draw, 24)
    _check_word("purpose", purpose, 8)
    if isinstance(epoch, Tensor):
        if epoch.dtype != torch.int64:
            raise ValueError(f"derive_keys: epoch must be int64, got {epoch.dtype}")
        if epoch.numel():
            _check_word("epoch", int(epoch.min()), 32)
            _check_word("epoch", int(epoch.max()), 32)
        epoch_word = epoch.to(ids.device)
    else:
        _check_word("epoch", epoch, 32)
        epoch_word = torch.full((), epoch, dtype=torch.int64, device=ids.device)
    low, high = key_words(ids)
    last = torch.full((), draw << 8 | purpose, dtype=torch.int64, device=ids.device)
    seed_words = [torch.full((), seed >> shift & MASK, dtype=torch.int64, device=ids.device) for shift in (0, 32)]
    w0, w1, _, _ = philox4x32((low, high, epoch_word, last), (seed_words[0], seed_words[1]))
    return w0 | w1 << 32


def keyed_uniform_u32(keys: Tensor) -> Tensor:
    """(N,) int64 in [0, 2^32): the first word of each key's stream, for timesteps, flips and caption dropout.

    Plain torch, exact on every device. Raises ValueError for keys that are not an int64 vector.
    """
    check_keys("keyed_uniform_u32", keys)
    zero = torch.zeros((), dtype=torch.int64, device=keys.device)
    return philox4x32((zero, zero, zero, zero), key_words(keys))[0]
