"""First look at the records: check each, hash its pictures, learn their sizes. Nothing is encoded yet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from fastpref.data.images import ImageError, Look, probe, same_picture
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


def scan_segment(
    source: Source, segment: range, *, drop_ties: bool, drop_identical: bool, max_pixels: int, beat: Any = None
) -> pa.Table:
    """One row a record (:data:`SCHEMA`): its status and reason, or the sha256 and size of its pictures.

    Args:
        source: the records.
        segment: which of them.
        drop_ties: leave ties out before their pictures are looked at.
        drop_identical: leave out pairs whose two pictures have the same pixels.
        max_pixels: pictures with more are rejected undecoded.
        beat: called after every few records with their number.
    """
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="probe") as pool:
        for window in _windows(source.rows(segment)):
            found.extend(pool.map(lambda row: _scan_row(row, drop_ties, drop_identical, max_pixels), window))
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


def _scan_row(row: Row, drop_ties: bool, drop_identical: bool, max_pixels: int) -> dict[str, Any]:
    record = check_row(row)
    if isinstance(record, Unusable):
        status = REJECTED if record.kind == "rejected" else UNLABELLED
        return _left_out(record, status, record.reason, record.detail)
    if drop_ties and record.label == 0.5:
        return {"record": record.index, "status": TIE}
    looks: list[Look] = []
    for side, image in (("winner", record.winner), ("loser", record.loser)):
        try:
            looks.append(probe(image, max_pixels))
        except ImageError as error:
            return _left_out(record, REJECTED, error.reason, f"{side}: {error.detail}")
    first, second = looks
    if drop_identical and same_picture(record.winner, record.loser, (first, second), max_pixels):
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


def _left_out(record: Record | Unusable, status: int, reason: str, detail: str) -> dict[str, Any]:
    texts = {"where": record.where, "reason": reason, "detail": detail}
    readable = {name: text.encode("utf-8", "replace").decode() for name, text in texts.items()}
    return {"record": record.index, "status": status, **readable}
