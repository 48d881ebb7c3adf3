"""Both paths of every op in one process: the CPU path, and the Triton kernels in the mended interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton and by fastpref_kernels when they are imported
sys.path.insert(0, str(Path(__file__).parent))  # interpreter, reference and tolerances, whatever the import mode

import interpreter
import pytest
import torch

from fastpref_kernels import _dispatch

if not _dispatch.INTERPRETED:
    raise RuntimeError("fastpref_kernels is already imported: set TRITON_INTERPRET=1 before pytest starts")
interpreter.install()


@pytest.fixture(params=["cpu", "triton"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on the CPU path and on the interpreted kernels."""
    with _dispatch.triton_on_cpu() if request.param == "triton" else nullcontext():
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty starts as NaN (integers: their maximum), so an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
