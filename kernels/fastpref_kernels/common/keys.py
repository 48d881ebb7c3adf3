"""Keys of counter-based random numbers: which stream a draw comes from, and the first word of a stream.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 4.3.
"""

from __future__ import annotations

from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

from .checks import check_choice, check_tensor
from .philox_torch import MASK, key_words, philox4x32

Purpose = Literal[
    "noise",
    "timestep",
    "flip",
    "posterior",
    "caption",
    "permutation",
    "sample",
    "init",
    "label",
    "candidate",
    "choice",
    "rounding",
]
PURPOSES: dict[str, int] = {name: number for number, name in enumerate(get_args(Purpose))}


def check_keys(op: str, keys: Tensor) -> None:
    check_tensor(op, "keys", keys)
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ValueError(f"{op}: keys must be an int64 vector, got {keys.dtype} of shape {tuple(keys.shape)}")
    if keys.numel() == 0:
        raise ValueError(f"{op}: keys are empty")


def _check_word(name: str, value: int, bits: int) -> None:
    if not isinstance(value, (int, Integral)) or not 0 <= value < 1 << bits:
        raise ValueError(f"derive_keys: {name} must be a number in [0, 2^{bits}), got {value!r}")


def derive_keys(seed: int, epoch: int | Tensor, ids: Tensor, draw: int, purpose: Purpose | int) -> Tensor:
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
        check_choice("derive_keys", "purpose", purpose, tuple(PURPOSES))
        purpose = PURPOSES[purpose]
    check_tensor("derive_keys", "ids", ids)
    if ids.dtype != torch.int64:
        raise ValueError(f"derive_keys: ids must be int64, got {ids.dtype}")
    if not isinstance(seed, (int, Integral)) or not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"derive_keys: seed must fit 64 bits, got {seed!r}")
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
