"""The mended interpreter catches what the shipped one lets pass."""

from __future__ import annotations

import pytest
import torch
from interpreter import Launch, bf16_to_fp32, fp32_to_bf16, only, shuffled, traffic
from triton.runtime.errors import InterpreterError

from fastpref_kernels.common.dispatch import jit, tl


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


@jit
def _shift_kernel(x_ptr, out_ptr, step, BLOCK_SIZE: tl.constexpr):
    """A program copies its block; blocks overlap in the output where step < BLOCK_SIZE."""
    i = tl.program_id(0) * step + tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@jit
def _add_kernel(x_ptr, out_ptr):
    tl.atomic_add(out_ptr, tl.load(x_ptr + tl.program_id(0)))


@jit
def _matmul_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    place = i[:, None] * SIZE + i[None, :]
    tl.store(out_ptr + place, tl.dot(tl.load(x_ptr + place), tl.load(y_ptr + place)))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_matrix_products_are_exact_and_sums_fp32(dtype: torch.dtype) -> None:
    x, y, out = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.empty(16, 16)
    _matmul_kernel[(1,)](x, y, out, SIZE=16)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("read", "written"), [(7, 8), (8, 7)])
def test_access_out_of_bounds_is_refused(read: int, written: int) -> None:
    memory = torch.zeros(64)
    with pytest.raises(InterpreterError, match="outside"):
        _copy_kernel[(1,)](memory[:read], memory[32 : 32 + written], 8, BLOCK_SIZE=8)
    _copy_kernel[(1,)](memory[:8], memory[32:40], 8, BLOCK_SIZE=8)


def test_overlapping_writes_are_a_race() -> None:
    x, out = torch.arange(64.0), torch.zeros(64)
    with pytest.raises(InterpreterError, match=r"_shift_kernel: program \(1, 0, 0\): store of an element of another"):
        _shift_kernel[(4,)](x, out, 7, BLOCK_SIZE=8)
    _shift_kernel[(4,)](x, out, 8, BLOCK_SIZE=8)
    assert torch.equal(out[:32], x[:32])


@pytest.mark.parametrize("shift", [-8, 8], ids=["read what another wrote", "write what another read"])
def test_reading_what_another_program_writes_is_a_race(shift: int) -> None:
    """In place, whole blocks apart: no write meets a write."""
    x = torch.arange(64.0)
    with pytest.raises(InterpreterError, match="of an element of another program"):
        _shift_kernel[(3,)](x[max(0, shift) :][:40], x[max(0, -shift) :][:40], 8, BLOCK_SIZE=8)
    _shift_kernel[(3,)](x, x, 8, BLOCK_SIZE=8)


def test_float_atomics_are_refused() -> None:
    with pytest.raises(InterpreterError, match="atomics"):
        _add_kernel[(4,)](torch.ones(4), torch.zeros(1))


def test_bytes_are_counted_lane_by_lane() -> None:
    x, out = torch.ones(50, dtype=torch.bfloat16), torch.empty(50)
    with traffic() as launches:
        _copy_kernel[(1,)](x, out, 50, BLOCK_SIZE=64)
        _shift_kernel[(4,)](out, torch.empty(50), 8, BLOCK_SIZE=8)
    assert launches == [Launch("_copy_kernel", 1, 100, 200), Launch("_shift_kernel", 4, 128, 128)]


def test_only_the_selected_programs_run() -> None:
    out = torch.zeros(32)
    with only(lambda program: program[0] in (1, 3)):
        _shift_kernel[(4,)](torch.ones(32), out, 8, BLOCK_SIZE=8)
    assert out.view(4, 8).sum(1).tolist() == [0, 8, 0, 8]
    with only(lambda program: program[0] == 1), pytest.raises(InterpreterError, match="outside"):
        _shift_kernel[(2,)](torch.ones(32), out, 2**31 - 8, BLOCK_SIZE=8)


def test_empty_memory_is_poisoned() -> None:
    assert torch.empty(100).isnan().all() and torch.empty_like(torch.zeros(100).half()).isnan().all()


@jit
def _last_adds_kernel(x_ptr, part_ptr, counter_ptr, out_ptr, EARLY: tl.constexpr, SEM: tl.constexpr):
    """The sum of x by the last program to count in; EARLY: which counts in before it stores its part."""
    i, n = tl.program_id(0), tl.num_programs(0)
    if not EARLY:
        tl.store(part_ptr + i, tl.load(x_ptr + i))
    last = tl.atomic_add(counter_ptr, 1, sem=SEM) == n - 1
    if EARLY:
        tl.store(part_ptr + i, tl.load(x_ptr + i))
    if last:
        j = tl.arange(0, 8)
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + j, mask=j < n, other=0.0), axis=0))
        tl.store(counter_ptr, 0)


@pytest.mark.parametrize("seed", range(3))
def test_a_counter_orders_programs(seed: int) -> None:
    x, part, counter, out = torch.arange(6.0), torch.empty(6), torch.zeros(1, dtype=torch.int32), torch.empty(1)
    with shuffled(seed):
        _last_adds_kernel[(6,)](x, part, counter, out, EARLY=False, SEM="acq_rel")
        assert out.item() == 15.0 and counter.item() == 0
        for early, sem in ((True, "acq_rel"), (False, "relaxed"), (False, "acquire")):
            counter.zero_()
            with pytest.raises(InterpreterError, match="of an element of another program"):
                _last_adds_kernel[(6,)](x, part, counter, out, EARLY=early, SEM=sem)


@jit
def _reset_kernel(counter_ptr, AT: tl.constexpr):
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == AT:
        tl.store(counter_ptr, 0)


def test_a_counter_reset_before_all_have_counted_in_is_a_race() -> None:
    with pytest.raises(InterpreterError, match="atomic on what another program stored"):
        _reset_kernel[(4,)](torch.zeros(1, dtype=torch.int32), AT=2)
    counter = torch.zeros(1, dtype=torch.int32)
    _reset_kernel[(4,)](counter, AT=3)
    assert counter.item() == 0


def test_programs_run_in_another_order() -> None:
    order = torch.zeros(1, dtype=torch.int32)
    found = torch.empty(8, dtype=torch.int32)
    with shuffled(1):
        _ticket_kernel[(8,)](order, found)
    assert sorted(found.tolist()) == list(range(8)) != found.tolist()


@jit
def _ticket_kernel(counter_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1, sem="acq_rel"))
