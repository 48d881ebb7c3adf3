"""Group normalisation and the SiLU behind it, as in the residual blocks of the SD1.5 and SDXL UNets.

    z = (x - mean) * rstd * weight_c + bias_c,      out = z * sigmoid(z)
    mean, rstd = 1 / sqrt(var + eps) over each sample's groups of C / num_groups channels

Shapes: input (N, C, L), (N, C, H, W) or (N, C, D, H, W), channels first or last; out alike. weight, bias (C,). fp16,
bf16, fp32 or fp64; statistics, arithmetic and sums are fp32 (fp64 for fp64), the result is rounded once.
Forward: tiles' means and centred second moments by channel, merged to the groups' (no E[x^2] - mean^2), then the
normalisation. Backward, with dz = grad * silu'(z) and xhat = (x - mean) * rstd:

    dbias = sum dz,   dweight = sum dz xhat,   dx = rstd (weight dz - mean(weight dz) - xhat mean(weight dz xhat))

where mean() is over the group. All sums have two stages whose order is a function of (C, H*W) alone, without atomics.
Bytes per element at 16 bits: forward 6 (two reads and one write), backward 10 (four reads and one write); the second
read of each tensor finds it in the L2 cache if it fits. Saved: input and, by group, mean and rstd in fp32.
Source: Group normalization, arXiv 1803.08494, equations 1 to 3; SiLU, arXiv 1606.08415.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import Any

from torch import Tensor, is_grad_enabled

from ..common.checks import check_device, check_floating, check_tensor
from ..common.dispatch import accumulation_dtype, use_triton
from ..common.memory_format import empty_dense, is_channels_last, layout
from ..common.operator import operator
from . import torch as torch_path
from .triton import launch_backward, launch_forward


@operator(
    "group_norm_silu",
    "(Tensor input, int num_groups, Tensor weight, Tensor bias, float eps, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _group_norm_silu(
    input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, mean, rstd, z); z is empty where the backward computes it again or `keep` is false."""
    path = launch_forward if use_triton(input) else torch_path.forward
    return path(input, num_groups, weight, bias, eps, keep)


@_group_norm_silu.register_fake
def _(input, num_groups, weight, bias, eps, keep):
    last = is_channels_last(input)
    out = empty_dense(input, last)
    mean, rstd = (
        input.new_empty((input.shape[0], num_groups), dtype=accumulation_dtype(input.dtype)) for _ in range(2)
    )
    z_is_kept = keep and not use_triton(input) and torch_path.keeps_z(input)
    return out, mean, rstd, empty_dense(input, last) if z_is_kept else input.new_empty(0)


@operator(
    "group_norm_silu_backward",
    "(Tensor grad, Tensor input, int num_groups, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, "
    "Tensor z, bool affine) -> (Tensor, Tensor, Tensor)",
)
def _group_norm_silu_backward(
    grad: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    z: Tensor,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    path = launch_backward if use_triton(input) else torch_path.backward
    return path(grad, input, num_groups, weight, bias, mean, rstd, z, affine)


@_group_norm_silu_backward.register_fake
def _(grad, input, num_groups, weight, bias, mean, rstd, z, affine):
    grad_input = empty_dense(input, is_channels_last(input))
    return grad_input, *(weight.new_empty(weight.shape[0] if affine else 0) for _ in range(2))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, ctx.num_groups, weight, bias, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, bias, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    input, weight, bias, mean, rstd, z = ctx.saved_tensors
    _, _, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
    grad_input, grad_weight, grad_bias = _group_norm_silu_backward(
        grad, input, ctx.num_groups, weight, bias, mean, rstd, z, needs_weight or needs_bias
    )
    return grad_input, None, grad_weight if needs_weight else None, grad_bias if needs_bias else None, None, None


_group_norm_silu.register_autograd(_backward, setup_context=_setup_context)


def _check(input: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> None:
    op = "group_norm_silu"
    check_floating(op, "input", input)
    if not 3 <= input.dim() <= 5 or math.prod(input.shape[1:]) == 0:
        raise ValueError(f"{op}: input must be (N, C, L), (N, C, H, W) or (N, C, D, H, W), got {tuple(input.shape)}")
    channels = input.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {channels} channels, got {num_groups}")
    for name, x in (("weight", weight), ("bias", bias)):
        check_floating(op, name, x)
        check_device(op, name, x, "input", input)
        if x.shape != (channels,) or not x.is_contiguous():
            raise ValueError(f"{op}: {name} must be dense, of shape ({channels},), got {tuple(x.shape)}")
        if x.dtype != weight.dtype:
            raise ValueError(f"{op}: weight is {weight.dtype}, bias is {x.dtype}")
    if weight.dtype not in (input.dtype, accumulation_dtype(input.dtype)):
        raise ValueError(f"{op}: weight is {weight.dtype}, must be float32 or as input, {input.dtype}")
    if layout(input) is None:
        raise ValueError(f"{op}: input must be dense in channels or positions, got strides {input.stride()}")


def group_norm_silu(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`silu(group_norm(input, num_groups, weight, bias, eps))`, in torch.nn.functional.group_norm's argument order.

    input: (N, C, L), (N, C, H, W) or (N, C, D, H, W); fp16, bf16, fp32 or fp64. The positions of a sample may lie in
        channels-first or channels-last order, in a tensor that is larger in C or N; other strides are refused. A
        gradient in another order than the input's is copied first.
    weight, bias: (C,) in input's dtype or fp32, both in the same; None is 1 and 0.
    eps: added to the variance.

    Returns a dense tensor in input's shape, dtype and order of dimensions, also under autocast, where torch gives
    fp32; empty for an empty batch; a NaN makes its sample's group NaN. Gradients go to input, weight and bias, each in
    its dtype.
    Raises ValueError for shapes, dtypes, devices or strides that do not fit.
    Source: Group normalization, arXiv 1803.08494; SiLU, arXiv 1606.08415.
    """
    check_tensor("group_norm_silu", "input", input)
    if weight is None or bias is None:
        dtype = next((x.dtype for x in (weight, bias) if x is not None), input.dtype)
        weight = input.new_ones(input.shape[1:2], dtype=dtype) if weight is None else weight
        bias = input.new_zeros(input.shape[1:2], dtype=dtype) if bias is None else bias
    _check(input, num_groups, weight, bias)
    keep = is_grad_enabled() and any(x.requires_grad for x in (input, weight, bias))
    return _group_norm_silu(input, num_groups, weight, bias, eps, keep)[0]
