"""Addresses past 2^31 elements that the ops' own tests do not reach."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from interpreter import only
from transitions import same_step

from fastpref_kernels import add_keyed_noise, ddim_pool_step, derive_keys, keyed_noise
from fastpref_kernels.common import dispatch

ROW, BLOCK = 1 << 26, 1 << 12  # elements of a row, of which the 33rd begins at 2^31; Philox blocks of a program


def test_candidates_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidate 2 of a row of 2^30 elements begins there; all but the first block is memory that is never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    row = torch.from_numpy(np.zeros(2**30 + 64, np.int16)).view(torch.bfloat16)[None]
    row[:, :100] = torch.randn(100)
    keys, step = derive_keys(0, 0, torch.arange(3), 0, "sample")[None], same_step(1)
    with dispatch.triton_on_cpu():
        expected = ddim_pool_step(row[:, :100].clone(), row[:, :100].clone(), None, keys, step, guidance_scale=1.0)
        with only(lambda program: program == (0, 0, 0)):
            pool = ddim_pool_step(row, row, None, keys, step, guidance_scale=1.0)
    assert torch.equal(pool.candidates[:, :, :100], expected.candidates)
    assert torch.equal(pool.x0[:, :100], expected.x0)


def last_row_begins(program: tuple[int, ...]) -> bool:
    """The first program of the last of 33 rows."""
    return program[0] == 32 * ROW // (4 * BLOCK)


def test_noise_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row of the output begins at 2^31; what no program writes is never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(sys.modules["fastpref_kernels.keyed_noise.triton"], "_BLOCK", BLOCK)
    keys = derive_keys(0, 0, torch.arange(33), 0, "noise")
    with dispatch.triton_on_cpu():
        expected = keyed_noise(keys[-1:], (100,), torch.bfloat16)
        with only(last_row_begins):
            noise = keyed_noise(keys, (ROW,), torch.bfloat16)
    assert torch.equal(noise[-1:, :100], expected)


def test_added_noise_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for x_t; of x0 only one row is there, read 33 times."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(sys.modules["fastpref_kernels.keyed_noise.triton"], "_BLOCK", BLOCK)
    keys, a = derive_keys(0, 0, torch.arange(33), 0, "noise"), torch.linspace(0.99, 0.01, 33)
    row = torch.from_numpy(np.zeros(ROW, np.int16)).view(torch.bfloat16)
    row[:100] = torch.randn(100)
    with dispatch.triton_on_cpu():
        expected = add_keyed_noise(row[None, :100], keys[-1:], a[-1:], 1 - a[-1:])
        with only(last_row_begins):
            x_t = add_keyed_noise(row.expand(33, ROW), keys, a, 1 - a)
    assert torch.equal(x_t[-1:, :100], expected)
