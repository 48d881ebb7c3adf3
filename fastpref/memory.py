"""How much memory there is, on this machine and its devices."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def total_bytes(device: torch.device) -> int:
    """Bytes of RAM, or of the GPU's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had without swapping; where the system does not say, all there are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return total_bytes(device)


def resident_bytes() -> int:
    """Bytes of RAM this process holds; where the system does not say, the most it ever held."""
    file = Path("/proc/self/statm")
    if file.is_file():
        return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    from fastpref.train.telemetry import peak_rss_bytes

    return peak_rss_bytes()


def moved(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on ``device``; from the CPU to a GPU by way of pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
