"""The backward's kernels of `group_norm_silu`, on the tiles of triton.py."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from ..common.dispatch import jit, tl
from .triton import _groups, _load, _member, _of_rows, _offset, _program, _rows, _sigmoid


@jit
def _slope(
    grad_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    sample,
    channel,
    valid,
    position,
    mask,
    n_samples,
    n_channels,
    n_positions,
    num_groups,
    batch_stride,
    outer_stride,
    dense_stride,
    CHANNELS_LAST: tl.constexpr,
):
    """(dz, xhat, rstd, weight, offset in a dense tensor) of a tile; dz is 0 where there is no element."""
    group = sample * num_groups + channel // (n_channels // num_groups)
    mean = _load(stats_ptr, group, valid)[:, None]
    rstd = _load(stats_ptr, tl.cast(n_samples, tl.int64) * num_groups + group, valid)[:, None]
    weight = _load(weight_ptr, channel, valid)[:, None]
    bias = _load(bias_ptr, channel, valid)[:, None]
    place = sample * batch_stride + _offset(channel, position, outer_stride, CHANNELS_LAST)
    xhat = (_load(input_ptr, place, mask) - mean) * rstd
    z = xhat * weight + bias
    sigmoid = _sigmoid(z)
    dense = sample * n_channels * n_positions + _offset(channel, position, dense_stride, CHANNELS_LAST)
    dz = _load(grad_ptr, dense, mask) * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    return dz, xhat, rstd, weight, dense


@jit
def sums_kernel(
    grad_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    partial_ptr,
    affine_ptr,
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
    affine: int,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """partial (2, N, groups, entries): sums of weight dz and of weight dz xhat over a chunk of a unit.

    affine (2, N, C, n): sums of dz and of dz xhat by channel, and segment (channels first) or chunk; none if 0.
    """
    sample, unit = _program(n_channels, num_groups, CHANNELS_LAST, BLOCK_R)
    first_sum = tl.zeros((BLOCK_R,), tl.float32)
    second_sum = tl.zeros((BLOCK_R,), tl.float32)
    segments = tl.cdiv(n_positions, BLOCK_P)
    for step in range(tiles):
        tile = tl.program_id(1) * tiles + step
        row, channel, valid, position, mask = _rows(
            unit, tile, n_channels, n_positions, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_P
        )
        dz, xhat, _, weight, _ = _slope(
            grad_ptr,
            input_ptr,
            weight_ptr,
            bias_ptr,
            stats_ptr,
            sample,
            channel,
            valid,
            position,
            mask,
            n_samples,
            n_channels,
            n_positions,
            num_groups,
            batch_stride,
            outer_stride,
            dense_stride,
            CHANNELS_LAST,
        )
        first_row, second_row = tl.sum(dz, axis=1), tl.sum(dz * xhat, axis=1)
        if CHANNELS_LAST:
            first_sum += first_row
            second_sum += second_row
        else:
            place = (sample * num_groups + unit) * (n_channels // num_groups) * segments + row
            plane = tl.cast(n_samples, tl.int64) * n_channels * segments
            tl.store(affine_ptr + place, first_row, mask=valid & (affine != 0))
            tl.store(affine_ptr + place + plane, second_row, mask=valid & (affine != 0))
            first_sum += tl.sum(weight, axis=1) * first_row
            second_sum += tl.sum(weight, axis=1) * second_row
    if CHANNELS_LAST:
        channel = unit * BLOCK_R + tl.arange(0, BLOCK_R)
        place = (sample * n_channels + channel) * n_chunks + tl.program_id(1)
        plane = tl.cast(n_samples, tl.int64) * n_channels * n_chunks
        tl.store(affine_ptr + place, first_sum, mask=(channel < n_channels) & (affine != 0))
        tl.store(affine_ptr + place + plane, second_sum, mask=(channel < n_channels) & (affine != 0))
        weight = _load(weight_ptr, channel, channel < n_channels)
        first_sum, second_sum = first_sum * weight, second_sum * weight
    member = _member(unit, n_channels, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_G)
    group, valid, first, _ = _groups(unit, n_channels, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_G)
    place = (sample * num_groups + group) * n_entries + (unit - first) * n_chunks + tl.program_id(1)
    plane = tl.cast(n_samples, tl.int64) * num_groups * n_entries
    tl.store(partial_ptr + place, tl.sum(tl.where(member, first_sum[:, None], 0.0), axis=0), mask=valid)
    tl.store(partial_ptr + place + plane, tl.sum(tl.where(member, second_sum[:, None], 0.0), axis=0), mask=valid)


@jit
def grad_input_kernel(
    grad_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    partial_ptr,
    grad_input_ptr,
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
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Finishes the sums of the unit's groups, then dx = rstd (weight dz - mean(weight dz) - xhat mean(...))."""
    sample, unit = _program(n_channels, num_groups, CHANNELS_LAST, BLOCK_R)
    group, there, _first, parts = _groups(unit, n_channels, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_G)
    plane = tl.cast(n_samples, tl.int64) * num_groups * n_entries
    shift = tl.zeros((BLOCK_G, BLOCK_ENTRIES), tl.float32)
    slope = tl.zeros((BLOCK_G, BLOCK_ENTRIES), tl.float32)
    for start in range(0, n_entries, BLOCK_ENTRIES):
        entry = start + tl.arange(0, BLOCK_ENTRIES)[None, :]
        is_entry = there[:, None] & (entry < (parts * n_chunks)[:, None])
        source = partial_ptr + (sample * num_groups + group)[:, None] * n_entries
        shift += _load(source, entry, is_entry)
        slope += _load(source, plane + entry, is_entry)
    member = _member(unit, n_channels, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_G)
    total = tl.cast(n_channels // num_groups, tl.float32) * n_positions
    shift = _of_rows(tl.sum(shift, axis=1) / total, member)
    slope = _of_rows(tl.sum(slope, axis=1) / total, member)
    for step in range(tiles):
        tile = tl.program_id(1) * tiles + step
        _, channel, valid, position, mask = _rows(
            unit, tile, n_channels, n_positions, num_groups, CHANNELS_LAST, BLOCK_R, BLOCK_P
        )
        dz, xhat, rstd, weight, dense = _slope(
            grad_ptr,
            input_ptr,
            weight_ptr,
            bias_ptr,
            stats_ptr,
            sample,
            channel,
            valid,
            position,
            mask,
            n_samples,
            n_channels,
            n_positions,
            num_groups,
            batch_stride,
            outer_stride,
            dense_stride,
            CHANNELS_LAST,
        )
        dx = rstd * (weight * dz - shift - xhat * slope)
        tl.store(grad_input_ptr + dense, dx.to(grad_input_ptr.dtype.element_ty), mask=mask)


@jit
def whole_backward_kernel(
    grad_ptr,
    input_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    affine_ptr,
    grad_input_ptr,
    n_samples,
    n_channels,
    n_positions,
    num_groups,
    batch_stride,
    outer_stride,
    affine: int,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Both for channels first and a group of one tile, which is read once and kept."""
    sample, unit = _program(n_channels, num_groups, False, BLOCK_R)
    row, channel, valid, position, mask = _rows(unit, 0, n_channels, n_positions, num_groups, False, BLOCK_R, BLOCK_P)
    dz, xhat, rstd, weight, dense = _slope(
        grad_ptr,
        input_ptr,
        weight_ptr,
        bias_ptr,
        stats_ptr,
        sample,
        channel,
        valid,
        position,
        mask,
        n_samples,
        n_channels,
        n_positions,
        num_groups,
        batch_stride,
        outer_stride,
        n_positions,
        False,
    )
    first_row, second_row = tl.sum(dz, axis=1), tl.sum(dz * xhat, axis=1)
    segments, width = tl.cdiv(n_positions, BLOCK_P), n_channels // num_groups
    place = (sample * num_groups + unit) * width * segments + row
    plane = tl.cast(n_samples, tl.int64) * n_channels * segments
    tl.store(affine_ptr + place, first_row, mask=valid & (affine != 0))
    tl.store(affine_ptr + place + plane, second_row, mask=valid & (affine != 0))
    total = tl.cast(width, tl.float32) * n_positions
    scale = tl.sum(weight, axis=1)
    shift = tl.sum(scale * first_row, axis=0) / total
    slope = tl.sum(scale * second_row, axis=0) / total
    dx = rstd * (weight * dz - shift - xhat * slope)
    tl.store(grad_input_ptr + dense, dx.to(grad_input_ptr.dtype.element_ty), mask=mask)
