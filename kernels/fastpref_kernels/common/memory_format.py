"""Channels first or last: the memory formats of activations (N, C, *positions), for 3 to 5 dimensions alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from .launch import remembered


class Layout(NamedTuple):
    """How a kernel walks through a tensor (N, C, *positions); strides in elements."""

    channels_last: bool
    batch_stride: int
    outer_stride: int  # between channels, or between positions if channels are last
    # of a dimension of size 1, whose own stride means nothing: as in a dense tensor


def _merged_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The distance between neighbouring positions, or None if they are not equally spaced."""
    dims = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    for (_, outer), (size, inner) in pairwise(dims):
        if outer != size * inner:
            return None
    return dims[-1][1] if dims else 1


def layout(x: Tensor) -> Layout | None:
    """None if neither channels nor positions are dense."""
    return layout_of(x.shape, x.stride())


@remembered
def layout_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout | None:
    """`layout` of a tensor's shape and strides."""
    between, n_channels, positions = _merged_stride(shape[2:], strides[2:]), shape[1], math.prod(shape[2:])
    batch_stride = strides[0] if shape[0] > 1 else n_channels * positions
    if between == 1:
        return Layout(False, batch_stride, strides[1] if n_channels > 1 else positions)
    if between is not None and (strides[1] == 1 or n_channels == 1):
        return Layout(True, batch_stride, between)
    return None


def dense_strides(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    """Of a dense tensor of that shape."""
    order = [0, *range(2, len(shape)), 1] if channels_last else list(range(len(shape)))
    strides, distance = [0] * len(shape), 1
    for d in reversed(order):
        strides[d] = distance
        distance *= max(shape[d], 1)
    return tuple(strides)


def is_channels_last(x: Tensor) -> bool:
    found = layout(x)
    return found is not None and found.channels_last


def empty_dense(x: Tensor, channels_last: bool) -> Tensor:
    """Uninitialised and dense, of x's shape, dtype and device."""
    if channels_last:
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty(x.shape)


def as_dense(x: Tensor, channels_last: bool) -> Tensor:
    """x itself if it is dense in that order, else a copy; dimensions of size 1 get the strides of a dense tensor."""
    dense = (x.movedim(1, -1) if channels_last else x).contiguous()
    if 1 in dense.shape:  # contiguous() leaves their strides, which torch's own ops may refuse
        dense = dense.view(dense.numel()).view(dense.shape)
    return dense.movedim(-1, 1) if channels_last else dense


def rows_of(x: Tensor) -> Tensor:
    """(..., K) as (rows, K)."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
