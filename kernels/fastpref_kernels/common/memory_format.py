"""Channels first or last: the memory formats of activations (N, C, *positions), for 3 to 5 dimensions alike."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """How a kernel walks through a tensor (N, C, *positions); strides in elements."""

    channels_last: bool
    batch_stride: int
    outer_stride: int  # between channels, or between positions if channels are last


def _merged_stride(x: Tensor) -> int | None:
    """The distance between neighbouring positions, or None if they are not equally spaced."""
    dims = [(size, stride) for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size != 1]
    for (_, outer), (size, inner) in pairwise(dims):
        if outer != size * inner:
            return None
    return dims[-1][1] if dims else 1


def layout(x: Tensor) -> Layout | None:
    """None if neither channels nor positions are dense."""
    between = _merged_stride(x)
    if between == 1:
        return Layout(False, x.stride(0), x.stride(1))
    if between is not None and (x.stride(1) == 1 or x.shape[1] == 1):
        return Layout(True, x.stride(0), between)
    return None


def is_channels_last(x: Tensor) -> bool:
    found = layout(x)
    return found is not None and found.channels_last


def empty_dense(x: Tensor, channels_last: bool) -> Tensor:
    """Uninitialised and dense, of x's shape, dtype and device."""
    if channels_last:
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty(x.shape)


def as_dense(x: Tensor, channels_last: bool) -> Tensor:
    """x itself if it is dense in that order, else a copy."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """(..., K) as (rows, K)."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
