"""Kernels and launchers of `group_norm_silu`; what they compute is said there.

A tile is (channels, positions) of one sample. Program axis 0 runs over samples and blocks of channels, axis 1 over
chunks of `tiles` tiles. `*_stride` are elements: from sample to sample, and from channel to channel (channels first)
or position to position (channels last); tensors without a batch stride are dense.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.memory_format import as_dense, empty_dense, layout

_TILES = {"first": (8, 256), "first_small": (32, 64), "last": (64, 32)}  # (channels, positions) of a tile
_MAX_CHUNKS = 64  # of a channel's positions: enough programs for a full GPU at two samples
_BLOCK_GROUP = 512  # partial sums of a group that are merged at a time


@jit
def _silu_slope(z):
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return sigmoid * (1.0 + z * (1.0 - sigmoid))


@jit
def _channels(n_channels, BLOCK_C: tl.constexpr):
    """(sample, channels) of a program."""
    blocks = tl.cdiv(n_channels, BLOCK_C)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return sample, channel


@jit
def _positions(tile, tiles, BLOCK_P: tl.constexpr):
    return (tl.program_id(1).to(tl.int64) * tiles + tile) * BLOCK_P + tl.arange(0, BLOCK_P)


@jit
def _mask(channel, position, n_channels, n_positions):
    return (channel < n_channels)[:, None] & (position < n_positions)[None, :]


@jit
def _offset(channel, position, outer_stride, CHANNELS_LAST: tl.constexpr):
    """Elements from the sample's first to a tile's."""
    if CHANNELS_LAST:
        offset = position[None, :] * outer_stride + channel[:, None]
    else:
        offset = channel[:, None] * outer_stride + position[None, :]
    return offset


@jit
def _by_channel(ptr, index, channel, n_channels):
    """A column of fp32, an element for each channel of the tile."""
    return tl.load(ptr + index, mask=channel < n_channels, other=0.0).to(tl.float32)[:, None]


@jit
def moments_kernel(
    input_ptr,
    partial_ptr,
    n_samples,
    n_channels,
    n_positions,
    batch_stride,
    outer_stride,
    n_chunks,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """partial (2, N, C, chunks): mean, and sum of squared differences from it, over a chunk of a channel."""
    sample, channel = _channels(n_channels, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    seen = 0.0
    for tile in range(tiles):
        position = _positions(tile, tiles, BLOCK_P)
        mask = _mask(channel, position, n_channels, n_positions)
        place = input_ptr + sample * batch_stride + _offset(channel, position, outer_stride, CHANNELS_LAST)
        x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        count = tl.sum((position < n_positions).to(tl.float32), axis=0)  # 0 in a tile behind the last position
        tile_mean = tl.sum(x, axis=1) / tl.maximum(count, 1.0)
        centred = tl.where(mask, x - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        share = count / tl.maximum(seen + count, 1.0)
        mean += delta * share
        square += tl.sum(centred * centred, axis=1) + delta * delta * (seen * share)
        seen += count
    place = partial_ptr + (sample * n_channels + channel) * n_chunks + tl.program_id(1)
    plane = tl.cast(n_samples, tl.int64) * n_channels * n_chunks
    tl.store(place, mean, mask=channel < n_channels)
    tl.store(place + plane, square, mask=channel < n_channels)


@jit
def group_kernel(
    partial_ptr, mean_ptr, rstd_ptr, n_entries, n_positions, n_chunks, chunk_length, eps, BLOCK_SIZE: tl.constexpr
):
    """Merges the (C / num_groups) * chunks partial moments of a group; a program per sample and group."""
    group = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64) * n_entries
    total = tl.cast(n_entries // n_chunks, tl.float32) * tl.cast(n_positions, tl.float32)
    mean_sum = tl.zeros((BLOCK_SIZE,), tl.float32)
    for start in range(0, n_entries, BLOCK_SIZE):
        entry = start + tl.arange(0, BLOCK_SIZE)
        count = tl.minimum(n_positions - (entry % n_chunks) * chunk_length, chunk_length).to(tl.float32)
        mean_sum += count * tl.load(partial_ptr + group * n_entries + entry, mask=entry < n_entries, other=0.0)
    mean = tl.sum(mean_sum, axis=0) / total
    square_sum = tl.zeros((BLOCK_SIZE,), tl.float32)
    for start in range(0, n_entries, BLOCK_SIZE):
        entry = start + tl.arange(0, BLOCK_SIZE)
        mask = entry < n_entries
        count = tl.minimum(n_positions - (entry % n_chunks) * chunk_length, chunk_length).to(tl.float32)
        place = partial_ptr + group * n_entries + entry
        delta = tl.load(place, mask=mask, other=0.0) - mean
        square_sum += tl.where(mask, count * delta * delta, 0.0) + tl.load(place + plane, mask=mask, other=0.0)
    tl.store(mean_ptr + group, mean)
    tl.store(rstd_ptr + group, 1.0 / tl.sqrt(tl.sum(square_sum, axis=0) / total + eps))


@jit
def normalise_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    out_ptr,
    n_channels,
    n_positions,
    num_groups,
    batch_stride,
    outer_stride,
    dense_stride,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out = silu((x - mean) * rstd * weight + bias)."""
    sample, channel = _channels(n_channels, BLOCK_C)
    group = sample * num_groups + channel // (n_channels // num_groups)
    mean = _by_channel(mean_ptr, group, channel, n_channels)
    scale = _by_channel(rstd_ptr, group, channel, n_channels) * _by_channel(weight_ptr, channel, channel, n_channels)
    bias = _by_channel(bias_ptr, channel, channel, n_channels)
    for tile in range(tiles):
        position = _positions(tile, tiles, BLOCK_P)
        mask = _mask(channel, position, n_channels, n_positions)
        place = input_ptr + sample * batch_stride + _offset(channel, position, outer_stride, CHANNELS_LAST)
        z = (tl.load(place, mask=mask, other=0.0).to(tl.float32) - mean) * scale + bias
        dense = sample * n_channels * n_positions + _offset(channel, position, dense_stride, CHANNELS_LAST)
        tl.store(out_ptr + dense, (z / (1.0 + tl.exp(-z))).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def sums_kernel(
    grad_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    n_samples,
    n_channels,
    n_positions,
    num_groups,
    batch_stride,
    outer_stride,
    dense_stride,
    n_chunks,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """partial (2, N, C, chunks): sums of dz and of dz * xhat over a chunk of a channel."""
    sample, channel = _channels(n_channels, BLOCK_C)
    group = sample * num_groups + channel // (n_channels // num_groups)
    mean = _by_channel(mean_ptr, group, channel, n_channels)
    rstd = _by_channel(rstd_ptr, group, channel, n_channels)
    weight = _by_channel(weight_ptr, channel, channel, n_channels)
    bias = _by_channel(bias_ptr, channel, channel, n_channels)
    sum_dz = tl.zeros((BLOCK_C,), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(tiles):
        position = _positions(tile, tiles, BLOCK_P)
        mask = _mask(channel, position, n_channels, n_positions)
        place = input_ptr + sample * batch_stride + _offset(channel, position, outer_stride, CHANNELS_LAST)
        xhat = (tl.load(place, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        dense = sample * n_channels * n_positions + _offset(channel, position, dense_stride, CHANNELS_LAST)
        grad = tl.load(grad_ptr + dense, mask=mask, other=0.0).to(tl.float32)
        dz = grad * _silu_slope(xhat * weight + bias)
        sum_dz += tl.sum(tl.where(mask, dz, 0.0), axis=1)
        sum_dz_xhat += tl.sum(tl.where(mask, dz * xhat, 0.0), axis=1)
    place = partial_ptr + (sample * n_channels + channel) * n_chunks + tl.program_id(1)
    plane = tl.cast(n_samples, tl.int64) * n_channels * n_chunks
    tl.store(place, sum_dz, mask=channel < n_channels)
    tl.store(place + plane, sum_dz_xhat, mask=channel < n_channels)


@jit
def group_sums_kernel(
    partial_ptr,
    weight_ptr,
    shift_ptr,
    slope_ptr,
    n_entries,
    n_positions,
    n_chunks,
    num_groups,
    BLOCK_SIZE: tl.constexpr,
):
    """shift = mean(weight dz) and slope = mean(weight dz xhat) of a group; a program per sample and group."""
    group = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64) * n_entries
    first_channel = (group % num_groups) * (n_entries // n_chunks)
    total = tl.cast(n_entries // n_chunks, tl.float32) * tl.cast(n_positions, tl.float32)
    shift = tl.zeros((BLOCK_SIZE,), tl.float32)
    slope = tl.zeros((BLOCK_SIZE,), tl.float32)
    for start in range(0, n_entries, BLOCK_SIZE):
        entry = start + tl.arange(0, BLOCK_SIZE)
        mask = entry < n_entries
        weight = tl.load(weight_ptr + first_channel + entry // n_chunks, mask=mask, other=0.0).to(tl.float32)
        place = partial_ptr + group * n_entries + entry
        shift += weight * tl.load(place, mask=mask, other=0.0)
        slope += weight * tl.load(place + plane, mask=mask, other=0.0)
    tl.store(shift_ptr + group, tl.sum(shift, axis=0) / total)
    tl.store(slope_ptr + group, tl.sum(slope, axis=0) / total)


@jit
def grad_input_kernel(
    grad_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    shift_ptr,
    slope_ptr,
    grad_input_ptr,
    n_channels,
    n_positions,
    num_groups,
    batch_stride,
    outer_stride,
    dense_stride,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dx = rstd (weight dz - shift - xhat slope)."""
    sample, channel = _channels(n_channels, BLOCK_C)
    group = sample * num_groups + channel // (n_channels // num_groups)
    mean = _by_channel(mean_ptr, group, channel, n_channels)
    rstd = _by_channel(rstd_ptr, group, channel, n_channels)
    shift = _by_channel(shift_ptr, group, channel, n_channels)
    slope = _by_channel(slope_ptr, group, channel, n_channels)
    weight = _by_channel(weight_ptr, channel, channel, n_channels)
    bias = _by_channel(bias_ptr, channel, channel, n_channels)
    for tile in range(tiles):
        position = _positions(tile, tiles, BLOCK_P)
        mask = _mask(channel, position, n_channels, n_positions)
        place = input_ptr + sample * batch_stride + _offset(channel, position, outer_stride, CHANNELS_LAST)
        xhat = (tl.load(place, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        dense = sample * n_channels * n_positions + _offset(channel, position, dense_stride, CHANNELS_LAST)
        grad = tl.load(grad_ptr + dense, mask=mask, other=0.0).to(tl.float32)
        dz = grad * _silu_slope(xhat * weight + bias)
        dx = rstd * (weight * dz - shift - xhat * slope)
        tl.store(grad_input_ptr + dense, dx.to(grad_input_ptr.dtype.element_ty), mask=mask)


class _Plan(NamedTuple):
    tile: str
    tiles: int  # of a chunk
    n_chunks: int


def _plan(channels_last: bool, n_positions: int) -> _Plan:
    tile = "last" if channels_last else "first" if n_positions > 64 else "first_small"
    all_tiles = -(-n_positions // _TILES[tile][1])
    tiles = -(-all_tiles // _MAX_CHUNKS)
    return _Plan(tile, tiles, -(-all_tiles // tiles))


def _grid_and_constants(x: Tensor, plan: _Plan) -> tuple[tuple[int, int], dict[str, Any]]:
    block_c, block_p = _TILES[plan.tile]
    grid = x.shape[0] * -(-x.shape[1] // block_c), plan.n_chunks
    return grid, {"CHANNELS_LAST": plan.tile == "last", "BLOCK_C": block_c, "BLOCK_P": block_p}


def launch_forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    walk = layout(x)
    assert walk is not None
    out = empty_dense(x, walk.channels_last)
    n, c, n_positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    mean, rstd = (torch.empty(n, num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        plan = _plan(walk.channels_last, n_positions)
        grid, constants = _grid_and_constants(x, plan)
        strides = walk.batch_stride, walk.outer_stride
        partial = torch.empty(2, n, c, plan.n_chunks, dtype=torch.float32, device=x.device)
        moments_kernel[grid](x, partial, n, c, n_positions, *strides, plan.n_chunks, plan.tiles, **constants)
        entries, length = c // num_groups * plan.n_chunks, plan.tiles * constants["BLOCK_P"]
        group_kernel[(n * num_groups,)](
            partial, mean, rstd, entries, n_positions, plan.n_chunks, length, eps, BLOCK_SIZE=_BLOCK_GROUP
        )
        dense_stride = c if walk.channels_last else n_positions
        normalise_kernel[grid](
            x,
            weight,
            bias,
            mean,
            rstd,
            out,
            c,
            n_positions,
            num_groups,
            *strides,
            dense_stride,
            plan.tiles,
            **constants,
        )
    return out, mean, rstd, x.new_empty(0)


def launch_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    z: Tensor,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    walk = layout(x)
    assert walk is not None
    grad_input = empty_dense(x, walk.channels_last)
    n, c, n_positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if not x.numel():
        return grad_input, *(torch.zeros_like(weight[: c if affine else 0]) for _ in range(2))
    grad = as_dense(grad, walk.channels_last)
    plan = _plan(walk.channels_last, n_positions)
    grid, constants = _grid_and_constants(x, plan)
    strides = walk.batch_stride, walk.outer_stride, c if walk.channels_last else n_positions
    partial = torch.empty(2, n, c, plan.n_chunks, dtype=torch.float32, device=x.device)
    shift, slope = torch.empty_like(mean), torch.empty_like(mean)
    sums_kernel[grid](
        *(grad, x, weight, bias, mean, rstd, partial, n, c, n_positions, num_groups),
        *(*strides, plan.n_chunks, plan.tiles),
        **constants,
    )
    group_sums_kernel[(n * num_groups,)](
        *(partial, weight, shift, slope, c // num_groups * plan.n_chunks, n_positions, plan.n_chunks, num_groups),
        BLOCK_SIZE=_BLOCK_GROUP,
    )
    grad_input_kernel[grid](
        *(grad, x, weight, bias, mean, rstd, shift, slope, grad_input, c, n_positions, num_groups),
        *(*strides, plan.tiles),
        **constants,
    )
    if not affine:
        return grad_input, weight.new_empty(0), weight.new_empty(0)
    grad_bias, grad_weight = partial.sum(dim=(1, 3)).to(weight.dtype).unbind()
    return grad_input, grad_weight.clone(), grad_bias.clone()  # an output of a custom op may not be a view
