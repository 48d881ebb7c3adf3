"""Kernels that break a gate on purpose: a gate that lets one of them through proves nothing."""

from __future__ import annotations

from cases import KernelCase

from fastpref_kernels.common.dispatch import jit, tl

COPY = {"x_ptr": "*bf16", "out_ptr": "*bf16", "n_elements": "i32"}
LANES = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n_elements": "i32"}


@jit
def _copy_kernel(x_ptr, out_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + i, mask=i < n_elements, other=0.0)
    tl.store(out_ptr + i, x, mask=i < n_elements)


@jit
def _plain_copy_kernel(x_ptr, out_ptr, n_elements: int, BLOCK_SIZE: tl.constexpr):
    """The package's `jit` compiles no variant for the value of an argument annotated int."""
    i = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n_elements), mask=i < n_elements)


@jit
def _hoard_kernel(x_ptr, out_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    """Keeps far more values alive over a reduction than there are registers."""
    i = tl.arange(0, BLOCK_SIZE)
    a = tl.load(x_ptr + i, mask=i < n_elements, other=0.0)
    b = tl.load(x_ptr + n_elements + i, mask=i < n_elements, other=0.0)
    tl.store(out_ptr + i, (a - tl.sum(a * b, axis=0)) * (b - tl.max(a, axis=0)), mask=i < n_elements)


@jit
def _transpose_kernel(x_ptr, out_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    """Wants more shared memory than a block may have: the whole tile changes its layout."""
    i = tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + i[:, None] * n_elements + i[None, :])
    tl.store(out_ptr + i[:, None] * n_elements + i[None, :], tl.trans(x))


def cases() -> list[KernelCase]:
    pointers, block = ("x_ptr", "out_ptr"), {"BLOCK_SIZE": 1024}
    everything = (*pointers, "n_elements")
    return [
        KernelCase("copies", _copy_kernel, COPY, block, aligned=everything, wide=pointers),
        KernelCase("copies by 2 bytes", _copy_kernel, COPY, block, aligned=("x_ptr",), wide=("x_ptr",)),
        KernelCase("aligned in vain", _plain_copy_kernel, COPY, block, aligned=("n_elements",)),
        KernelCase("spills", _hoard_kernel, LANES, {"BLOCK_SIZE": 16384}, aligned=everything),
        KernelCase("crowds", _hoard_kernel, LANES, {"BLOCK_SIZE": 8192}, aligned=everything, min_occupancy=0.9),
        KernelCase("overflows", _transpose_kernel, LANES, {"BLOCK_SIZE": 256}, aligned=everything, num_warps=16),
    ]
