"""First look at the records: check each, hash its pictures, learn their sizes. Nothing is encoded yet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fastpref.data.buckets import Size, choose_buckets
from fastpref.data.images import ImageError, Look, enlargement, probe, same_picture
from fastpref.data.records import Record, Unusable, check_row
from fastpref.data.sources import Row, Source

SCAN_ROWS = 4096  # records in a segment, the unit of resuming and of sharing the work
_WINDOW = 64
USABLE, REJECTED, UNLABELLED, TIE, IDENTICAL = range(5)
SCHEMA = pa.schema(
    [
        ("record", pa.int64()),
        ("status", pa.int8()),
        ("where", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("caption", pa.string()),
        ("label", pa.float32()),
        ("key_w", pa.binary(32)),
        ("key_l", pa.binary(32)),
        ("width_w", pa.int32()),
        ("height_w", pa.int32()),
        ("width_l", pa.int32()),
        ("height_l", pa.int32()),
    ]
)


def segments(records: int) -> list[range]:
    """The scan's segments of a source of ``records`` records."""
    return [range(start, min(start + SCAN_ROWS, records)) for start in range(0, records, SCAN_ROWS)]


@dataclass(frozen=True)
class ScanRules:
    """What is left out before anything is encoded: ``drop_ties`` and ``drop_identical`` pairs (equal pixels), and
    pictures of more than ``max_pixels`` pixels or to be enlarged more than ``max_enlargement`` times (None: any)."""

    drop_ties: bool
    drop_identical: bool
    max_pixels: int
    max_enlargement: float | None
    buckets: list[Size]


def scan_segment(source: Source, segment: range, rules: ScanRules, beat: Any = None) -> pa.Table:
    """One row a record (:data:`SCHEMA`): its status and reason, or the sha256 and size of its pictures.

    Args:
        source: the records.
        segment: which of them.
        rules: what is left out.
        beat: called after every few records with their number.
    """
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="probe") as pool:
        for window in _windows(source.rows(segment)):
            found.extend(pool.map(lambda row: _scan_row(row, rules), window))
            if beat is not None:
                beat(len(window))
    return pa.Table.from_pylist(found, schema=SCHEMA)


def _windows(rows: Iterator[Row]) -> Iterator[list[Row]]:
    window: list[Row] = []
    for row in rows:
        window.append(row)
        if len(window) == _WINDOW:
            yield window
            window = []
    if window:
        yield window


def _scan_row(row: Row, rules: ScanRules) -> dict[str, Any]:
    record = check_row(row)
    if isinstance(record, Unusable):
        status = REJECTED if record.kind == "rejected" else UNLABELLED
        return _left_out(record, status, record.reason, record.detail)
    if rules.drop_ties and record.label == 0.5:
        return {"record": record.index, "status": TIE}
    looks: list[Look] = []
    for side, image in (("winner", record.winner), ("loser", record.loser)):
        try:
            looks.append(probe(image, rules.max_pixels))
        except ImageError as error:
            return _left_out(record, REJECTED, error.reason, f"{side}: {error.detail}")
    first, second = looks
    if small := _too_small(first.size, second.size, rules):
        return _left_out(record, REJECTED, "image is too small", small)
    if rules.drop_identical and same_picture(record.winner, record.loser, (first, second), rules.max_pixels):
        return {"record": record.index, "status": IDENTICAL}
    return {
        "record": record.index,
        "status": USABLE,
        "caption": record.caption,
        "label": record.label,
        "key_w": hashlib.sha256(record.winner).digest(),
        "key_l": hashlib.sha256(record.loser).digest(),
        "width_w": first.size[0],
        "height_w": first.size[1],
        "width_l": second.size[0],
        "height_l": second.size[1],
    }


def _too_small(winner: Size, loser: Size, rules: ScanRules) -> str:
    """Which picture of a pair would be enlarged too much to fill the bucket that both get, and how much."""
    if rules.max_enlargement is None:
        return ""
    target = rules.buckets[choose_buckets(rules.buckets, np.asarray([winner]), np.asarray([loser]))[0]]
    for side, size in (("winner", winner), ("loser", loser)):
        scale = enlargement(size, target)
        if scale > rules.max_enlargement:
            limit = f"max_enlargement {rules.max_enlargement:g}"
            return f"{side}: {size[0]}x{size[1]} to be enlarged {scale:.3g} times, {limit}"
    return ""


def _left_out(record: Record | Unusable, status: int, reason: str, detail: str) -> dict[str, Any]:
    texts = {"where": record.where, "reason": reason, "detail": detail}
    readable = {name: text.encode("utf-8", "replace").decode() for name, text in texts.items()}
    return {"record": record.index, "status": status, **readable}
