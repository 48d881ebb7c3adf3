"""Files that are either whole or absent: write to a temporary name, sync, rename."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.errors import UserError

TEMPORARY = ".tmp"


def write_bytes(path: Path, data: bytes | memoryview) -> dict[str, Any]:
    """Write ``data`` to ``path`` in one step; returns ``{"bytes": size, "sha256": digest}``.

    Raises:
        UserError: the directory cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError("cannot write the file", str(path), error.strerror or str(error)) from error
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write ``value`` as JSON in one step."""
    return write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_table(path: Path, table: pa.Table) -> dict[str, Any]:
    """Write a parquet file in one step."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return write_bytes(path, memoryview(sink.getvalue()))


def make_directory(path: Path) -> None:
    """Create ``path`` and its parents; raises :class:`UserError` where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("cannot create the directory", str(path), error.strerror or str(error)) from error


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left under a temporary name."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)
