"""Addresses past 2^31 elements that the ops' own tests do not reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreter import only

from fastpref_kernels import _dispatch, ddim_pool_step, derive_keys


def test_candidates_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidate 2 of a row of 2^30 elements begins there; all but the first block is memory that is never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    row = torch.from_numpy(np.zeros(2**30 + 64, np.int16)).view(torch.bfloat16)[None]
    row[:, :100] = torch.randn(100)
    keys, alphas = derive_keys(0, 0, torch.arange(3), 0, "sample")[None], torch.linspace(0.99, 0.01, 1000)
    with _dispatch.triton_on_cpu():
        expected = ddim_pool_step(
            row[:, :100].clone(), row[:, :100].clone(), None, keys, alphas, 501, 451, guidance_scale=1.0
        )
        with only(lambda program: program == (0, 0, 0)):
            pool = ddim_pool_step(row, row, None, keys, alphas, 501, 451, guidance_scale=1.0)
    assert torch.equal(pool.candidates[:, :, :100], expected.candidates)
    assert torch.equal(pool.x0[:, :100], expected.x0)
