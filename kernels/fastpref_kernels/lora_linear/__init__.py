"""A frozen linear layer and its LoRA in one pass over the output.

    y = x W^T + b + scale * (x A^T) B^T
    dx = dy W + u A,    dA = u^T x,    dB = dy^T t,    where t = scale * x A^T and u = scale * dy B

Shapes: x (..., K), W (O, K), b (O,), A (r, K), B (O, r) -> (..., O). fp16, bf16, fp32 or fp64; A and B may be fp32
beside half x, and are then rounded to x's dtype, their gradients are returned in their own.
On a GPU in half precision t (and u) come from a BLAS call that folds in the scale, and one kernel accumulates both
products, r and then K terms, in fp32 and writes y once. Bytes per element of y at 16 bits, besides the operands, which
every way reads: 2, against 6 of BLAS calls that accumulate into y (`blas=True`) and 14 of the five steps one by one.
An element costs 2K operations: at K = 640 to 2,048, as in the attention of SDXL, four more bytes take 0.9 to 0.3 of
their time by the data sheet of an H100, which is why the product is not left to BLAS. In fp32, where a BLAS obeys
torch's setting for TF32, and on the CPU it is: y = x W^T + b, then y += t B^T in place.
Saved: x, t (r elements a row), W, A and B. No sum uses atomics in the kernel.
Source: LoRA, arXiv 2106.09685, equation 3.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import Any

from torch import Tensor, float32, float64, get_autocast_dtype, is_autocast_enabled, is_grad_enabled

from ..common.checks import check_between, check_device, check_floating, check_rows
from ..common.dispatch import use_triton
from ..common.operator import operator
from . import torch as torch_path
from . import triton as triton_path


def _product(x: Tensor, blas: bool) -> Any:
    """The function that multiplies: the kernel for half types unless BLAS is asked for, BLAS for the others."""
    return triton_path.matmul if use_triton(x) and x.dtype != float32 and not blas else torch_path.matmul


@operator(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale, bool blas) -> (Tensor, Tensor)",
)
def _lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float, blas: bool
) -> tuple[Tensor, Tensor]:
    """(y, t)"""
    return torch_path.forward(x, weight, bias, lora_a, lora_b, scale, _product(x, blas))


@_lora_linear.register_fake
def _(x, weight, bias, lora_a, lora_b, scale, blas):
    rows = x.numel() // x.shape[-1]
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((rows, lora_a.shape[0]))


@operator(
    "lora_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor t, float scale, bool blas, "
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
    blas: bool,
    needs_x: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB); empty where not needed."""
    return torch_path.backward(grad, x, weight, lora_a, lora_b, t, scale, needs_x, needs_lora, _product(x, blas))


@_lora_linear_backward.register_fake
def _(grad, x, weight, lora_a, lora_b, t, scale, blas, needs_x, needs_lora):
    loras = (lora_a.new_empty(lora.shape if needs_lora else 0, dtype=lora.dtype) for lora in (lora_a, lora_b))
    return x.new_empty(x.shape if needs_x else 0), *loras


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, ctx.scale, ctx.blas = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    needs_x, _, _, needs_a, needs_b, _, _ = ctx.needs_input_grad
    wanted = needs_x, needs_a or needs_b
    grad_x, grad_a, grad_b = _lora_linear_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.blas, *wanted)
    loras = grad_a if needs_a else None, grad_b if needs_b else None
    return grad_x if needs_x else None, None, None, *loras, None, None


_lora_linear.register_autograd(_backward, setup_context=_setup_context)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> None:
    op = "lora_linear"
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or 0 in weight.shape:
        raise ValueError(f"{op}: weight must be (O, K) for x (..., K), got {tuple(weight.shape)} for {tuple(x.shape)}")
    (outputs, inputs), rank = weight.shape, lora_a.shape[0] if lora_a.dim() else 0
    named = ("weight", weight, (outputs, inputs)), ("bias", bias, (outputs,))
    for name, tensor, shape in (*named, ("lora_a", lora_a, (rank, inputs)), ("lora_b", lora_b, (outputs, rank))):
        if tensor is None:
            continue
        check_device(op, name, tensor, "x", x)
        if tensor.shape != shape or rank == 0 or not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be dense, of shape {shape}, got {tuple(tensor.shape)}")
        low_rank = name.startswith("lora")
        if tensor.dtype != x.dtype and not (low_rank and tensor.dtype == float32):
            raise ValueError(f"{op}: {name} is {tensor.dtype}, x is {x.dtype}")
        if not low_rank and tensor.requires_grad and is_grad_enabled():
            raise ValueError(f"{op}: {name} requires a gradient, must be frozen")
    check_rows(op, "x", x)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    blas: bool = False,
) -> Tensor:
    """`x W^T + b + scale (x A^T) B^T` without a tensor of the output's size in between.

    x: (..., K), fp16, bf16, fp32 or fp64; rows must lie at equal distances, each dense; other strides are refused.
    weight: (O, K), bias: (O,) or None; frozen, in x's dtype.
    lora_a: (r, K), lora_b: (O, r); in x's dtype or fp32.
    scale: alpha / r, in the usual naming.
    blas: no kernel of ours: BLAS adds the low-rank product onto that of the weight, which moves 6 bytes an element.
    Under autocast x, weight and bias are cast as torch.nn.functional.linear casts them.

    Returns (..., O) in x's dtype, dense; empty for an empty batch; a NaN in a row of x makes the row NaN. Gradients go
    to x, lora_a and lora_b, each in its dtype; a gradient that is not contiguous is copied first.
    Raises ValueError for shapes, dtypes, devices or strides that do not fit, and for a weight or bias that requires a
    gradient.
    Source: LoRA, arXiv 2106.09685, equation 3.
    """
    for name, tensor in {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}.items():
        check_floating("lora_linear", name, tensor)
    if bias is not None:
        check_floating("lora_linear", "bias", bias)
    check_between("lora_linear", "scale", scale, -math.inf, math.inf, "finite")
    if is_autocast_enabled(x.device.type) and x.dtype != float64:
        dtype = get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, weight, bias, lora_a, lora_b)
    return _lora_linear(x, weight, bias, lora_a, lora_b, scale, blas)[0]
