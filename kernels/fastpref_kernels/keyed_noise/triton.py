"""Kernels and launchers of `keyed_noise` and `add_keyed_noise`: a program per row and chunk."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.dispatch import jit, tl
from ..common.philox import _normals
from ..common.strides import address, layout_of

_BLOCK = 256  # Philox blocks, of four elements each


@jit
def _keyed_noise_kernel(keys_ptr, out_ptr, n_elements, n_chunks, BLOCK_SIZE: tl.constexpr):
    """A program per row and chunk of 4 * BLOCK_SIZE elements."""
    row = tl.program_id(0).to(tl.int64) // n_chunks
    first = tl.program_id(0).to(tl.int64) % n_chunks * BLOCK_SIZE
    noise = _normals(tl.load(keys_ptr + row), first, BLOCK_SIZE)
    offset = first * 4 + tl.arange(0, 4 * BLOCK_SIZE)
    tl.store(out_ptr + row * n_elements + offset, noise.to(out_ptr.dtype.element_ty), mask=offset < n_elements)


@jit
def _add_keyed_noise_kernel(
    x0_ptr,
    keys_ptr,
    a_ptr,
    s_ptr,
    out_ptr,
    n_elements,
    n_chunks,
    size_1,
    size_2,
    x0_row,
    x0_0,
    x0_1,
    x0_2,
    BACKWARD: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """a * x0 + s * noise, a program per row and chunk; BACKWARD: a * x0, where x0 is the gradient."""
    row = tl.program_id(0).to(tl.int64) // n_chunks
    first = tl.program_id(0).to(tl.int64) % n_chunks * BLOCK_SIZE
    offset = first * 4 + tl.arange(0, 4 * BLOCK_SIZE)
    mask = offset < n_elements
    place = address(offset, row, (size_1, size_2), (x0_row, x0_0, x0_1, x0_2), STRIDED)
    x_t = tl.load(a_ptr + row).to(tl.float32) * tl.load(x0_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if not BACKWARD:
        x_t += tl.load(s_ptr + row).to(tl.float32) * _normals(tl.load(keys_ptr + row), first, BLOCK_SIZE)
    tl.store(out_ptr + row * n_elements + offset, x_t.to(out_ptr.dtype.element_ty), mask=mask)


def launch_noise(keys: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    out = torch.empty(keys.shape[0], *shape, dtype=dtype, device=keys.device)
    n_elements = math.prod(shape)
    n_chunks = -(-n_elements // (4 * _BLOCK))
    grid = (keys.shape[0] * n_chunks,)
    _keyed_noise_kernel[grid](keys.contiguous(), out, n_elements, n_chunks, BLOCK_SIZE=_BLOCK)
    return out


def launch_add(x0: Tensor, keys: Tensor, a: Tensor, s: Tensor, *, backward: bool) -> Tensor:
    out = torch.empty_like(x0, memory_format=torch.contiguous_format)
    n_elements = x0[0].numel()
    n_chunks = -(-n_elements // (4 * _BLOCK))
    layout = layout_of("add_keyed_noise", x0)
    _add_keyed_noise_kernel[(x0.shape[0] * n_chunks,)](
        x0,
        keys.contiguous(),
        a.contiguous(),
        s.contiguous(),
        out,
        n_elements,
        n_chunks,
        *layout.sizes,
        *layout.strides[0],
        BACKWARD=backward,
        STRIDED=not layout.flat,
        BLOCK_SIZE=_BLOCK,
    )
    return out
