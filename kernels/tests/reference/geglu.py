from __future__ import annotations

import math

import torch
from torch import Tensor


def phi(x: Tensor) -> Tensor:
    """The distribution function of the normal distribution, accurate in its tail."""
    return 0.5 * torch.special.erfc(-x.double() / math.sqrt(2))


def geglu(hidden: Tensor) -> Tensor:
    value, gate = hidden.double().chunk(2, -1)
    return value * gate * phi(gate)
