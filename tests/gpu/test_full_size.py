"""The full-size SDXL UNet on a GPU: RPO, SPO and full DPO steps, and their memory against the plan."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import sdxl_full_size as full_size  # noqa: E402

from fastpref.config import parse_config  # noqa: E402
from fastpref.plan.report import make_plan  # noqa: E402
from fastpref.runs import run_training  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sdxl")
    full_size.make_inputs(place)
    return place


@pytest.mark.parametrize("run", ["rpo", "spo", "dpo"])
def test_a_step_is_finite_and_needs_what_the_plan_says(folder: Path, run: str) -> None:
    """To a tenth, which on the tiny models of other tests is what cuBLAS keeps for itself."""
    if run == "dpo":
        pytest.importorskip("bitsandbytes")
    config = parse_config(full_size.settings_of(run, folder) | {"device": "cuda"})
    torch.cuda.reset_peak_memory_stats()
    run_training(config)
    last = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(last["loss"]) and last["grad_norm"] > 0
    measured = json.loads((config.run_dir / "summary.json").read_text())["peak_device_bytes"]
    assert abs(make_plan(config, 1, "h100").best.total / measured - 1) < 0.1
