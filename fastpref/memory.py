"""Memory of this machine and its devices: how much there is and was, how to get to it, and how to give it back."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_M_MMAP_THRESHOLD, _GIVEN_BACK = -3, 1 << 20  # of glibc's malloc.h; bytes


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
    return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux's ru_maxrss would not do: it outlives exec, and is then at least what the process held that started this one.
    """
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def peak_device_bytes(device: torch.device) -> int:
    """Largest allocation on the GPU so far, in bytes; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def pinned(values: torch.Tensor) -> torch.Tensor:
    """A tensor of the CPU in pinned memory, contiguous: torch cannot pin what :meth:`torch.Tensor.expand` gave, and
    would upload strided values by way of pageable memory."""
    return values.contiguous().pin_memory()


def moved(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on ``device``; from the CPU to a GPU by way of pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = pinned(values)
    return values.to(device, non_blocking=True)


def give_back_freed_blocks() -> None:
    """Have glibc return blocks of a MiB and more to the system as soon as they are freed; elsewhere nothing.

    It keeps blocks below 32 MB in its heap, where checkpoints that stay lie between activations that go, and leave
    holes (``MALLOC_MMAP_THRESHOLD_``, which goes first, puts them back for a comparison). Every new block then costs
    its page faults. Holes that are there already are still filled first, so call it before models are loaded.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _GIVEN_BACK)
