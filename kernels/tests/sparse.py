"""Tensors whose rows are gigabytes apart and whose untouched pages cost nothing, to reach offsets beyond 2^31."""

from __future__ import annotations

import mmap
import sys

import torch

FAR = (1 << 30) + 16  # elements between two rows: the third begins past 2^31
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # unnamed before Python 3.13


def far_rows(rows: torch.Tensor) -> torch.Tensor:
    """A copy of three rows (3, ...), each dense, FAR elements apart."""
    row = rows[0].numel()
    size = ((len(rows) - 1) * FAR + row) * rows.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    flat = torch.frombuffer(memory, dtype=rows.dtype)
    return flat.as_strided(rows.shape, (FAR, *rows[0].contiguous().stride())).copy_(rows)
