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

from typing import Any

import torch
from torch import Tensor

from ._checks import check_device, check_floating, check_rows
from ._dispatch import jit, tl, use_triton
from ._operator import operator
from .cpu import lora_linear as torch_path

_TILES = {  # BLOCK_M, BLOCK_N, BLOCK_K, warps
    "large": (128, 128, 32, 8),
    "small": (64, 64, 32, 4),
}
_BLOCK_R = 16
_FULL = 256  # programs that fill a GPU; fewer large tiles than this, and small ones are used


@jit
def _lora_matmul_kernel(
    x_ptr,
    weight_ptr,
    low_ptr,
    up_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    n_columns,
    n_inner,
    rank,
    row_stride,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = x (rows, inner) @ weight + low (rows, rank) @ up + bias; TRANSPOSED: weight and up are (columns, .)."""
    blocks_n = tl.cdiv(n_columns, BLOCK_N)
    # eight rows of tiles are walked column by column, so that neighbours share both operands in the L2 cache
    in_band = 8 * blocks_n
    first = tl.program_id(0) // in_band * 8
    height = tl.minimum(tl.cdiv(n_rows, BLOCK_M) - first, 8)
    row = (first + tl.program_id(0) % in_band % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % in_band // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = row < n_rows, column < n_columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask_r = r < rank
        place = column[None, :] * rank + r[:, None] if TRANSPOSED else r[:, None].to(tl.int64) * n_columns + column
        low = tl.load(low_ptr + row[:, None] * rank + r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        up = tl.load(up_ptr + place, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        total = tl.dot(low, up, total)
    for start in range(0, n_inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask_k = k < n_inner
        place = column[None, :] * n_inner + k[:, None] if TRANSPOSED else k[:, None].to(tl.int64) * n_columns + column
        x = tl.load(x_ptr + row[:, None] * row_stride + k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        weight = tl.load(weight_ptr + place, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        total = tl.dot(x, weight, total)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row[:, None] * n_columns + column[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def _tile(n_rows: int, n_columns: int) -> str:
    block_m, block_n, _, _ = _TILES["large"]
    return "large" if -(-n_rows // block_m) * -(-n_columns // block_n) >= _FULL else "small"


def matmul(x: Tensor, weight: Tensor, low: Tensor, up: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x (M, K) @ weight + low (M, r) @ up + bias; weight (K, N) and up (r, N), or both transposed."""
    n_rows, n_columns = x.shape[0], weight.shape[0 if transposed else 1]
    out = x.new_empty(n_rows, n_columns)
    if not out.numel():
        return out
    block_m, block_n, block_k, warps = _TILES[_tile(n_rows, n_columns)]
    grid = (-(-n_rows // block_m) * -(-n_columns // block_n),)
    _lora_matmul_kernel[grid](
        *(x, weight, low, up, weight if bias is None else bias, out),
        *(n_rows, n_columns, x.shape[1], low.shape[1], check_rows("lora_linear", "x", x)),
        TRANSPOSED=transposed,
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=_BLOCK_R,
        num_warps=warps,
    )
    return out


def _product(x: Tensor, blas: bool) -> Any:
    """The function that multiplies: the kernel for half types unless BLAS is asked for, BLAS for the others."""
    return matmul if use_triton(x) and x.dtype != torch.float32 and not blas else torch_path.matmul


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
    check_floating(op, "x", x)
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
        if tensor.dtype != x.dtype and not (low_rank and tensor.dtype == torch.float32):
            raise ValueError(f"{op}: {name} is {tensor.dtype}, x is {x.dtype}")
        if not low_rank and tensor.requires_grad and torch.is_grad_enabled():
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
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    _check(x, weight, bias, lora_a, lora_b)
    return _lora_linear(x, weight, bias, lora_a, lora_b, scale, blas)[0]
