"""The kernels as compiled for gfx942, on the CPU.

Here a few tests of the ops run in a process with KERNELS_ON=lanes; all of them: `make kernels`. In such a process the
tests below check the lanes themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from execution import driver
from fastpref_kernels._dispatch import jit, tl

TESTS = Path(__file__).parents[1]
LANES = os.environ.get("KERNELS_ON") == "lanes"
in_lanes = pytest.mark.skipif(not LANES, reason="runs in the process that test_ops_as_compiled starts")
SELECTED = [
    "execution/test_execution.py",
    "test_implicit_reward.py::test_matches_oracle",
    "test_dpo_loss.py::test_matches_oracle",
    "test_keyed_noise.py",
    "test_rpo_loss.py::test_worked_by_hand",
]
KEYWORDS = "lanes or triton and (bfloat16 or worked_by_hand) or keyed_noise and triton and normals"


@pytest.mark.skipif(LANES, reason="these are the lanes")
def test_ops_as_compiled() -> None:
    reason = driver.missing()
    if reason:
        pytest.skip(f"compiled kernels on the CPU: {reason}")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", KEYWORDS, *SELECTED]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, env=environment | {"KERNELS_ON": "lanes"})
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


@jit
def _row_sum_kernel(x_ptr, out_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    i = tl.arange(0, BLOCK_SIZE)
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * n_elements + i, mask=i < n_elements, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(x, axis=0))


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


@in_lanes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 63, 1000, 1024])
def test_lanes_reduce(n: int, dtype: torch.dtype) -> None:
    """Over registers, lanes of a wave and waves."""
    x = torch.randn(5, n).to(dtype)
    torch.testing.assert_close(row_sums(x).double(), x.double().sum(1), rtol=1e-6, atol=1e-5)


@in_lanes
def test_lanes_without_barriers_fail() -> None:
    """The negative control: waves that do not wait for each other read local memory before it is written."""
    x = torch.randn(5, 1024)
    with driver.without_barriers():
        wrong = row_sums(x)
    assert not torch.isclose(wrong, x.sum(1), rtol=0.1).any()
    torch.testing.assert_close(row_sums(x), x.sum(1), rtol=1e-5, atol=1e-4)


@in_lanes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_lanes_multiply_matrices(size: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(size, 32).to(dtype), torch.randn(32, size).to(dtype)
    out = torch.empty(size, size)
    _matmul_kernel[(1,)](x, y, out, SIZE=size, DEPTH=32)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


@in_lanes
def test_lanes_specialise_as_on_a_gpu() -> None:
    """A row length that is a multiple of 16 is another compiled kernel than one that is not."""
    kernels = []
    for n in (1008, 1009):
        out = torch.empty(1)
        kernels.append(_row_sum_kernel[(1,)](torch.ones(1, n), out, n, BLOCK_SIZE=1024, num_warps=4))
        assert out.item() == n
    assert kernels[0].hash != kernels[1].hash
