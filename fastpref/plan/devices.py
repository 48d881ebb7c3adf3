"""Memory of GPUs by name, as in their public datasheets (decimal GB)."""

from __future__ import annotations

import torch

from fastpref.errors import UserError
from fastpref.memory import total_bytes

GIGABYTES = {
    "b200": 180,
    "h200": 141,
    "h100": 80,
    "h100-nvl": 94,
    "a100": 80,
    "a100-40": 40,
    "l40s": 48,
    "a6000": 48,
    "l4": 24,
    "a10": 24,
    "rtx4090": 24,
    "rtx3090": 24,
    "v100": 32,
    "v100-16": 16,
    "t4": 16,
    "mi300x": 192,
    "mi250x": 128,
}


def device_bytes(name: str) -> int:
    """Memory of one device; 'cpu' is this machine.

    Raises:
        UserError: an unknown name.
    """
    if name == "cpu":
        return total_bytes(torch.device("cpu"))
    if name not in GIGABYTES:
        raise UserError(f"unknown device '{name}'", "--device", f"known are cpu, {', '.join(GIGABYTES)}")
    return GIGABYTES[name] * 10**9
