"""What is remembered by shape gives what working it out anew gives."""

from __future__ import annotations

import pytest
import torch

from fastpref_kernels import geglu
from fastpref_kernels.common.launch import remembered


def test_launches_after_the_first_give_the_same(triton_path: None) -> None:
    """The first comes by Triton's own way, the others do not; nor does one at an address that is no multiple of 16."""
    memory = torch.randn(4 * 512 + 1)
    hidden, shifted = memory[:-1].view(4, 512), memory[1:].view(4, 512)
    assert hidden.data_ptr() % 16 == 0 and shifted.data_ptr() % 16 == 4
    for x in (hidden, hidden, shifted, hidden + 1.0, shifted):
        value, gate = x.double().chunk(2, -1)
        expected = value * torch.nn.functional.gelu(gate)
        torch.testing.assert_close(geglu(x).double(), expected, rtol=2e-6, atol=1e-6)


def test_work_is_done_once_for_each_key_and_errors_are_not_kept() -> None:
    done = []

    @remembered
    def work(shape: tuple[int, ...], flag: bool) -> int:
        done.append(shape)
        if flag:
            raise ValueError("no")
        return len(shape)

    assert [work((1, 2), False), work((1, 2), False), work((3,), False)] == [2, 2, 1]
    assert done == [(1, 2), (3,)]
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            work((4,), True)
    assert done[2:] == [(4,), (4,)]
    assert work([1], False) == 1  # what has no hash, such as a symbolic size, is worked out every time
