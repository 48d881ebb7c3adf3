"""The mended interpreter catches what the shipped one lets pass."""

from __future__ import annotations

import pytest
import torch
from interpreter import bf16_to_fp32, fp32_to_bf16
from triton.runtime.errors import InterpreterError

from fastpref_kernels._dispatch import jit, tl


@jit
def _copy_kernel(x_ptr, out_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    i = tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + i, mask=i < n_elements, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty), mask=i < n_elements)


@jit
def _double_kernel(x_ptr, out_ptr, BLOCK_SIZE: tl.constexpr):
    i = tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x + x)


@jit
def _sum_kernel(x_ptr, out_ptr, BLOCK_SIZE: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK_SIZE)), axis=0))


def test_bf16_casts_round_to_nearest_even() -> None:
    x = torch.cat([torch.randn(60), torch.tensor([torch.inf, -torch.inf, 3.4e38, torch.nan])])
    out = torch.empty(64, dtype=torch.bfloat16)
    _copy_kernel[(1,)](x, out, 64, BLOCK_SIZE=64)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    bits = torch.arange(1 << 16).to(torch.uint16).numpy()
    exact = bf16_to_fp32(bits)
    kept = fp32_to_bf16(exact) == bits
    assert kept[exact == exact].all()


@pytest.mark.parametrize("kernel", [_double_kernel, _sum_kernel])
def test_bf16_arithmetic_is_refused(kernel) -> None:
    x = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match=r"upcast"):
        kernel[(1,)](x, torch.empty_like(x), BLOCK_SIZE=8)


@pytest.mark.parametrize(("read", "written"), [(7, 8), (8, 7)])
def test_access_out_of_bounds_is_refused(read: int, written: int) -> None:
    memory = torch.zeros(64)
    with pytest.raises(InterpreterError, match="outside"):
        _copy_kernel[(1,)](memory[:read], memory[32 : 32 + written], 8, BLOCK_SIZE=8)
    _copy_kernel[(1,)](memory[:8], memory[32:40], 8, BLOCK_SIZE=8)


def test_empty_memory_is_poisoned() -> None:
    assert torch.empty(100).isnan().all() and torch.empty_like(torch.zeros(100).half()).isnan().all()
