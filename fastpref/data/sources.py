"""Where rows of records are read from: the protocol, and tables (parquet, arrow) in Pick-a-Pic's schema."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.errors import UserError

COLUMNS = ("jpg_0", "jpg_1", "label_0", "caption", "has_label", "label_1")
REQUIRED = ("jpg_0", "jpg_1", "label_0", "caption")
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Row:
    """One record as it stands in the source, unchecked."""

    index: int
    where: str
    image_0: bytes | None = None
    image_1: bytes | None = None
    caption: Any = None
    label_0: Any = None
    label_1: Any = None
    has_label: Any = None
    error: str = ""  # why the row cannot be read, in a few fixed words
    detail: str = ""


class Part(ABC):
    """One file (or folder) of a source; rows are numbered from 0."""

    path: Path

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def rows(self, indices: np.ndarray) -> Iterator[Row]:
        """The rows at the ascending ``indices``, streamed."""

    def fingerprint(self) -> str:
        """sha256 of name, size and both ends of the file."""
        digest = hashlib.sha256(f"{self.path.name} {self.path.stat().st_size}".encode())
        with self.path.open("rb") as stream:
            digest.update(stream.read(1 << 16))
            stream.seek(max(0, self.path.stat().st_size - (1 << 16)))
            digest.update(stream.read(1 << 16))
        return digest.hexdigest()


class Source:
    """Records in a fixed order, over one or many parts; any of them can be read again."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray | range) -> Iterator[Row]:
        """The rows at the ascending ``indices``, streamed; memory does not grow with their number."""
        wanted = np.asarray(indices, dtype=np.int64)
        cuts = np.searchsorted(wanted, self._starts)
        for part, start, low, high in zip(self.parts, self._starts[:-1], cuts[:-1], cuts[1:], strict=True):
            if low < high:
                for row in part.rows(wanted[low:high] - start):
                    yield replace(row, index=row.index + int(start))

    def fingerprint(self) -> str:
        """sha256 over the parts' fingerprints."""
        return hashlib.sha256("\n".join(part.fingerprint() for part in self.parts).encode()).hexdigest()


class ParquetPart(Part):
    """A parquet file in Pick-a-Pic's schema."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = _open_parquet(path)
        self._columns = check_schema(file.schema_arrow, path)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray) -> Iterator[Row]:
        file = _open_parquet(self.path)
        cuts = np.searchsorted(indices, self._starts)
        for group, (low, high) in enumerate(pairwise(cuts)):
            if low < high:
                yield from self._group(file, group, indices[low:high])

    def _group(self, file: pq.ParquetFile, group: int, indices: np.ndarray) -> Iterator[Row]:
        position = int(self._starts[group])
        try:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=self._columns):
                if position > indices[-1]:
                    return
                yield from batch_rows(batch, position, indices, self.path)
                position += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise UserError("the parquet file is damaged", str(self.path), str(error)) from error


class ArrowPart(Part):
    """An arrow file as ``datasets.Dataset.save_to_disk`` writes it (stream format; the file format is read too)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        batches = _arrow(path)
        self._columns = check_schema(batches[0].schema, path) if batches else list(REQUIRED)
        self._starts = np.concatenate([[0], np.cumsum([len(batch) for batch in batches])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray) -> Iterator[Row]:
        cuts = np.searchsorted(indices, self._starts)
        for batch, start, low, high in zip(_arrow(self.path), self._starts[:-1], cuts[:-1], cuts[1:], strict=True):
            if low < high:
                wanted = indices[low:high]
                first, last = int(wanted[0] - start), int(wanted[-1] - start)
                for at in range(first, last + 1, _ROWS_AT_ONCE):
                    piece = batch.slice(at, _ROWS_AT_ONCE).select(self._columns)
                    try:
                        piece.validate(full=True)  # offsets of a damaged file lead anywhere in memory
                    except pa.ArrowException as error:
                        raise UserError("the arrow file is damaged", str(self.path), str(error)) from error
                    yield from batch_rows(piece, int(start) + at, wanted, self.path)


def check_schema(schema: pa.Schema, path: Path) -> list[str]:
    """The columns to read; :class:`UserError` unless the pictures and the label are there in a known type."""
    missing = [name for name in REQUIRED if name not in schema.names]
    if missing:
        found = ", ".join(schema.names[:12]) or "none"
        raise UserError(f"no column {', '.join(missing)}", str(path), f"Pick-a-Pic's schema is needed; found: {found}")
    twice = [name for name in COLUMNS if schema.names.count(name) > 1]
    if twice:
        raise UserError(f"column {', '.join(twice)} is there twice", str(path), "Pick-a-Pic's schema is needed")
    for name in ("jpg_0", "jpg_1"):
        kind = schema.field(name).type
        nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not (nested or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise UserError(f"column {name} is {kind}", str(path), "encoded image bytes are needed")
    return [name for name in COLUMNS if name in schema.names]


def batch_rows(batch: pa.RecordBatch, position: int, indices: np.ndarray, path: Path) -> Iterator[Row]:
    """Rows of a batch that starts at ``position`` in its file, as far as ``indices`` asks for them."""
    low, high = np.searchsorted(indices, (position, position + len(batch)))
    chosen = indices[low:high]
    for index, value in zip(chosen, batch.take(pa.array(chosen - position)).to_pylist(), strict=True):
        images, error = [], ""
        for name in ("jpg_0", "jpg_1"):
            image = value[name]
            if isinstance(image, dict):
                if image.get("bytes") is None and image.get("path"):
                    error = "image is a path, not embedded bytes"
                image = image.get("bytes")
            images.append(image)
        rest = {name: value.get(name) for name in ("caption", "label_0", "label_1", "has_label")}
        yield Row(int(index), f"{path.name} row {index}", images[0], images[1], error=error, **rest)


def dataset_files(folder: Path) -> list[Path]:
    """Arrow files of a dataset saved with ``save_to_disk``, in its order.

    Raises:
        UserError: several splits and no 'train', a missing file, or an indices mapping that was not flattened.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        if "train" not in splits and len(splits) != 1:
            raise UserError(f"the dataset has splits {', '.join(splits)}", str(folder), "give the folder of one split")
        split = "train" if "train" in splits else str(splits[0])
        if folder.resolve() != (folder / split).resolve().parent:
            raise UserError(f"the split '{split}' leaves the dataset's folder", str(folder), "copy the whole folder")
        return dataset_files(folder / split)
    state = _json(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            "the dataset has an indices mapping", str(folder), "call flatten_indices() before save_to_disk()"
        )
    files = [folder / entry["filename"] for entry in state.get("_data_files", [])]
    for file in files:
        if not file.is_file() or folder.resolve() not in file.resolve().parents:
            raise UserError("a data file of the dataset is missing", str(file), "copy the whole folder")
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("cannot read the file", str(path), str(error)) from error


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError("cannot read the parquet file", str(path), str(error)) from error


def _arrow(path: Path) -> list[pa.RecordBatch]:
    try:
        mapped = pa.memory_map(str(path))
        try:
            return list(pa.ipc.open_stream(mapped))
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(mapped)
            return [file.get_batch(i) for i in range(file.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise UserError("cannot read the arrow file", str(path), str(error)) from error
