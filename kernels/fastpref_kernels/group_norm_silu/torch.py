"""Group normalisation and SiLU by torch's native functions, in place where that saves a buffer.

Half types go through fp32, some samples or some groups of one at a time, and are rounded once; torch's own half ops
also round z, and take less time for it. fp32 and fp64 keep z for the backward, which costs a tensor and saves a pass;
half types normalise again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.dispatch import accumulation_dtype
from ..common.memory_format import as_dense, empty_dense, is_channels_last

_CHUNK = 1 << 18  # elements of half-precision input that are upcast at a time


def keeps_z(x: Tensor) -> bool:
    return accumulation_dtype(x.dtype) == x.dtype


def _four_dimensional(x: Tensor) -> Tensor:
    """torch knows channels-last strides from four dimensions on."""
    return x.unsqueeze(2) if x.dim() == 3 else x


def _chunks(x: Tensor, num_groups: int, last: bool) -> Iterator[tuple[slice, slice, slice]]:
    """(samples, groups, their channels) of at most _CHUNK elements: whole samples, or groups of one, which are dense
    in channels-first order only."""
    rows, channels, n_elements = x.shape[0], x.shape[1], math.prod(x.shape[1:])
    if last or n_elements <= _CHUNK:
        step = max(1, _CHUNK // n_elements)
        yield from ((slice(i, i + step), slice(None), slice(None)) for i in range(0, rows, step))
        return
    step, width = max(1, _CHUNK * num_groups // n_elements), channels // num_groups
    for i in range(rows):
        for g in range(0, num_groups, step):
            end = min(num_groups, g + step)
            yield slice(i, i + 1), slice(g, end), slice(g * width, end * width)


def _normalise(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, mean, rstd) of a dense x."""
    n, c, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    z, mean, rstd = torch.native_group_norm(_four_dimensional(x), weight, bias, n, c, positions, num_groups, eps)
    return as_dense(z.squeeze(2) if x.dim() == 3 else z, last), mean, rstd


def _gradients(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    num_groups: int,
    affine: bool,
    spare: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of x, weight and bias; `spare`: grad may be overwritten."""
    n, c, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    dz = grad if spare else torch.empty_like(grad)
    torch.ops.aten.silu_backward.grad_input(grad, z, grad_input=dz)
    dz, x4 = _four_dimensional(dz), _four_dimensional(x)
    grad_input, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        dz, x4, mean, rstd, weight, n, c, positions, num_groups, [True, affine, affine]
    )
    return grad_input.squeeze(2) if x.dim() == 3 else grad_input, grad_weight, grad_bias


def forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean and rstd (2, N, G), z), the last empty unless it is kept."""
    dtype, last = accumulation_dtype(x.dtype), is_channels_last(x)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if keeps_z(x):
        z, mean, rstd = _normalise(as_dense(x, last), num_groups, weight, bias, eps, last)
        out = torch.nn.functional.silu(z, inplace=not keep)
        return out, torch.stack((mean, rstd)), z if keep else x.new_empty(0)
    out = empty_dense(x, last)
    stats = torch.empty(2, x.shape[0], num_groups, dtype=dtype, device=x.device)
    mean, rstd = stats.unbind()
    for rows, groups, channels in _chunks(x, num_groups, last):
        upcast, place = as_dense(x[rows, channels].to(dtype), last), (rows, groups)
        count = mean[place].shape[1]
        z, mean[place], rstd[place] = _normalise(upcast, count, weight[channels], bias[channels], eps, last)
        out[rows, channels] = torch.nn.functional.silu(z, inplace=True)
    return out, stats, x.new_empty(0)


def backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    z: Tensor,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_input, grad_weight, grad_bias), the last two empty unless `affine`."""
    dtype, last = accumulation_dtype(x.dtype), is_channels_last(x)
    full_weight, full_bias = weight.to(dtype), bias.to(dtype)
    mean, rstd = stats.unbind()
    affine_size = weight.shape[0] if affine else 0
    if keeps_z(x):
        grad, x = as_dense(grad, last), as_dense(x, last)
        grad_input, *found = _gradients(grad, x, z, mean, rstd, full_weight, num_groups, affine, spare=False)
        return as_dense(grad_input, last), *(weight.new_empty(0) if x is None else x.to(weight.dtype) for x in found)
    grad_input = empty_dense(x, last)
    sums = [torch.zeros(affine_size, dtype=dtype, device=x.device) for _ in range(2)]
    for rows, groups, channels in _chunks(x, num_groups, last):
        upcast, g = (as_dense(t[rows, channels].to(dtype), last) for t in (x, grad))
        m, r, scale = mean[rows, groups].contiguous(), rstd[rows, groups].contiguous(), full_weight[channels]
        count, by_channel = m.shape[1], (upcast.shape[0], -1, *[1] * (x.dim() - 2))
        slope = r[:, :, None] * scale.view(count, -1)
        shift = full_bias[channels].view(count, -1) - slope * m[:, :, None]
        z = torch.mul(upcast, slope.view(by_channel)).add_(shift.view(by_channel))  # addcmul is not vectorised here
        grad_input[rows, channels], *more = _gradients(g, upcast, z, m, r, scale, count, affine, spare=True)
        for total, new in zip(sums, more, strict=True):
            if new is not None:
                total[channels] += new
    return grad_input, sums[0].to(weight.dtype), sums[1].to(weight.dtype)
