"""Kernels and launchers of `geglu`: a program per tile of rows and columns, two 16-byte vectors of each tensor a thread
in half precision."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.checks import row_distance
from ..common.dispatch import jit, tl
from ..common.launch import Launch, remembered

_TILES = {"narrow": (32, 64), "wide": (8, 256)}  # (rows, columns); the widths of SD1.5 and SDXL are multiples of 256
_WARPS = 4


@jit
def _phi(gate):
    """(Phi(gate), density of the normal distribution at gate), fp32."""
    x = tl.minimum(tl.abs(gate), 64.0)  # keeps infinity out of the ratio; exp(-x^2/2) is 0 long before
    inverse = 1.0 / (x + 3.5)
    t = (x - 3.5) * inverse
    p = 1.1068940297121801e-04
    p = p * t + 4.2189785065530153e-04
    p = p * t - 4.949436831060109e-04
    p = p * t - 3.1753108510523685e-03
    p = p * t + 6.493115931795159e-03
    p = p * t + 1.7406378480144192e-02
    p = p * t - 1.1605304080475166e-01
    p = p * t + 3.1542504871423716e-01
    p = p * t - 5.655617451011059e-01
    p = p * t + 7.444160741405188e-01
    bell = tl.exp(-0.5 * gate * gate)
    tail = bell * (p * inverse)
    return tl.where(gate >= 0.0, 1.0 - tail, tail), bell * 0.3989422804014327


@jit
def _tile(n_rows, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """(rows, columns, which of them are there) of a program."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    return row, column, (row < n_rows) & (column < n_columns)


@jit
def _geglu_fwd_kernel(
    hidden_ptr, out_ptr, n_rows, row_stride, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """out = value * gelu(gate)."""
    row, column, mask = _tile(n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    source = hidden_ptr + row * row_stride + column
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(source + n_columns, mask=mask, other=0.0).to(tl.float32)
    phi, _ = _phi(gate)
    tl.store(out_ptr + row * n_columns + column, (value * (gate * phi)).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _geglu_bwd_kernel(
    grad_ptr,
    hidden_ptr,
    grad_hidden_ptr,
    n_rows,
    row_stride,
    n_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dvalue = grad * gelu(gate), dgate = grad * value * (Phi(gate) + gate * density(gate))."""
    row, column, mask = _tile(n_rows, n_columns, BLOCK_ROWS, BLOCK_COLUMNS)
    source = hidden_ptr + row * row_stride + column
    grad = tl.load(grad_ptr + row * n_columns + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(source + n_columns, mask=mask, other=0.0).to(tl.float32)
    phi, density = _phi(gate)
    place = grad_hidden_ptr + 2 * row * n_columns + column
    dtype = grad_hidden_ptr.dtype.element_ty
    tl.store(place, (grad * (gate * phi)).to(dtype), mask=mask)
    tl.store(place + n_columns, (grad * value * (phi + gate * density)).to(dtype), mask=mask)


class _Plan(NamedTuple):
    out: tuple[int, ...]  # shape
    forward: Launch
    backward: Launch


@remembered
def plan(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> _Plan:
    """Of a hidden state of that shape; dtype is that of all tensors."""
    n_columns = shape[-1] // 2
    n_rows = math.prod(shape[:-1])
    tile = _TILES["wide" if n_columns >= _TILES["wide"][1] else "narrow"]
    grid = -(-n_rows // tile[0]), -(-n_columns // tile[1])
    numbers = n_rows, row_distance("geglu", "hidden", shape, strides), n_columns
    constants = dict(zip(("BLOCK_ROWS", "BLOCK_COLUMNS"), tile, strict=True))
    launches = (Launch(kernel, grid, numbers, constants, _WARPS) for kernel in (_geglu_fwd_kernel, _geglu_bwd_kernel))
    return _Plan((*shape[:-1], n_columns), *launches)


def launch_forward(hidden: Tensor) -> Tensor:
    found = plan(hidden.shape, hidden.stride(), hidden.dtype)
    out = hidden.new_empty(found.out)
    if out.numel():
        found.forward(hidden, out)
    return out


def launch_backward(grad: Tensor, hidden: Tensor) -> Tensor:
    grad_hidden = hidden.new_empty(hidden.shape)
    if grad_hidden.numel():
        plan(hidden.shape, hidden.stride(), hidden.dtype).backward(grad.contiguous(), hidden, grad_hidden)
    return grad_hidden
