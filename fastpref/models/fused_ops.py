"""Whether a UNet's layers run this project's kernels where ``fused_ops`` leaves it open."""

from __future__ import annotations

from typing import Literal

import torch

Choice = bool | Literal["auto"]

# By kind of device, from benchmarks/results: op_bench.csv on a CPU; no GPU has measured the kernels as they are.
_FASTER = {"cpu": False, "cuda": False}
_WHY = {
    "cpu": "plain layers are as fast on a CPU",
    "cuda": "not measured on a GPU yet: make gpu-bench BENCH='--parts choices'",
}


def fuses(choice: Choice, device: torch.device) -> bool:
    """What ``fused_ops`` is on ``device``."""
    return _FASTER.get(device.type, False) if choice == "auto" else choice


def fused_ops_line(choice: Choice, device: torch.device) -> str:
    """What ``auto`` took, and why; empty if there was nothing to choose."""
    if choice != "auto":
        return ""
    return f"fused_ops: {str(fuses(choice, device)).lower()} ({_WHY.get(device.type, 'not measured on this device')})"
