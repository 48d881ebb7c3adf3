"""Group normalisation and SiLU by torch's native functions, in place where that saves a buffer.

Half types go through fp32 a few samples at a time and are rounded once. fp32 and fp64 keep z for the backward, which
costs a tensor and saves a pass; half types normalise again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dispatch import accumulation_dtype
from .._memory_format import as_dense, empty_dense, is_channels_last

_CHUNK = 1 << 18  # elements of half-precision input that are upcast at a time


def keeps_z(x: Tensor) -> bool:
    return accumulation_dtype(x.dtype) == x.dtype


def _four_dimensional(x: Tensor) -> Tensor:
    """torch knows channels-last strides from four dimensions on."""
    return x.unsqueeze(2) if x.dim() == 3 else x


def _normalise(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, mean, rstd) of a dense x."""
    n, c, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    z, mean, rstd = torch.native_group_norm(_four_dimensional(x), weight, bias, n, c, positions, num_groups, eps)
    return as_dense(z.squeeze(2) if x.dim() == 3 else z, last), mean, rstd


def _gradients(
    grad: Tensor, x: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, num_groups: int, affine: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    n, c, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    dz, x4 = _four_dimensional(torch.ops.aten.silu_backward(grad, z)), _four_dimensional(x)
    grad_input, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        dz, x4, mean, rstd, weight, n, c, positions, num_groups, [True, affine, affine]
    )
    return grad_input.squeeze(2) if x.dim() == 3 else grad_input, grad_weight, grad_bias


def forward(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, mean (N, G), rstd (N, G), z), the last empty unless it is kept."""
    dtype, last = accumulation_dtype(x.dtype), is_channels_last(x)
    weight, bias = weight.to(dtype), bias.to(dtype)
    if keeps_z(x):
        z, mean, rstd = _normalise(as_dense(x, last), num_groups, weight, bias, eps, last)
        out = torch.nn.functional.silu(z, inplace=not keep)
        return out, mean, rstd, z if keep else x.new_empty(0)
    out = empty_dense(x, last)
    mean, rstd = (torch.empty(x.shape[0], num_groups, dtype=dtype, device=x.device) for _ in range(2))
    step = max(1, _CHUNK // math.prod(x.shape[1:]))
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        upcast = as_dense(x[rows].to(dtype), last)
        z, mean[rows], rstd[rows] = _normalise(upcast, num_groups, weight, bias, eps, last)
        out[rows] = torch.nn.functional.silu(z, inplace=True)
    return out, mean, rstd, x.new_empty(0)


def backward(
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
    """(grad_input, grad_weight, grad_bias), the last two empty unless `affine`."""
    dtype, last = accumulation_dtype(x.dtype), is_channels_last(x)
    full_weight, full_bias = weight.to(dtype), bias.to(dtype)
    affine_size = weight.shape[0] if affine else 0
    if keeps_z(x):
        grad, x = as_dense(grad, last), as_dense(x, last)
        grad_input, *found = _gradients(grad, x, z, mean, rstd, full_weight, num_groups, affine)
        return as_dense(grad_input, last), *(weight.new_empty(0) if x is None else x.to(weight.dtype) for x in found)
    grad_input = empty_dense(x, last)
    sums = [torch.zeros(affine_size, dtype=dtype, device=x.device) for _ in range(2)]
    step = max(1, _CHUNK // math.prod(x.shape[1:]))
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        upcast, g = as_dense(x[rows].to(dtype), last), as_dense(grad[rows].to(dtype), last)
        shift = full_bias.view(-1, *[1] * (x.dim() - 2))
        by_channel = (mean.shape[1], x.shape[1] // mean.shape[1])
        scale = rstd[rows, :, None] * full_weight.view(by_channel)
        z = torch.addcmul(
            shift - (scale * mean[rows, :, None]).view(-1, *shift.shape), upcast, scale.view(-1, *shift.shape)
        )
        grad_input[rows], *more = _gradients(g, upcast, z, mean[rows], rstd[rows], full_weight, num_groups, affine)
        sums = [total if new is None else total.add_(new) for total, new in zip(sums, more, strict=True)]
    return grad_input, sums[0].to(weight.dtype), sums[1].to(weight.dtype)
