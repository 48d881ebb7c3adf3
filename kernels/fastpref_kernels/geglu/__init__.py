"""GEGLU, the gated activation of the transformer blocks of SD1.5 and SDXL, with the exact GELU.

    value, gate = hidden.chunk(2, -1)
    out = value * gelu(gate),     gelu(g) = g * Phi(g),     Phi(g) = (1 + erf(g / sqrt 2)) / 2

Shapes: hidden (..., 2C) -> (..., C). fp16, bf16, fp32 or fp64; computed in fp32 (fp64 for fp64) and rounded once.
Phi is exp(-g^2/2) * R(|g|) on the negative side and one minus that on the positive side. R is Mills' ratio over
sqrt(2 pi), as P((|g| - 3.5) / (|g| + 3.5)) / (|g| + 3.5) with P a minimax polynomial of degree 9 (relative error 7e-9
where Phi(-|g|) is no subnormal). In fp32 Phi is within 2e-7 of the truth, and within 1e-6 of its own size down to
g = -5, where the subtraction in 1 + erf has lost half of its digits; the same exp serves the backward.
Bytes per element of out at 16 bits: forward 6 (two reads and one write), backward 10 (three reads and two writes);
nothing is saved but the input.
Source: Shazeer, GLU variants improve transformer, arXiv 2002.05202, section 2.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any

from torch import Tensor, dtype

from ..common.checks import check_tensor, row_distance
from ..common.dispatch import use_triton
from ..common.launch import remembered
from ..common.operator import operator
from . import torch as torch_path
from .triton import launch_backward, launch_forward


@operator("geglu", "(Tensor hidden) -> Tensor")
def _geglu(hidden: Tensor) -> Tensor:
    return (launch_forward if use_triton(hidden) else torch_path.forward)(hidden)


@_geglu.register_fake
def _(hidden):
    return hidden.new_empty((*hidden.shape[:-1], hidden.shape[-1] // 2))


@operator("geglu_backward", "(Tensor grad, Tensor hidden) -> Tensor")
def _geglu_backward(grad: Tensor, hidden: Tensor) -> Tensor:
    return (launch_backward if use_triton(hidden) else torch_path.backward)(grad, hidden)


@_geglu_backward.register_fake
def _(grad, hidden):
    return hidden.new_empty(hidden.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return _geglu_backward(grad, *ctx.saved_tensors)


_geglu.register_autograd(_backward, setup_context=_setup_context)


@remembered
def _check(shape: tuple[int, ...], strides: tuple[int, ...], dtype: dtype) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"geglu: hidden must be floating point, got {dtype}")
    if not shape or shape[-1] == 0 or shape[-1] % 2:
        raise ValueError(f"geglu: hidden must be (..., 2C), got shape {tuple(shape)}")
    row_distance("geglu", "hidden", shape, strides)


def geglu(hidden: Tensor) -> Tensor:
    """`value * gelu(gate)` for `value, gate = hidden.chunk(2, -1)`, with the exact GELU, not the tanh one.

    hidden: (..., 2C), fp16, bf16, fp32 or fp64. Rows must lie at equal distances, each dense; other strides are
        refused. A gradient that is not contiguous is copied first.

    Returns (..., C) in hidden's dtype, contiguous; empty for an empty batch; NaN where value or gate is. The gradient
    is contiguous and in hidden's dtype.
    Raises ValueError for a scalar, an odd or empty last dimension, a dtype that is not floating, and strides.
    Source: Shazeer, arXiv 2002.05202, section 2.
    """
    check_tensor("geglu", "hidden", hidden)
    _check(hidden.shape, hidden.stride(), hidden.dtype)
    return _geglu(hidden)
