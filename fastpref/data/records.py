"""Preference records: what is read from where, and what makes a record usable.

Accepted as ``records``: a parquet file, a glob or a folder of parquet files (also its ``data/``), a dataset written by
``datasets.Dataset.save_to_disk``, each with Pick-a-Pic's columns ``jpg_0, jpg_1`` (encoded bytes or ``{bytes, path}``),
``label_0`` (1: jpg_0 preferred, 0: jpg_1, 0.5: tie), ``caption`` and, if present, ``has_label`` and ``label_1``, which
versions 1 and 2 of the data set share (ids such as ``best_image_uid`` are not read); ``.tar`` files or a folder or glob
of them (see :class:`fastpref.data.tars.TarPart`); ``.jsonl`` and ``.csv`` with image paths relative to the file and
inside its directory; a folder with ``winner/`` and ``loser/``; and ``emoji``, the bundled training records.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.data.files import CsvPart, FolderPart, JsonlPart, is_junk
from fastpref.data.sources import ArrowPart, ParquetPart, Part, Row, Source, dataset_files
from fastpref.data.tars import TarPart
from fastpref.data.text import BOM, caption_of, caption_problem, decode, lines
from fastpref.errors import UserError

_ACCEPTED = "give a parquet, tar, jsonl or csv file, a folder or glob of them, or a folder with winner/ and loser/"
_PARTS: dict[str, Callable[[Path], Part]] = {
    ".parquet": ParquetPart,
    ".arrow": ArrowPart,
    ".tar": TarPart,
    ".jsonl": JsonlPart,
    ".csv": CsvPart,
}
_HELD_OUT_PREFIXES = ("test", "valid", "dev", "eval")


@dataclass(frozen=True)
class Record:
    """A usable preference: encoded pictures, winner first. ``label`` is 1.0, or 0.5 for a tie (jpg_0 first)."""

    index: int
    where: str
    winner: bytes
    loser: bytes
    caption: str
    label: float


@dataclass(frozen=True)
class Unusable:
    """A record left out: ``rejected`` is broken, ``unlabelled`` says has_label = false."""

    index: int
    where: str
    kind: Literal["rejected", "unlabelled"]
    reason: str
    detail: str = ""


def open_records(records: str) -> Source:
    """The records at a path, glob or 'emoji', in a fixed order.

    Raises:
        UserError: nothing there, nothing known there, no rows, or several splits in one folder.
    """
    if records == "emoji":
        from fastpref.emoji import TRAIN_PARQUET

        records = str(TRAIN_PARQUET)
    source = Source(_parts(records))
    if not len(source):
        raise UserError("there are no records", records, _ACCEPTED)
    return source


def read_records(records: str) -> Iterator[Record | Unusable]:
    """Every record at ``records``, checked (pictures are not decoded), streamed."""
    source = open_records(records)
    for row in source.rows(range(len(source))):
        yield check_row(row)


def check_row(row: Row) -> Record | Unusable:
    """A row as a :class:`Record`, or why it is none."""
    labelled = _number(row.has_label)
    if labelled == 0.0:
        return Unusable(row.index, row.where, "unlabelled", "has_label is false")
    label = _number(row.label_0)
    problem, detail = _label_problem(row, label)
    if row.error:
        problem, detail = row.error, row.detail
    elif not problem:
        problem = caption_problem(row.caption)
        if not problem and not (row.image_0 and row.image_1):
            problem = "image is missing"
    if problem:
        return Unusable(row.index, row.where, "rejected", problem, detail)
    assert label is not None and row.image_0 and row.image_1
    first, second = (row.image_0, row.image_1) if label >= 0.5 else (row.image_1, row.image_0)
    return Record(row.index, row.where, first, second, caption_of(row.caption), 0.5 if label == 0.5 else 1.0)


def read_captions(records: str, limit: int | None = None) -> list[str]:
    """The first ``limit`` distinct captions, for evaluation.

    Reads everything :func:`open_records` reads (a parquet file needs no column but ``caption``) and prompt files:
    ``.txt`` with one a line, ``.json`` with a list and ``.jsonl`` with lines of strings, ``{"caption": …}`` or
    ``{"prompt": …}``. 'emoji' is the bundled held-out set.
    """
    if records == "emoji":
        from fastpref.emoji import HELDOUT_PARQUET

        records = str(HELDOUT_PARQUET)
    captions: dict[str, None] = {}
    for caption in _captions(records):
        if not caption_problem(caption):
            captions.setdefault(caption_of(caption))
        if limit is not None and len(captions) >= limit:
            break
    if not captions:
        raise UserError("there are no captions", records, "give prompts as parquet, json, jsonl or txt")
    return list(captions)


def _parts(records: str) -> list[Part]:
    path = Path(records)
    if path.is_dir():
        return _folder_parts(path)
    files = [path]
    if any(sign in records for sign in "*?[") and not path.exists():
        anchor = Path(path.anchor or ".")
        found = anchor.glob(str(path.relative_to(path.anchor)) if path.anchor else records)
        files = sorted(file for file in found if not is_junk(file.name))
    if not files or not files[0].exists():
        raise UserError("no such preference records", records, _ACCEPTED)
    return [_part(file) for file in files]


def _folder_parts(path: Path) -> list[Part]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return [ArrowPart(file) for file in dataset_files(path)]
    if (path / "winner").is_dir() and (path / "loser").is_dir():
        return [FolderPart(path)]
    for pattern in ("*.parquet", "data/*.parquet", "*.tar"):
        files = sorted(file for file in path.glob(pattern) if not is_junk(file.name))
        held_out = [file.name for file in files if file.name.lower().startswith(_HELD_OUT_PREFIXES)]
        if held_out and len(held_out) < len(files):
            todo = f"choose with a glob, e.g. '{path / pattern.replace('*', 'train-*')}'"
            raise UserError(f"several splits in one folder, e.g. {held_out[0]}", str(path), todo)
        if files:
            return [_part(file) for file in files]
    raise UserError("no preference records in the folder", str(path), _ACCEPTED)


def _part(path: Path) -> Part:
    kind = _PARTS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"unknown kind of records '{path.name}'", str(path), _ACCEPTED)
    try:
        return kind(path)
    except OSError as error:
        raise UserError("cannot read the records", str(path), error.strerror or str(error)) from error


def _label_problem(row: Row, label: float | None) -> tuple[str, str]:
    if label is None:
        return "label is missing", ""
    if math.isnan(label):
        return "label is NaN", ""
    if label not in (0.0, 0.5, 1.0):
        return "label is not 0, 0.5 or 1", f"label_0 = {row.label_0}"
    other = _number(row.label_1)
    if other is not None and label + other != 1.0:
        return "label_0 and label_1 do not add up to 1", f"{row.label_0} + {row.label_1}"
    return "", ""


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return float(value.strip().lower() == "true")
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _captions(records: str) -> Iterator[Any]:
    path = Path(records)
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in (".txt", ".json", ".jsonl", ".parquet"):
        source = open_records(records)
        for row in source.rows(range(len(source))):
            yield row.caption
        return
    try:
        if suffix == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(1024, columns=["caption"]):
                if not batch.num_columns:
                    raise UserError("no column caption", records, "prompts are read from a column of that name")
                yield from batch.column(0).to_pylist()
            return
        for prompt in _prompts(decode(path.read_bytes()), suffix):
            yield prompt.get("caption", prompt.get("prompt")) if isinstance(prompt, dict) else prompt
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise UserError("cannot read the prompts", records, str(error)) from error


def _prompts(text: str, suffix: str) -> Iterable[Any]:
    if suffix == ".txt":
        return lines(text)
    if suffix == ".jsonl":
        return (json.loads(line.strip(BOM)) for line in lines(text) if line.strip())
    prompts = json.loads(text)
    if not isinstance(prompts, list):
        raise ValueError("the JSON is not a list of prompts")
    return prompts
