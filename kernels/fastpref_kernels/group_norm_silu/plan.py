"""How the kernels of `group_norm_silu` are launched: one launch for a group that a program can keep, else two.

A group (channels first) of at most one tile is read once. A larger one takes the large tiles of `whole`, where there
are at least as many groups as multiprocessors; else, and for channels last, it is split over chunks: the first launch
leaves one entry a chunk, the second finishes the sums from the entries and reads the tensors again, from the L2 cache
if they fit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.launch import Launch, multiprocessors, remembered
from ..common.memory_format import as_dense, dense_strides, layout_of
from . import backward as backward_kernels
from . import triton as kernels


class Tile(NamedTuple):
    """Rows, positions of a row, warps."""

    rows: int
    positions: int
    warps: int


SPLIT = {  # tiles of the two launches; "few" where the large ones would be fewer than the multiprocessors
    "first": Tile(16, 256, 8),
    "first_few": Tile(8, 256, 4),
    "first_short": Tile(64, 64, 8),
    "last": Tile(64, 32, 8),
    "last_narrow": Tile(16, 128, 8),  # groups of less than ten channels
}
WHOLE = {"whole": Tile(32, 256, 16), "whole_short": Tile(128, 64, 16)}
LARGE = Tile(64, 256, 16)  # of a whole group; the backward keeps two tensors, too many registers in fp32
MAX_CHUNKS = {False: 64, True: 32}  # of a unit, channels last or not: entries that each program merges again
GROUPS = {"last": 8, "last_narrow": 16}  # that a block of channels may touch
BLOCK_ENTRIES = 64


class Cut(NamedTuple):
    """A tensor in tiles."""

    tile: Tile
    whole: bool
    tiles: int  # of a chunk
    n_chunks: int
    parts: int  # units that a group may touch
    block_groups: int


class _Numbers(NamedTuple):
    """What a shape says to the kernels."""

    n_samples: int
    n_channels: int
    n_positions: int
    num_groups: int


@remembered
def cut(numbers: _Numbers, channels_last: bool, large: Tile, least: int) -> Cut:
    """The tiles of a tensor; `least`: programs that fill the device."""
    n, c, positions, num_groups = numbers
    width = c // num_groups
    if channels_last:
        name = "last" if width >= 10 else "last_narrow"
        tile = SPLIT[name]
        tiles, n_chunks = _chunks(-(-positions // tile.positions), MAX_CHUNKS[True])
        parts = (width + tile.rows - 2) // tile.rows + 1
        return Cut(tile, False, tiles, n_chunks, parts, GROUPS[name])
    short = "_short" if positions <= SPLIT["first"].positions // 2 else ""
    tile = SPLIT[f"first{short}"]
    rows = width * -(-positions // tile.positions)
    for whole in (WHOLE[f"whole{short}"], large):
        enough = whole is not large or n * num_groups >= least
        if enough and whole.positions == tile.positions and rows <= whole.rows:
            return Cut(whole, True, 1, 1, 1, 1)
    if not short and n * num_groups * -(-rows // tile.rows) < least:
        tile = SPLIT["first_few"]
    return Cut(tile, False, *_chunks(-(-rows // tile.rows), MAX_CHUNKS[False]), 1, 1)


def _chunks(all_tiles: int, most: int) -> tuple[int, int]:
    """(tiles of a chunk, chunks)."""
    tiles = -(-all_tiles // most)
    return tiles, -(-all_tiles // tiles)


class Forward(NamedTuple):
    """What a forward allocates and launches."""

    strides: tuple[int, ...]  # of the output
    stats: tuple[int, int, int]
    partial: tuple[int, ...]
    launches: tuple[Launch, ...]


class Backward(NamedTuple):
    """What a backward allocates and launches."""

    channels_last: bool
    strides: tuple[int, ...]  # of the gradient of the input, and of that of the output
    partial: tuple[int, ...]
    affine: tuple[int, ...]  # shape of the sums by channel
    launches: tuple[Launch, ...]


def _numbers(shape: tuple[int, ...], num_groups: int) -> _Numbers:
    return _Numbers(shape[0], shape[1], math.prod(shape[2:]), num_groups)


def _launch(kernel: object, cut: Cut, last: bool, numbers: _Numbers, rest: tuple[object, ...]) -> Launch:
    tile, constants = cut.tile, {"BLOCK_R": cut.tile.rows, "BLOCK_P": cut.tile.positions}
    if not cut.whole:
        constants = {"CHANNELS_LAST": last, **constants, "BLOCK_G": cut.block_groups}
        if kernel in (kernels.normalise_kernel, backward_kernels.grad_input_kernel):
            constants["BLOCK_ENTRIES"] = BLOCK_ENTRIES
    units = -(-numbers.n_channels // tile.rows) if last else numbers.num_groups
    return Launch(kernel, (numbers.n_samples * units, cut.n_chunks), (*numbers, *rest), constants, tile.warps)


@remembered
def forward_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    affine: torch.dtype,
    num_groups: int,
    eps: float,
    least: int,
) -> Forward:
    """Of an input of that shape; dtype is that of the input, affine that of the weights."""
    walk = layout_of(shape, strides)
    assert walk is not None
    last, numbers = walk.channels_last, _numbers(shape, num_groups)
    made = cut(numbers, last, LARGE, least)
    distances = walk.batch_stride, walk.outer_stride
    stats = (2, shape[0], num_groups)
    if made.whole:
        launches: tuple[Launch, ...] = (_launch(kernels.whole_kernel, made, last, numbers, (*distances, eps)),)
        return Forward(dense_strides(shape, last), stats, (), launches)
    entries = made.parts * made.n_chunks
    ends = made.n_chunks, entries, made.tiles
    dense = shape[1] if last else numbers.n_positions
    launches = (
        _launch(kernels.moments_kernel, made, last, numbers, (*distances, *ends)),
        _launch(kernels.normalise_kernel, made, last, numbers, (*distances, dense, *ends, eps)),
    )
    return Forward(dense_strides(shape, last), stats, (3, shape[0], num_groups, entries), launches)


@remembered
def backward_plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    affine: torch.dtype,
    num_groups: int,
    needs_affine: bool,
    least: int,
) -> Backward:
    """The same of the backward; needs_affine: the weights get gradients."""
    walk = layout_of(shape, strides)
    assert walk is not None
    last, numbers = walk.channels_last, _numbers(shape, num_groups)
    made = cut(numbers, last, WHOLE["whole"] if dtype == torch.float32 else LARGE, least)
    distances = walk.batch_stride, walk.outer_stride
    pieces = made.n_chunks if last else -(-numbers.n_positions // made.tile.positions)
    sums = (2, shape[0], shape[1], pieces)
    if made.whole:
        launches: tuple[Launch, ...] = (
            _launch(backward_kernels.whole_backward_kernel, made, last, numbers, (*distances, int(needs_affine))),
        )
        return Backward(last, dense_strides(shape, last), (), sums, launches)
    entries = made.parts * made.n_chunks
    dense = shape[1] if last else numbers.n_positions
    ends = (*distances, dense, made.n_chunks, entries, made.tiles)
    launches = (
        _launch(backward_kernels.sums_kernel, made, last, numbers, (*ends, int(needs_affine))),
        _launch(backward_kernels.grad_input_kernel, made, last, numbers, ends),
    )
    return Backward(last, dense_strides(shape, last), (2, shape[0], num_groups, entries), sums, launches)


def launch_forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, stats, nothing)."""
    plan = forward_plan(x.shape, x.stride(), x.dtype, weight.dtype, num_groups, eps, multiprocessors(x.device))
    out = x.new_empty_strided(x.shape, plan.strides)
    stats = torch.empty(plan.stats, dtype=torch.float32, device=x.device)
    if x.numel():
        if plan.partial:
            partial = torch.empty(plan.partial, dtype=torch.float32, device=x.device)
            plan.launches[0](x, partial)
            plan.launches[1](x, weight, bias, partial, stats, out)
        else:
            plan.launches[0](x, weight, bias, stats, out)
    return out, stats, x.new_empty(0)


def launch_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    z: Tensor,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias, the last two empty unless `affine`."""
    plan = backward_plan(x.shape, x.stride(), x.dtype, weight.dtype, num_groups, affine, multiprocessors(x.device))
    grad_input = x.new_empty_strided(x.shape, plan.strides)
    if not x.numel():
        return grad_input, *(torch.zeros_like(weight[: weight.shape[0] if affine else 0]) for _ in range(2))
    if grad.stride() != plan.strides:
        grad = as_dense(grad, plan.channels_last)
    sums = torch.empty(plan.affine, dtype=torch.float32, device=x.device) if affine else stats  # not written
    if plan.partial:
        partial = torch.empty(plan.partial, dtype=torch.float32, device=x.device)
        plan.launches[0](grad, x, weight, bias, stats, partial, sums)
        plan.launches[1](grad, x, weight, bias, stats, partial, grad_input)
    else:
        plan.launches[0](grad, x, weight, bias, stats, sums, grad_input)
    if not affine:
        return grad_input, weight.new_empty(0), weight.new_empty(0)
    grad_bias, grad_weight = (of.sum(dim=(0, 2)).to(weight.dtype) for of in sums)
    return grad_input, grad_weight, grad_bias
