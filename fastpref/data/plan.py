"""Which pictures and captions are encoded, once each, in which order: a pure function of the scan."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastpref.data.buckets import Size, choose_buckets
from fastpref.data.scan import IDENTICAL, REJECTED, TIE, UNLABELLED, USABLE
from fastpref.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Pairs in the order of the records; pictures and captions in the order of their first appearance.

    A picture is the sha256 of its bytes together with its bucket. Caption 0 is the empty prompt, for caption dropout.
    """

    buckets: list[Size]
    # per pair
    record: np.ndarray  # (P,) int64
    image_w: np.ndarray  # (P,) int64 position in the pictures
    image_l: np.ndarray
    caption: np.ndarray  # (P,) int64 position in the captions
    label: np.ndarray  # (P,) float32
    bucket: np.ndarray  # (P,) int16
    # per picture
    image_record: np.ndarray  # (U,) int64: where it is first seen
    image_side: np.ndarray  # (U,) 0 winner, 1 loser
    image_bucket: np.ndarray  # (U,) int16
    image_size: np.ndarray  # (U, 2) int32 width, height
    image_key: list[bytes]
    captions: list[str]
    # left out
    records: int
    rejected: list[dict[str, Any]]
    ties_dropped: int
    identical_dropped: int
    unlabelled: int

    def units(self, kind: str, shard_size: int) -> list[range]:
        """Shards of pictures ('image') or captions ('text')."""
        count = len(self.image_key) if kind == "image" else len(self.captions)
        return [range(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]


def make_plan(scanned: list[pa.Table], buckets: list[Size]) -> Plan:
    """The plan of all segments of a scan, in order. Memory: about 1 KB a record, measured at 1e6."""
    table = pa.concat_tables(scanned)
    status = table.column("status").to_numpy()
    usable = table.filter(pa.array(status == USABLE))
    sizes_w, sizes_l = _sizes(usable, "w"), _sizes(usable, "l")
    bucket = choose_buckets(buckets, sizes_w, sizes_l)
    codes, first, keys = _content(usable, bucket)
    record = usable.column("record").to_numpy()
    captions = pa.chunked_array([pa.array([""], pa.string()), *usable.column("caption").chunks]).combine_chunks()
    encoded = captions.dictionary_encode()
    return Plan(
        buckets=buckets,
        record=record,
        image_w=codes[0::2],
        image_l=codes[1::2],
        caption=encoded.indices.to_numpy()[1:].astype(np.int64),
        label=usable.column("label").to_numpy(),
        bucket=bucket,
        image_record=record[first // 2],
        image_side=(first % 2).astype(np.int8),
        image_bucket=bucket[first // 2],
        image_size=np.stack([sizes_w, sizes_l], axis=1).reshape(-1, 2)[first],
        image_key=keys,
        captions=encoded.dictionary.to_pylist(),
        records=len(table),
        rejected=_rejections(table.filter(pa.array(status == REJECTED))),
        ties_dropped=int((status == TIE).sum()),
        identical_dropped=int((status == IDENTICAL).sum()),
        unlabelled=int((status == UNLABELLED).sum()),
    )


def check_usable(
    rejected: list[dict[str, Any]], pairs: int, records: int, limit: float, where: str, listing: Path | None = None
) -> None:
    """Check what is left of a source.

    Args:
        rejected: the rejects.
        pairs: usable pairs.
        records: all records.
        limit: largest share of rejects that is accepted.
        where: the source, for the message.
        listing: the file that lists the rejects.

    Raises:
        UserError: no pair is left, or too many records are rejected; names the commonest reason.
    """
    see = "" if listing is None else f"see {listing}; "
    share = len(rejected) / max(1, records)
    if share > limit:
        reason, count = reasons(rejected).most_common(1)[0]
        raise UserError(
            f"{len(rejected)} of {records} records ({share:.1%}) cannot be used, most often '{reason}' ({count})",
            where,
            f"{see}mend the records or raise max_reject_share above {limit:g}",
        )
    if not pairs:
        raise UserError(
            f"no usable pair in {records} records ({len(rejected)} rejected)",
            where,
            f"{see}are all of them ties, unlabelled or two identical pictures? see the keys ties and identical",
        )


def reasons(rejected: list[dict[str, Any]]) -> Counter[str]:
    """How often each reason occurs."""
    return Counter(entry["reason"] for entry in rejected)


def _content(usable: pa.Table, bucket: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Codes (2P,) of winner, loser, winner, … by content and bucket; first appearances (U,); their sha256."""
    pairs = len(usable)
    content = np.zeros((pairs, 2, 34), dtype=np.uint8)
    for side, name in enumerate(("key_w", "key_l")):
        chunks = [np.frombuffer(b"".join(chunk.to_pylist()), np.uint8) for chunk in usable.column(name).chunks]
        content[:, side, :32] = np.concatenate([*chunks, np.empty(0, np.uint8)]).reshape(pairs, 32)
    content[:, :, 32:] = bucket.view(np.uint8).reshape(pairs, 1, 2)
    rows = pa.FixedSizeBinaryArray.from_buffers(pa.binary(34), 2 * pairs, [None, pa.py_buffer(content.tobytes())])
    encoded = rows.dictionary_encode()
    codes = encoded.indices.to_numpy().astype(np.int64)
    _, first = np.unique(codes, return_index=True)
    return codes, first.astype(np.int64), [key[:32] for key in encoded.dictionary.to_pylist()]


def _sizes(usable: pa.Table, side: str) -> np.ndarray:
    columns = [usable.column(f"{name}_{side}").to_numpy() for name in ("width", "height")]
    return np.stack(columns, axis=1).astype(np.int32)


def _rejections(table: pa.Table) -> list[dict[str, Any]]:
    return [
        {name: row[name] for name in ("record", "where", "reason", "detail") if row[name] not in (None, "")}
        for row in table.select(["record", "where", "reason", "detail"]).to_pylist()
    ]
