"""Kernels and launchers of `geglu`: a program per row and block of columns."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from torch import Tensor

from ..common.checks import check_rows
from ..common.dispatch import jit, tl

_BLOCKS = (128, 1024)  # columns of a program: the first that holds a row, or the last


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
def _geglu_fwd_kernel(hidden_ptr, out_ptr, row_stride, n_columns, BLOCK_SIZE: tl.constexpr):
    """A program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = column < n_columns
    source = hidden_ptr + row * row_stride
    value = tl.load(source + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(source + n_columns + column, mask=mask, other=0.0).to(tl.float32)
    phi, _ = _phi(gate)
    tl.store(out_ptr + row * n_columns + column, (value * (gate * phi)).to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _geglu_bwd_kernel(grad_ptr, hidden_ptr, grad_hidden_ptr, row_stride, n_columns, BLOCK_SIZE: tl.constexpr):
    """dvalue = grad * gelu(gate), dgate = grad * value * (Phi(gate) + gate * density(gate))."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = column < n_columns
    source = hidden_ptr + row * row_stride
    grad = tl.load(grad_ptr + row * n_columns + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(source + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(source + n_columns + column, mask=mask, other=0.0).to(tl.float32)
    phi, density = _phi(gate)
    place = grad_hidden_ptr + 2 * row * n_columns + column
    dtype = grad_hidden_ptr.dtype.element_ty
    tl.store(place, (grad * (gate * phi)).to(dtype), mask=mask)
    tl.store(place + n_columns, (grad * value * (phi + gate * density)).to(dtype), mask=mask)


def _block(n_columns: int) -> int:
    return next((block for block in _BLOCKS if n_columns <= block), _BLOCKS[-1])


def _grid(rows: int, n_columns: int) -> tuple[int, int]:
    return rows, -(-n_columns // _block(n_columns))


def launch_forward(hidden: Tensor) -> Tensor:
    n_columns = hidden.shape[-1] // 2
    out = hidden.new_empty(*hidden.shape[:-1], n_columns)
    if out.numel():
        rows = out.numel() // n_columns
        stride = check_rows("geglu", "hidden", hidden)
        _geglu_fwd_kernel[_grid(rows, n_columns)](hidden, out, stride, n_columns, BLOCK_SIZE=_block(n_columns))
    return out


def launch_backward(grad: Tensor, hidden: Tensor) -> Tensor:
    grad = grad.contiguous()
    n_columns = grad.shape[-1]
    grad_hidden = hidden.new_empty(hidden.shape)
    if grad.numel():
        rows = grad.numel() // n_columns
        stride = check_rows("geglu", "hidden", hidden)
        _geglu_bwd_kernel[_grid(rows, n_columns)](
            grad, hidden, grad_hidden, stride, n_columns, BLOCK_SIZE=_block(n_columns)
        )
    return grad_hidden
