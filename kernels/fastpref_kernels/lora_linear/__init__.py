"""A frozen linear layer and its LoRA, which BLAS accumulates into one output.

    y = x W^T + b + scale * (x A^T) B^T
    dx = dy W + u A,    dA = u^T x,    dB = dy^T t,    where t = scale * x A^T and u = scale * dy B

Shapes: x (..., K), W (O, K), b (O,), A (r, K), B (O, r) -> (..., O). fp16, bf16, fp32 or fp64; A and B may be fp32
beside half x, and are then rounded to x's dtype, their gradients are returned in their own.
Products by BLAS, additions and the scale folded into them: y = x W^T + b, then y += t B^T in place; dx = dy W, then
dx += u A; nothing of y's size lies in between. Three products forward, five backward, and no kernel beside them but the
casts of an fp32 A and B. Bytes per element of y at 16 bits, besides the operands, which every way reads: 6, against 14
of the five steps one by one. A fused product would move 2; one in Triton reached 0.65 to 0.75 times the speed of the
plain steps on an H200, whose BLAS multiplies faster than it, so this op fuses what surrounds the product only.
Saved: x, t (r elements a row), W, A and B.
Source: LoRA, arXiv 2106.09685, equation 3.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, device, dtype, float32, float64, get_autocast_dtype, is_autocast_enabled, is_grad_enabled

from ..common.checks import check_between, check_tensor, row_distance
from ..common.launch import remembered
from ..common.operator import operator
from . import torch as torch_path


@operator(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale) -> (Tensor, Tensor)",
)
def _lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(y, t)"""
    return torch_path.forward(x, weight, bias, lora_a, lora_b, scale)


@_lora_linear.register_fake
def _(x, weight, bias, lora_a, lora_b, scale):
    rows = x.numel() // x.shape[-1]
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((rows, lora_a.shape[0]))


@operator(
    "lora_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor t, float scale, "
    "bool needs_x, bool needs_lora) -> (Tensor, Tensor, Tensor)",
)
def _lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    t: Tensor,
    scale: float,
    needs_x: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB); empty where not needed."""
    return torch_path.backward(grad, x, weight, lora_a, lora_b, t, scale, needs_x, needs_lora)


@_lora_linear_backward.register_fake
def _(grad, x, weight, lora_a, lora_b, t, scale, needs_x, needs_lora):
    loras = (lora_a.new_empty(lora.shape if needs_lora else 0, dtype=lora.dtype) for lora in (lora_a, lora_b))
    return x.new_empty(x.shape if needs_x else 0), *loras


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
    wanted = needs_x, needs_a or needs_b
    grad_x, grad_a, grad_b = _lora_linear_backward(grad, *ctx.saved_tensors, ctx.scale, *wanted)
    loras = grad_a if needs_a else None, grad_b if needs_b else None
    return grad_x if needs_x else None, None, None, *loras, None


_lora_linear.register_autograd(_backward, setup_context=_setup_context)


class _Form(NamedTuple):
    """What is checked of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    contiguous: bool
    dtype: dtype
    device: device
    trained: bool


def _form(x: Tensor | None) -> _Form | None:
    if x is None:
        return None
    trained = x.requires_grad and is_grad_enabled()
    return _Form(x.shape, x.stride(), x.is_contiguous(), x.dtype, x.device, trained)


@remembered
def _check(x: _Form, weight: _Form, bias: _Form | None, lora_a: _Form, lora_b: _Form) -> None:
    op = "lora_linear"
    if not x.dtype.is_floating_point:
        raise ValueError(f"{op}: x must be floating point, got {x.dtype}")
    if not x.shape or len(weight.shape) != 2 or weight.shape[1] != x.shape[-1] or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be (O, K) for x (..., K), got {tuple(weight.shape)} for {tuple(x.shape)}")
    (outputs, inputs), rank = weight.shape, lora_a.shape[0] if lora_a.shape else 0
    named = ("weight", weight, (outputs, inputs)), ("bias", bias, (outputs,))
    for name, given, shape in (*named, ("lora_a", lora_a, (rank, inputs)), ("lora_b", lora_b, (outputs, rank))):
        if given is None:
            continue
        if given.device != x.device:
            raise ValueError(f"{op}: {name} is on {given.device}, x is on {x.device}")
        if tuple(given.shape) != shape or rank == 0 or not given.contiguous:
            raise ValueError(f"{op}: {name} must be dense, of shape {shape}, got {tuple(given.shape)}")
        low_rank = name.startswith("lora")
        if given.dtype != x.dtype and not (low_rank and given.dtype == float32):
            raise ValueError(f"{op}: {name} is {given.dtype}, x is {x.dtype}")
        if not low_rank and given.trained:
            raise ValueError(f"{op}: {name} requires a gradient, must be frozen")
    row_distance(op, "x", x.shape, x.strides)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
) -> Tensor:
    """`x W^T + b + scale (x A^T) B^T` without a tensor of the output's size in between.

    x: (..., K), fp16, bf16, fp32 or fp64; rows must lie at equal distances, each dense; other strides are refused.
    weight: (O, K), bias: (O,) or None; frozen, in x's dtype.
    lora_a: (r, K), lora_b: (O, r); in x's dtype or fp32.
    scale: alpha / r, in the usual naming.
    Under autocast x, weight and bias are cast as torch.nn.functional.linear casts them.

    Returns (..., O) in x's dtype, dense; empty for an empty batch; a NaN in a row of x makes the row NaN. Gradients go
    to x, lora_a and lora_b, each in its dtype; a gradient that is not contiguous is copied first.
    Raises ValueError for shapes, dtypes, devices or strides that do not fit, and for a weight or bias that requires a
    gradient.
    Source: LoRA, arXiv 2106.09685, equation 3.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor is not None or name != "bias":
            check_tensor("lora_linear", name, tensor)
    check_between("lora_linear", "scale", scale, -math.inf, math.inf, "finite")
    if is_autocast_enabled(x.device.type) and x.dtype != float64:
        half = get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(half), weight.to(half), None if bias is None else bias.to(half)
    forms: Any = map(_form, (x, weight, bias, lora_a, lora_b))
    _check(*forms)
    return _lora_linear(x, weight, bias, lora_a, lora_b, scale)[0]
