"""Group normalisation and the SiLU behind it, as in the residual blocks of the SD1.5 and SDXL UNets.

    z = (x - mean) * rstd * weight_c + bias_c,      out = z * sigmoid(z)
    mean, rstd = 1 / sqrt(var + eps) over each sample's groups of C / num_groups channels

Shapes: input (N, C, L), (N, C, H, W) or (N, C, D, H, W), channels first or last; out alike. weight, bias (C,). fp16,
bf16, fp32 or fp64; statistics, arithmetic and sums are fp32 (fp64 for fp64), the result is rounded once.
Forward: tiles' means and centred second moments, merged to the groups' (no E[x^2] - mean^2), then the normalisation.
Backward, with dz = grad * silu'(z) and xhat = (x - mean) * rstd:

    dbias = sum dz,   dweight = sum dz xhat,   dx = rstd (weight dz - mean(weight dz) - xhat mean(weight dz xhat))

where mean() is over the group. No sum uses atomics: a result repeats bit for bit on one device.
Channels first, a group that one program can keep (8,192 elements, or 16,384 where there are as many groups as
multiprocessors; not in the backward of fp32) takes one launch: forward 4 bytes per element at 16 bits, backward 6. Any
other takes two each way, forward 6 (two reads and one write), backward 10 (four reads and one write); the second read
of each tensor finds it in the L2 cache if it fits. Saved: input and, by group, mean and rstd in fp32.
Source: Group normalization, arXiv 1803.08494, equations 1 to 3; SiLU, arXiv 1606.08415.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, device, dtype, is_grad_enabled

from ..common.checks import check_tensor
from ..common.dispatch import accumulation_dtype, use_triton
from ..common.launch import remembered
from ..common.memory_format import empty_dense, is_channels_last, layout_of
from ..common.operator import operator
from . import torch as torch_path
from .plan import launch_backward, launch_forward


@operator(
    "group_norm_silu",
    "(Tensor input, int num_groups, Tensor weight, Tensor bias, float eps, bool keep) -> (Tensor, Tensor, Tensor)",
)
def _group_norm_silu(
    input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean and rstd (2, N, num_groups), z); z is empty where it is computed again or `keep` is false."""
    path = launch_forward if use_triton(input) else torch_path.forward
    return path(input, num_groups, weight, bias, eps, keep)


@_group_norm_silu.register_fake
def _(input, num_groups, weight, bias, eps, keep):
    last = is_channels_last(input)
    out = empty_dense(input, last)
    stats = input.new_empty((2, input.shape[0], num_groups), dtype=accumulation_dtype(input.dtype))
    z_is_kept = keep and not use_triton(input) and torch_path.keeps_z(input)
    return out, stats, empty_dense(input, last) if z_is_kept else input.new_empty(0)


@operator(
    "group_norm_silu_backward",
    "(Tensor grad, Tensor input, int num_groups, Tensor weight, Tensor bias, Tensor stats, "
    "Tensor z, bool affine) -> (Tensor, Tensor, Tensor)",
)
def _group_norm_silu_backward(
    grad: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    z: Tensor,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    path = launch_backward if use_triton(input) else torch_path.backward
    return path(grad, input, num_groups, weight, bias, stats, z, affine)


@_group_norm_silu_backward.register_fake
def _(grad, input, num_groups, weight, bias, stats, z, affine):
    grad_input = empty_dense(input, is_channels_last(input))
    return grad_input, *(weight.new_empty(weight.shape[0] if affine else 0) for _ in range(2))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, ctx.num_groups, weight, bias, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, bias, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    input, weight, bias, stats, z = ctx.saved_tensors
    _, _, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
    grad_input, grad_weight, grad_bias = _group_norm_silu_backward(
        grad, input, ctx.num_groups, weight, bias, stats, z, needs_weight or needs_bias
    )
    return grad_input, None, grad_weight if needs_weight else None, grad_bias if needs_bias else None, None, None


_group_norm_silu.register_autograd(_backward, setup_context=_setup_context)


class _Form(NamedTuple):
    """What is checked of the weight or the bias."""

    shape: tuple[int, ...]
    dtype: dtype
    device: device
    contiguous: bool


def _form(x: Tensor) -> _Form:
    return _Form(x.shape, x.dtype, x.device, x.is_contiguous())


@remembered
def _check(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: dtype,
    device: device,
    num_groups: int,
    weight: _Form,
    bias: _Form,
) -> None:
    """Of an input of that shape."""
    op = "group_norm_silu"
    if not dtype.is_floating_point:
        raise ValueError(f"{op}: input must be floating point, got {dtype}")
    if not 3 <= len(shape) <= 5 or math.prod(shape[1:]) == 0:
        raise ValueError(f"{op}: input must be (N, C, L), (N, C, H, W) or (N, C, D, H, W), got {tuple(shape)}")
    channels = shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups must divide the {channels} channels, got {num_groups}")
    for name, x in (("weight", weight), ("bias", bias)):
        if not x.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"{op}: {name} is on {x.device}, input is on {device}")
        if tuple(x.shape) != (channels,) or not x.contiguous:
            raise ValueError(f"{op}: {name} must be dense, of shape ({channels},), got {tuple(x.shape)}")
        if x.dtype != weight.dtype:
            raise ValueError(f"{op}: weight is {weight.dtype}, bias is {x.dtype}")
    if weight.dtype not in (dtype, accumulation_dtype(dtype)):
        raise ValueError(f"{op}: weight is {weight.dtype}, must be float32 or as input, {dtype}")
    if layout_of(shape, strides) is None:
        raise ValueError(f"{op}: input must be dense in channels or positions, got strides {strides}")


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
        kind = next((x.dtype for x in (weight, bias) if x is not None), input.dtype)
        weight = input.new_ones(input.shape[1:2], dtype=kind) if weight is None else weight
        bias = input.new_zeros(input.shape[1:2], dtype=kind) if bias is None else bias
    of_input = input.shape, input.stride(), input.dtype, input.device
    _check(*of_input, num_groups, _form(weight), _form(bias))
    keep = is_grad_enabled() and any(x.requires_grad for x in (input, weight, bias))
    return _group_norm_silu(input, num_groups, weight, bias, eps, keep)[0]
