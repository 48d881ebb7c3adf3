"""What ``fused_ops: auto`` takes, and where it shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastpref.config import Config
from fastpref.models import fused_ops
from fastpref.models.fused_ops import fused_ops_line
from fastpref.train.job import TrainJob
from fastpref_kernels import unpatch_unet

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("choice", "faster", "expected"),
    [("auto", False, False), ("auto", True, True), ("true", False, True), ("false", True, False)],
)
def test_auto_takes_what_was_measured_to_be_faster(
    sdxl_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, choice: str, faster: bool, expected: bool
) -> None:
    monkeypatch.setitem(fused_ops._FASTER, "cpu", faster)
    config = sdxl_config("method=dpo", f"fused_ops={choice}")
    fused = unpatch_unet(TrainJob.open(config).trainer.policy.unet)
    assert (min(fused) > 0) is expected and (max(fused) > 0) is expected
    line = fused_ops_line(config.fused_ops, CPU)
    assert line.startswith(f"fused_ops: {str(expected).lower()} (") if choice == "auto" else line == ""


def test_without_a_measurement_layers_stay_as_they_are() -> None:
    assert not fused_ops.fuses("auto", torch.device("xpu"))
    assert fused_ops_line("auto", torch.device("xpu")) == "fused_ops: false (not measured on this device)"
    assert "not measured on a GPU yet" in fused_ops_line("auto", CUDA) and not fused_ops.fuses("auto", CUDA)
