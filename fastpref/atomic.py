"""Files that are either whole or absent: write to a temporary name, sync, rename."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

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
    """Write ``value`` as JSON in one step; NaN and infinity are a ValueError, being no JSON."""
    return write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one if there is no file; :class:`UserError` if it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError("cannot read the file", str(path), f"{error}; restore or delete it") from None
    if not isinstance(value, dict):
        raise UserError("the file is no JSON object", str(path), "restore or delete it")
    return value


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in one step.

    Raises:
        UserError: the directory cannot be written or the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(plain, temporary, metadata=metadata)
        temporary.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError("cannot write the file", str(path), str(error)) from error


def write_table(path: Path, table: pa.Table) -> dict[str, Any]:
    """Write a parquet file in one step."""
    return write_bytes(path, table_bytes(table))


def table_bytes(table: pa.Table) -> memoryview:
    """A table as parquet, its pages with checksums."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return memoryview(sink.getvalue())


def write_sealed(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` behind its sha256 (and the file's name's) in one step; :func:`read_sealed` gives it back."""
    write_bytes(path, _seal(path, data) + bytes(data))


def read_sealed(path: Path) -> bytes:
    """What :func:`write_sealed` wrote; FileNotFoundError without a file.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError("cannot read the file", str(path), error.strerror or str(error)) from error
    seal, data = content[:32], content[32:]
    if _seal(path, data) != seal:
        raise UserError("the file is damaged", str(path), "delete it and run the command again")
    return data


def _seal(path: Path, data: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(path.name.encode() + b"\0")
    digest.update(data)
    return digest.digest()


def make_directory(path: Path) -> None:
    """Create ``path`` and its parents; raises :class:`UserError` where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("cannot create the directory", str(path), error.strerror or str(error)) from error


def check_writable(path: Path) -> None:
    """Raise :class:`UserError` if the nearest existing parent of ``path`` is read-only or no directory.

    A directory without any write bit counts as read-only for root too, whom the system would not stop.
    """
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError("the output path runs through a file", str(parent), "choose another place")
    if not os.access(parent, os.W_OK) or not parent.stat().st_mode & 0o222:
        raise UserError("the output directory is read-only", str(parent), "choose another place")


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed process left under a temporary name."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
