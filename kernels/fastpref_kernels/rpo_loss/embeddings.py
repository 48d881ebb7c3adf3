"""Embeddings as the kernels of `rpo_loss` read them: fp16 parts for tensor cores, and a scale a row."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import jit, tl

PADDING = 64  # the length of a prepared row is a multiple of it, and it of every BLOCK_K: products need no mask
_HALF = (torch.float16, torch.bfloat16)


@jit
def prepare_row(
    emb_ptr, stride, stride_d, dim, padded, parts_ptr, scale_ptr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Row `emb_ptr` times a power of two that brings its largest element to [2^14, 2^15), as fp16 parts with zeros up
    to `padded`, and the scale 1 / max(norm, 1e-12) without that power: a zero row has cosine 0 with everything."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    largest = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = tl.load(emb_ptr + d * stride_d, mask=d < dim, other=0.0).to(tl.float32)
        total += x * x
        largest = tl.maximum(largest, tl.abs(x))
    exponent = tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 20), 254)
    power = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    tl.store(scale_ptr, inverse / tl.maximum(tl.sqrt(tl.sum(total, axis=0)), 1e-12))
    for start in range(0, padded, BLOCK_D):
        d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = tl.load(emb_ptr + d * stride_d, mask=d < dim, other=0.0).to(tl.float32) * power
        high = x.to(tl.float16)
        tl.store(parts_ptr + d, high, mask=d < padded)
        if PARTS == 2:
            tl.store(parts_ptr + padded + d, (x - high.to(tl.float32)).to(tl.float16), mask=d < padded)


@jit
def prepare(
    emb_w, emb_l, row, n_winners, dim, padded, parts_ptr, scale_ptr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Row of [winners; losers]; emb_w and emb_l are (pointer, row stride, column stride)."""
    out_ptr = parts_ptr + row * PARTS * padded
    if row < n_winners:
        w_ptr = emb_w[0] + row * emb_w[1]
        prepare_row(w_ptr, emb_w[1], emb_w[2], dim, padded, out_ptr, scale_ptr + row, PARTS, BLOCK_D)
    else:
        l_ptr = emb_l[0] + (row - n_winners) * emb_l[1]
        prepare_row(l_ptr, emb_l[1], emb_l[2], dim, padded, out_ptr, scale_ptr + row, PARTS, BLOCK_D)


@jit
def _rpo_prepare_kernel(
    emb_w_ptr,
    emb_l_ptr,
    parts_ptr,
    scale_ptr,
    n_winners,
    w_row,
    w_d,
    l_row,
    l_d,
    dim,
    padded,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Embeddings of the winners, then of the losers; a program each."""
    row = tl.program_id(0).to(tl.int64)
    winners, losers = (emb_w_ptr, w_row, w_d), (emb_l_ptr, l_row, l_d)
    prepare(winners, losers, row, n_winners, dim, padded, parts_ptr, scale_ptr, PARTS, BLOCK_D)


class Prepared(NamedTuple):
    """parts (M + N, n_parts * padded) fp16, scale (M + N,) fp32: rows of winners, then of losers."""

    parts: Tensor
    scale: Tensor
    n_parts: int
    padded: int


def empty(emb_w: Tensor, emb_l: Tensor) -> Prepared:
    """Memory for the prepared embeddings. One part holds a half type; two hold fp32."""
    count, dim = emb_w.shape[0] + emb_l.shape[0], emb_w.shape[1]
    n_parts = 1 if emb_w.dtype in _HALF and emb_l.dtype in _HALF else 2
    padded = -(-dim // PADDING) * PADDING
    parts = torch.empty(count, n_parts * padded, dtype=torch.float16, device=emb_w.device)
    return Prepared(parts, torch.empty(count, dtype=torch.float32, device=emb_w.device), n_parts, padded)


def block(dim: int) -> int:
    """BLOCK_D of a row."""
    return 256 if dim <= 256 else 1024


def launch_prepare(emb_w: Tensor, emb_l: Tensor) -> Prepared:
    prepared, dim = empty(emb_w, emb_l), emb_w.shape[1]
    parts, scale, n_parts, padded = prepared
    _rpo_prepare_kernel[(scale.shape[0],)](
        *(emb_w, emb_l, parts, scale, emb_w.shape[0], *emb_w.stride(), *emb_l.stride(), dim, padded),
        PARTS=n_parts,
        BLOCK_D=block(dim),
    )
    return prepared
