"""Records in WebDataset tars, read where they lie: nothing is unpacked."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.data.files import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, is_junk
from fastpref.data.sources import Part, Row
from fastpref.data.text import decode, decode_row
from fastpref.errors import UserError

# Extension of a tar's member → which picture of the sample it is.
_SIDES = {f"{name}{suffix}": name for name in ("winner", "loser", "0", "1") for suffix in IMAGE_SUFFIXES}
_SIDES |= {"jpg_0": "0", "jpg_1": "1"}


@dataclass
class _Sample:
    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension → offset, size
    pictures: dict[str, str] = field(default_factory=dict)  # winner, loser, 0 or 1 → extension

    def add(self, extension: str, place: tuple[int, int], path: Path) -> None:
        """Note a member; :class:`UserError` if the sample has it already, or another picture in its place."""
        side = _SIDES.get(extension, "")
        other = extension if extension in self.members else self.pictures.get(side)
        if other is not None:
            what = f"sample {self.key} has {extension} twice"
            if other != extension:
                what = f"sample {self.key} has two pictures in one place: {other} and {extension}"
            raise UserError(what, str(path), "take one out of the tar")
        self.members[extension] = place
        if side:
            self.pictures[side] = extension


class TarPart(Part):
    """An uncompressed WebDataset tar; the members of one sample are adjacent and named ``KEY.EXTENSION``.

    Pictures: ``KEY.jpg_0`` and ``KEY.jpg_1``, or ``KEY.0.jpg`` and ``KEY.1.jpg`` (any picture suffix), with the label
    in ``KEY.json`` (``label_0``) or ``KEY.label_0`` (text); or ``KEY.winner.jpg`` and ``KEY.loser.jpg``, without label.
    Caption: ``caption`` in ``KEY.json``, else ``KEY.txt`` or ``KEY.caption``. The key ends at the first dot.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = len(self._samples())

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: np.ndarray) -> Iterator[Row]:
        samples = self._samples()
        with self.path.open("rb") as stream:
            for index in indices.tolist():
                sample = samples[index]
                yield _tar_row(index, f"{self.path.name} sample {sample.key}", sample, stream)

    def _samples(self) -> list[_Sample]:
        samples: list[_Sample] = []
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    if not member.isfile() or is_junk(member.name):
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if not samples or samples[-1].key != key:
                        samples.append(_Sample(key))
                    samples[-1].add(extension.lower(), (member.offset_data, member.size), self.path)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(
                "cannot read the tar file", str(self.path), f"{error}; compressed tars are not read"
            ) from error
        return samples


def _tar_row(index: int, where: str, sample: _Sample, stream: Any) -> Row:
    def read(extension: str) -> bytes | None:
        offset, size = sample.members[extension]
        if size > MAX_IMAGE_BYTES:
            return None
        stream.seek(offset)
        return stream.read(size)

    def picture(side: str) -> bytes | None:
        return read(sample.pictures[side]) if side in sample.pictures else None

    value: dict[str, Any] = {}
    if "json" in sample.members:
        try:
            value = json.loads(decode(read("json") or b""))
        except ValueError as error:
            return Row(index, where, error="json is not JSON", detail=str(error))
        if not isinstance(value, dict):
            return Row(index, where, error="json is not a JSON object")
    for name, extensions in (("caption", ("txt", "caption")), ("label_0", ("label_0",)), ("label_1", ("label_1",))):
        for extension in extensions:
            if name not in value and extension in sample.members:
                value[name] = decode_row(read(extension) or b"").strip()
    first, second = picture("winner"), picture("loser")
    if first is not None or second is not None:
        value = {"caption": value.get("caption"), "label_0": 1.0}
    else:
        first, second = picture("0"), picture("1")
    rest: dict[str, Any] = {name: value.get(name) for name in ("caption", "label_0", "label_1", "has_label")}
    return Row(index, where, first, second, **rest)
