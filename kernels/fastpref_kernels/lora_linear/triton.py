"""Kernel and launcher of `lora_linear`: both products in one pass over the output."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from torch import Tensor

from ..common.checks import check_rows
from ..common.dispatch import jit, tl

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
