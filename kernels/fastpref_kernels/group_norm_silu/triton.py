"""Kernels of `group_norm_silu`; what they compute is said there, how they are launched in plan.py.

A tile is (rows, positions) of one sample; program axis 0 runs over samples and units, axis 1 over chunks of `tiles`
tiles. Channels first: a unit is a group, and a row a segment of at most BLOCK_P positions of one of its channels.
Channels last: a unit is a block of BLOCK_R channels, and a row one of them; the block may touch BLOCK_G groups.
`*_stride` are elements: from sample to sample, and from channel to channel (channels first) or position to position
(channels last); tensors without a batch stride are dense. What a program finds for a group is one entry of n_entries.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from ..common.dispatch import jit, tl


@jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@jit
def _program(n_channels, num_groups, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr):
    """(sample, unit)."""
    units = tl.cdiv(n_channels, BLOCK_R) if CHANNELS_LAST else num_groups
    return (tl.program_id(0) // units).to(tl.int64), tl.program_id(0) % units


@jit
def _rows(
    unit,
    tile,
    n_channels,
    n_positions,
    num_groups,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """(number of the row within the unit, its channel, is there such a row, positions, is there such an element)."""
    if CHANNELS_LAST:
        row = tl.arange(0, BLOCK_R)
        channel = unit * BLOCK_R + row
        valid = channel < n_channels
        position = tile * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    else:
        width, segments = n_channels // num_groups, tl.cdiv(n_positions, BLOCK_P)
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        channel = unit * width + row // segments
        valid = row < width * segments
        position = (row % segments * BLOCK_P)[:, None] + tl.arange(0, BLOCK_P)[None, :]
    return row, channel, valid, position, valid[:, None] & (position < n_positions)


@jit
def _offset(channel, position, outer_stride, CHANNELS_LAST: tl.constexpr):
    """Elements from the sample's first to a tile's."""
    if CHANNELS_LAST:
        offset = position.to(tl.int64) * outer_stride + channel[:, None]
    else:
        offset = channel.to(tl.int64)[:, None] * outer_stride + position
    return offset


@jit
def _load(ptr, index, mask):
    return tl.load(ptr + index, mask=mask, other=0.0).to(tl.float32)


@jit
def _groups(unit, n_channels, num_groups, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr):
    """(groups that a unit touches, is there such a group, the first unit that touches each, how many units do)."""
    if CHANNELS_LAST:
        width = n_channels // num_groups
        group = unit * BLOCK_R // width + tl.arange(0, BLOCK_G)
        first = group * width // BLOCK_R
        valid = (group < num_groups) & (group * width < (unit + 1) * BLOCK_R)
        parts = (group * width + width - 1) // BLOCK_R - first + 1
    else:
        group = unit + tl.arange(0, BLOCK_G)
        first, parts, valid = group, group - unit + 1, group < num_groups
    return group, valid, first, parts


@jit
def _member(unit, n_channels, num_groups, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr):
    """(BLOCK_R, BLOCK_G): does the row belong to the group; channels first, every row belongs to the only one."""
    row, own = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_G)[None, :]
    if CHANNELS_LAST:
        width, channel = n_channels // num_groups, unit * BLOCK_R + row
        member = (channel // width - unit * BLOCK_R // width == own) & (channel < n_channels)
    else:
        member = row >= own
    return member


@jit
def _of_rows(value, member):
    """From groups to rows."""
    return tl.sum(tl.where(member, value[None, :], 0.0), axis=1)[:, None]


@jit
def _merge(count, mean, square, more, mean_more, square_more):
    """Moments of two disjoint sets: count, mean, sum of squared differences from it."""
    share = more / tl.maximum(count + more, 1.0)
    delta = mean_more - mean
    return count + more, mean + delta * share, square + square_more + delta * delta * (count * share)


@jit
def _row_moments(x, mask):
    """Of each row of a tile."""
    count = tl.sum(mask.to(tl.float32), axis=1)
    mean = tl.sum(x, axis=1) / tl.maximum(count, 1.0)
    centred = tl.where(mask, x - mean[:, None], 0.0)
    return count, mean, tl.sum(centred * centred, axis=1)


@jit
def _pool(count, mean, square, member, AXIS: tl.constexpr):
    """Moments of the members along an axis; what is no member may be NaN."""
    count = tl.where(member, count, 0.0)
    total = tl.sum(count, axis=AXIS)
    pooled = tl.sum(tl.where(member, count * mean, 0.0), axis=AXIS) / tl.maximum(total, 1.0)
    delta = mean - tl.expand_dims(pooled, AXIS)
    return total, pooled, tl.sum(tl.where(member, square + count * delta * delta, 0.0), axis=AXIS)


@jit
def moments_kernel(
    input_ptr,
    partial_ptr,
    n_samples,
    n_channels,
    n_positions,
    num_groups,
    batch_stride,
    outer_stride,
    n_chunks,
    n_entries,
    tiles,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """partial (3, N, groups, entries): count, mean, and sum of squared differences from it, of a chunk of a unit."""
    sample, unit = _program(n_channels, num_groups, CHANNELS_LAST, BLOCK_R)
    source = input_ptr + sample * batch_stride
    count = tl.zeros((BLOCK_R,), tl.float32)
    mean = tl.zeros((BLOCK_R,), tl.float32)
    square = tl.zeros((BLOCK_R,), tl.float32)
    for step in range(tiles):
        tile = tl.program_id(1) * tiles + step
        _, channel, _, position, mask = _rows(
            unit, tile, n_channels, n_positions, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_P
        )
        x = _load(source, _offset(channel, position, outer_stride, CHANNELS_LAST), mask)
        more, mean_more, square_more = _row_moments(x, mask)
        count, mean, square = _merge(count, mean, square, more, mean_more, square_more)
    member = _member(unit, n_channels, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_G)
    count, mean, square = _pool(count[:, None], mean[:, None], square[:, None], member, 0)
    group, valid, first, _ = _groups(unit, n_channels, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_G)
    place = (sample * num_groups + group) * n_entries + (unit - first) * n_chunks + tl.program_id(1)
    plane = tl.cast(n_samples, tl.int64) * num_groups * n_entries
    tl.store(partial_ptr + place, count, mask=valid)
    tl.store(partial_ptr + place + plane, mean, mask=valid)
    tl.store(partial_ptr + place + 2 * plane, square, mask=valid)


@jit
def normalise_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    stats_ptr,
    out_ptr,
    n_samples,
    n_channels,
    n_positions,
    num_groups,
    batch_stride,
    outer_stride,
    dense_stride,
    n_chunks,
    n_entries,
    tiles,
    eps,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Finishes the statistics of the unit's groups, then out = silu((x - mean) * rstd * weight + bias)."""
    sample, unit = _program(n_channels, num_groups, CHANNELS_LAST, BLOCK_R)
    group, is_group, first, parts = _groups(unit, n_channels, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_G)
    entries = (sample * num_groups + group)[:, None] * n_entries
    plane = tl.cast(n_samples, tl.int64) * num_groups * n_entries
    count = tl.zeros((BLOCK_G, BLOCK_ENTRIES), tl.float32)
    mean = tl.zeros((BLOCK_G, BLOCK_ENTRIES), tl.float32)
    square = tl.zeros((BLOCK_G, BLOCK_ENTRIES), tl.float32)
    for start in range(0, n_entries, BLOCK_ENTRIES):
        entry = start + tl.arange(0, BLOCK_ENTRIES)[None, :]
        there = is_group[:, None] & (entry < (parts * n_chunks)[:, None])
        more = _load(partial_ptr, entries + entry, there)
        mean_more = _load(partial_ptr, entries + plane + entry, there)
        square_more = _load(partial_ptr, entries + 2 * plane + entry, there)
        count, mean, square = _merge(count, mean, square, more, mean_more, square_more)
    total, mean, square = _pool(count, mean, square, count > 0.0, 1)
    rstd = 1.0 / tl.sqrt(square / tl.maximum(total, 1.0) + eps)
    owner = is_group & (first == unit) & (tl.program_id(1) == 0)
    tl.store(stats_ptr + sample * num_groups + group, mean, mask=owner)
    tl.store(stats_ptr + (n_samples + sample) * num_groups + group, rstd, mask=owner)
    member = _member(unit, n_channels, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_G)
    mean, rstd = _of_rows(mean, member), _of_rows(rstd, member)
    for step in range(tiles):
        tile = tl.program_id(1) * tiles + step
        _, channel, valid, position, mask = _rows(
            unit, tile, n_channels, n_positions, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_P
        )
        scale = rstd * _load(weight_ptr, channel, valid)[:, None]
        bias = _load(bias_ptr, channel, valid)[:, None]
        place = sample * batch_stride + _offset(channel, position, outer_stride, CHANNELS_LAST)
        z = (_load(input_ptr, place, mask) - mean) * scale + bias
        dense = sample * n_channels * n_positions + _offset(channel, position, dense_stride, CHANNELS_LAST)
        tl.store(out_ptr + dense, (z * _sigmoid(z)).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def whole_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    out_ptr,
    n_samples,
    n_channels,
    n_positions,
    num_groups,
    batch_stride,
    outer_stride,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The same for channels first and a group of one tile, which is read once and kept."""
    sample, unit = _program(n_channels, num_groups, False, BLOCK_R)
    _, channel, valid, position, mask = _rows(unit, 0, n_channels, n_positions, num_groups, False, BLOCK_R, BLOCK_P)
    x = _load(input_ptr, sample * batch_stride + _offset(channel, position, outer_stride, False), mask)
    total = tl.cast(n_channels // num_groups, tl.float32) * n_positions
    mean = tl.sum(tl.sum(x, axis=1), axis=0) / total
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, axis=1), axis=0) / total + eps)
    tl.store(stats_ptr + sample * num_groups + unit, mean)
    tl.store(stats_ptr + (n_samples + sample) * num_groups + unit, rstd)
    scale = rstd * _load(weight_ptr, channel, valid)[:, None]
    z = centred * scale + _load(bias_ptr, channel, valid)[:, None]
    dense = sample * n_channels * n_positions + _offset(channel, position, n_positions, False)
    tl.store(out_ptr + dense, (z * _sigmoid(z)).to(out_ptr.dtype.element_ty), mask=mask)
