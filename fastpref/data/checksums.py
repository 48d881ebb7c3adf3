"""A checksum of every row of a shard: damage is found in what is read, and nothing else has to be read for it."""

from __future__ import annotations

import zlib

import torch

PREFIX = "crc32."  # of the name of a tensor (n, …): the tensor (n,) int64 with its rows' checksums


def row_checksums(shard: str, name: str, rows: torch.Tensor) -> torch.Tensor:
    """CRC-32 (n,) of each row (n, …), which also tells shard, tensor, dtype and shape of a row from others."""
    start = zlib.crc32(f"{shard} {name} {rows.dtype} {tuple(rows.shape[1:])}".encode())
    content = rows.contiguous().flatten(1).view(torch.uint8).numpy()
    return torch.tensor([zlib.crc32(row, start) for row in content], dtype=torch.int64)


def with_checksums(shard: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a shard and the checksums of their rows."""
    return tensors | {PREFIX + name: row_checksums(shard, name, rows) for name, rows in tensors.items()}
