"""CUDA graphs on a real GPU: recorded steps are the plain ones bit for bit, and the host waits for none of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastpref.config import Config

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from recorded import METHODS, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
]
MakeConfig = Callable[..., Config]


@contextmanager
def waiting_for_nothing() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def waiting_at_will() -> Iterator[None]:
    yield


@pytest.mark.parametrize("name", METHODS)
def test_recorded_steps_are_the_plain_ones(
    sdxl_config: MakeConfig, clip: Path, few_records: Path, tmp_path: Path, name: str
) -> None:
    files = [f"clip={clip}", f"records={few_records}", "batch_size=2", "resolution=32", "device=cuda", "steps=4"]
    watched = waiting_at_will if "adafactor" in name or "spo" in name else waiting_for_nothing
    plain = trained(sdxl_config(*files, *METHODS[name], "cuda_graphs=false"), tmp_path / "plain", watched)
    recorded = trained(sdxl_config(*files, *METHODS[name], "cuda_graphs=true"), tmp_path / "recorded", watched)
    assert recorded[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(recorded[1], plain[1], strict=True))
