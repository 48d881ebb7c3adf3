"""Where the elements of a batch lie, so that kernels read any strides and nothing is copied first.

A row is the flattened (C, H, W, ...) of one sample. Where every tensor of a launch has dense rows a kernel walks the
row's offsets (`flat`); otherwise it decomposes the logical offset over at most three dimensions.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .dispatch import jit, tl

Strides = tuple[int, int, int, int]


class Layout(NamedTuple):
    """flat: every row is dense; sizes: of the two inner dimensions; strides: (row, outer, middle, inner) by tensor."""

    flat: bool
    sizes: tuple[int, int]
    strides: list[Strides]


def layout_of(op: str, *tensors: Tensor | None) -> Layout:
    """The common layout of tensors of one shape (N, ...); None has strides 0.

    Raises ValueError where the strides do not collapse to three dimensions, or to one in rows of 2^31 elements.
    """
    shape = next(x.shape for x in tensors if x is not None)
    return layout_by_strides(op, shape, *(None if x is None else x.stride() for x in tensors))


def layout_by_strides(op: str, shape: tuple[int, ...], *tensors: tuple[int, ...] | None) -> Layout:
    """`layout_of`, of tensors' strides."""
    given = [x for x in tensors if x is not None]
    dims: list[tuple[int, tuple[int, ...]]] = []  # (size, stride in each given tensor), outermost first
    for d in range(1, len(shape)):
        size, strides = shape[d], tuple(x[d] for x in given)
        if size == 1:
            continue
        if dims and all(outer == inner * size for outer, inner in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    flat = not dims or (len(dims) == 1 and set(dims[0][1]) == {1})
    if len(dims) > 3:
        raise ValueError(f"{op}: strides that span more than three dimensions, call .contiguous() first")
    elements = math.prod(shape[1:])
    if not flat and elements >= 1 << 31:
        raise ValueError(f"{op}: rows of 2^31 elements or more must be dense, call .contiguous() first")
    dims = [(1, (0,) * len(given))] * (3 - len(dims)) + dims
    inner = iter(zip(*(strides for _, strides in dims), strict=True))
    # the stride of a single row means nothing, and an odd one would cost the wide accesses
    outer = iter([x[0] if shape[0] > 1 else elements for x in given])
    strides_of = [(0, 0, 0, 0) if x is None else (next(outer), *next(inner)) for x in tensors]
    return Layout(flat, (dims[1][0], dims[2][0]), strides_of)


@jit
def address(offset, row, sizes, strides, STRIDED: tl.constexpr):
    """Offset in memory of logical elements of a row; offset and row int64, sizes and strides as in `Layout`."""
    start = row * strides[0]
    if STRIDED:
        logical = offset.to(tl.int32)  # layout_of refuses strided rows of 2^31 elements; 64-bit division is slow
        outer = logical // sizes[1]
        place = (outer // sizes[0]).to(tl.int64) * strides[1] + (outer % sizes[0]).to(tl.int64) * strides[2]
        return start + place + (logical % sizes[1]).to(tl.int64) * strides[3]
    else:
        return start + offset
