"""Records that are files: JSONL and CSV with image paths, a folder with winner/ and loser/."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastpref.data.sources import Part, Row
from fastpref.data.text import decode_row, encoding_of
from fastpref.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MAX_IMAGE_BYTES = 256 << 20
MAX_CAPTION_BYTES = 1 << 20
_LEFT_BY_FILE_MANAGERS = ("thumbs.db", "desktop.ini", "__macosx")


class PathsPart(Part):
    """A text file whose records name their pictures by paths."""

    @abstractmethod
    def values(self, indices: np.ndarray) -> Iterator[dict[str, Any] | Row]:
        """The records at the ascending ``indices`` as mappings, or a row with an error."""

    def rows(self, indices: np.ndarray) -> Iterator[Row]:
        for index, value in zip(indices.tolist(), self.values(indices), strict=True):
            where = f"{self.path.name} record {index}"
            yield (
                replace(value, where=where)
                if isinstance(value, Row)
                else path_row(index, where, value, self.path.parent)
            )

    def fingerprint(self) -> str:
        """sha256 of the text and of size and modification time of every picture named in it."""
        with self.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        for value in self.values(np.arange(len(self))):
            for name in ("winner", "loser", "image_0", "image_1"):
                if isinstance(value, dict) and isinstance(value.get(name), str):
                    digest.update(_stat(self.path.parent, value[name]))
        return digest.hexdigest()


class JsonlPart(PathsPart):
    """One JSON object a line: ``winner, loser, caption`` or ``image_0, image_1, label_0, caption`` (paths)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_utf8(path)
        filled = [offset for offset, line in _lines(path) if line.removeprefix(codecs.BOM_UTF8).strip()]
        self._offsets = np.asarray(filled, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def values(self, indices: np.ndarray) -> Iterator[dict[str, Any] | Row]:
        with self.path.open("rb") as stream:
            for index in indices.tolist():
                stream.seek(self._offsets[index])
                try:
                    value = json.loads(stream.readline())
                except ValueError as error:
                    yield Row(index, "", error="line is not JSON", detail=str(error))
                    continue
                yield value if isinstance(value, dict) else Row(index, "", error="line is not a JSON object")


class CsvPart(PathsPart):
    """A CSV file (UTF-8, header) with the columns of :class:`JsonlPart`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_utf8(path)
        try:
            consumed = [0]
            reader = csv.reader(_counted(path, consumed))
            self._header = [name.strip() for name in next(reader, [])]
            offsets, start = [], consumed[0]
            for values in reader:
                if values:  # not a blank line
                    offsets.append(start)
                start = consumed[0]
        except csv.Error as error:
            raise UserError("cannot read the CSV file", str(path), str(error)) from error
        named = set(self._header)
        if not ({"winner", "loser", "caption"} <= named or {"image_0", "image_1", "label_0", "caption"} <= named):
            todo = "needed: winner, loser, caption or image_0, image_1, label_0, caption"
            raise UserError(f"the CSV header is {', '.join(self._header) or 'empty'}", str(path), todo)
        self._offsets = np.asarray(offsets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def values(self, indices: np.ndarray) -> Iterator[dict[str, Any] | Row]:
        with self.path.open("rb") as stream:
            for index in indices.tolist():
                stream.seek(self._offsets[index])
                values = next(csv.reader(_decoded(stream)), [])
                if len(values) != len(self._header):
                    detail = f"{len(values)} and {len(self._header)}"
                    yield Row(index, "", error="record and header differ in length", detail=detail)
                    continue
                yield dict(zip(self._header, values, strict=True))


class FolderPart(Part):
    """``winner/NAME.jpg`` and ``loser/NAME.jpg`` with the caption in ``NAME.txt``, at the top or in ``winner/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._losers = by_stem(picture_files(path / "loser"))
        self._winners = list(by_stem(picture_files(path / "winner")).values())

    def __len__(self) -> int:
        return len(self._winners)

    def fingerprint(self) -> str:
        files = [
            *self._winners,
            *self._losers.values(),
            *self.path.glob("*.txt"),
            *(self.path / "winner").glob("*.txt"),
        ]
        names = [file.relative_to(self.path).as_posix() for file in files]
        stats = sorted(_stat(self.path, name) for name in names if not is_junk(name))
        return hashlib.sha256(b"".join(stats)).hexdigest()

    def rows(self, indices: np.ndarray) -> Iterator[Row]:
        for index in indices.tolist():
            winner = self._winners[index]
            loser = self._losers.get(winner.stem, Path("loser") / winner.name)
            captions = (f"{winner.stem}.txt", f"winner/{winner.stem}.txt")
            name = next((name for name in captions if (self.path / name).is_file()), None)
            data, problem = (None, "") if name is None else read_file(self.path, name, "caption", MAX_CAPTION_BYTES)
            value = {
                "winner": f"winner/{winner.name}",
                "loser": f"loser/{loser.name}",
                "caption": None if data is None else decode_row(data),
            }
            row = path_row(index, winner.name, value, self.path)
            yield replace(row, error=problem, detail=str(name)) if problem and not row.error else row


def path_row(index: int, where: str, value: dict[str, Any], root: Path) -> Row:
    """A row whose pictures are paths below ``root``; what is wrong with a path becomes the row's ``error``."""
    named = "winner" in value or "loser" in value
    first, second = ("winner", "loser") if named else ("image_0", "image_1")
    images, error, detail = [], "", ""
    for name in (first, second):
        data, problem = read_image(root, value.get(name))
        images.append(data)
        if problem and not error:
            error, detail = problem, f"{name}: {value.get(name)}"
    label = 1.0 if named else value.get("label_0")
    rest: dict[str, Any] = {} if named else {name: value.get(name) for name in ("label_1", "has_label")}
    return Row(index, where, images[0], images[1], value.get("caption"), label, error=error, detail=detail, **rest)


def read_image(root: Path, name: Any) -> tuple[bytes | None, str]:
    """Bytes of a picture below ``root``, or what is wrong: a path (or link) that leads outside is never followed."""
    return read_file(root, name, "image", MAX_IMAGE_BYTES)


def read_file(root: Path, name: Any, kind: str, limit: int) -> tuple[bytes | None, str]:
    """Bytes of a file below ``root`` of at most ``limit`` bytes, or what is wrong with the ``kind`` of file."""
    if not isinstance(name, str) or not name.strip():
        return None, f"no {kind} path"
    try:
        base = root.resolve()
        file = (base / name).resolve()
        if base not in file.parents:
            return None, f"{kind} path leaves the directory of the records"
        if not file.is_file():
            return None, f"{kind} file is missing"
        if file.stat().st_size > limit:
            return None, f"{kind} file is too large"
        return file.read_bytes(), ""
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return None, f"{kind} file cannot be read"


def is_junk(name: str) -> bool:
    """Whether a file manager left this: AppleDouble (``._NAME``) and other hidden files, ``__MACOSX/``, Thumbs.db."""
    parts = [part for part in name.lower().split("/") if part not in ("", ".", "..")]
    return any(part.startswith(".") or part in _LEFT_BY_FILE_MANAGERS for part in parts)


def picture_files(folder: Path) -> list[Path]:
    """The picture files of a folder, by name."""
    found = (file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(file for file in found if not is_junk(file.name) and not file.is_dir())


def by_stem(files: list[Path]) -> dict[str, Path]:
    """Files by their names without suffix, in their order; :class:`UserError` if two share one, e.g. n0.jpg, n0.png."""
    named: dict[str, Path] = {}
    for file in files:
        other = named.setdefault(file.stem, file)
        if other is not file:
            raise UserError(
                f"two pictures are called {file.stem}", str(file.parent), f"{other.name}, {file.name}: keep one"
            )
    return named


def _check_utf8(path: Path) -> None:
    with path.open("rb") as stream:
        encoding, _ = encoding_of(stream.read(4))
    if encoding != "utf-8":
        raise UserError(f"the file is in {encoding.upper()}", str(path), "save it as UTF-8")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            yield offset, line
            offset += len(line)


def _counted(path: Path, consumed: list[int]) -> Iterator[str]:
    # csv.reader takes exactly the lines of one record, so what is consumed after it is where the next one starts.
    for offset, line in _lines(path):
        consumed[0] = offset + len(line)
        if not offset:
            line = line.removeprefix(codecs.BOM_UTF8)  # before a quoted name it would be part of the name
        yield line.decode("utf-8", "surrogateescape")


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    for line in lines:
        yield line.decode("utf-8", "surrogateescape")


def _stat(root: Path, name: str) -> bytes:
    try:
        stat = os.stat(root / name)
        state = f"{stat.st_size} {stat.st_mtime_ns}"
    except (OSError, ValueError):
        state = "missing"
    return f"{name}\0{state}\n".encode("utf-8", "surrogatepass")
