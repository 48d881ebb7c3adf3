"""The lanes themselves: registers, shuffles, barriers, matrix products. Collected with KERNELS_ON=lanes only."""

from __future__ import annotations

import pytest
import torch

from execution import driver
from fastpref_kernels.common.dispatch import jit, tl


@jit
def _row_sum_kernel(x_ptr, out_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    i = tl.arange(0, BLOCK_SIZE)
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * n_elements + i, mask=i < n_elements, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(x, axis=0))


@jit
def _count_kernel(out_ptr, BLOCK_SIZE: tl.constexpr):
    i = tl.arange(0, BLOCK_SIZE)
    total = tl.sum(i + tl.num_programs(0) * tl.num_programs(1), axis=0)
    tl.store(out_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)


@jit
def _matmul_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    i, k = tl.arange(0, SIZE), tl.arange(0, DEPTH)
    x = tl.load(x_ptr + i[:, None] * DEPTH + k[None, :])
    y = tl.load(y_ptr + k[:, None] * SIZE + i[None, :])
    tl.store(out_ptr + i[:, None] * SIZE + i[None, :], tl.dot(x, y, input_precision="ieee"))


def row_sums(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0])
    _row_sum_kernel[(x.shape[0],)](x, out, x.shape[1], BLOCK_SIZE=1024, num_warps=4)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 63, 1000, 1024])
def test_lanes_reduce(n: int, dtype: torch.dtype) -> None:
    """Over registers, lanes of a wave and waves."""
    x = torch.randn(5, n).to(dtype)
    torch.testing.assert_close(row_sums(x).double(), x.double().sum(1), rtol=1e-6, atol=1e-5)


def test_lanes_without_barriers_fail() -> None:
    """The negative control: waves that do not wait for each other read local memory before it is written."""
    x = torch.randn(5, 1024)
    with driver.without_barriers():
        wrong = row_sums(x)
    assert not torch.isclose(wrong, x.sum(1), rtol=0.1).any()
    torch.testing.assert_close(row_sums(x), x.sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_lanes_multiply_matrices(size: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(size, 32).to(dtype), torch.randn(32, size).to(dtype)
    out = torch.empty(size, size)
    _matmul_kernel[(1,)](x, y, out, SIZE=size, DEPTH=32)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("warps", [1, 2])
def test_lanes_know_the_grid(warps: int) -> None:
    """Also a group of one wave, which has no barrier of its own."""
    out = torch.empty(3, 5, dtype=torch.int32)
    _count_kernel[(3, 5)](out, BLOCK_SIZE=512, num_warps=warps)
    assert out.unique().tolist() == [512 * 15 + 511 * 256]


def test_lanes_specialise_as_on_a_gpu() -> None:
    """A row length that is a multiple of 16 is another compiled kernel than one that is not."""
    kernels = []
    for n in (1008, 1009):
        out = torch.empty(1)
        kernels.append(_row_sum_kernel[(1,)](torch.ones(1, n), out, n, BLOCK_SIZE=1024, num_warps=4))
        assert out.item() == n
    assert kernels[0].hash != kernels[1].hash
