"""A folder of captioned pictures: ``metadata.jsonl`` (the ``datasets`` ImageFolder layout) or NAME.txt beside each."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastpref.data import files as data_files
from fastpref.data.files import IMAGE_SUFFIXES, MAX_CAPTION_BYTES, by_stem, read_file, read_image
from fastpref.data.images import ImageError, load_rgb
from fastpref.data.text import BOM, caption_of, caption_problem, decode, lines
from fastpref.errors import UserError

METADATA = "metadata.jsonl"
_CAPTION_KEYS = ("caption", "text", "prompt")
_TODO = f"write NAME.txt beside each picture, or a {METADATA} with file_name and caption"


@dataclass(frozen=True)
class CaptionedFile:
    """A picture's file below ``root``, not opened, and its caption."""

    root: Path
    name: str
    caption: str

    def read(self) -> bytes:
        """The encoded picture."""
        data, problem = read_image(self.root, self.name)
        if data is None:
            raise UserError(problem, str(self.root / self.name), "restore the file or take it out of the folder")
        return data

    def size(self) -> int:
        """Bytes of the file, 0 if there is none."""
        path = self.root / self.name
        return path.stat().st_size if path.is_file() else 0

    def load(self, max_pixels: int) -> Image.Image:
        """The upright RGB picture."""
        try:
            return load_rgb(self.read(), max_pixels)
        except ImageError as error:
            where = str(self.root / self.name)
            raise UserError(error.reason, where, error.detail or "take it out of the folder") from None


def picture_files(folder: Path) -> list[Path]:
    """The picture files of a folder, by name.

    Raises:
        UserError: no folder, or no pictures in it.
    """
    if not folder.is_dir():
        raise UserError("no such folder of pictures", str(folder), "give a folder of captioned pictures")
    files = data_files.picture_files(folder)
    if not files:
        raise UserError("there are no pictures in the folder", str(folder), f"looked for {', '.join(IMAGE_SUFFIXES)}")
    return files


def read_folder(folder: Path) -> list[CaptionedFile]:
    """The pictures of a folder with their captions, by file name; with ``metadata.jsonl`` those it names, in its order.

    Raises:
        UserError: no folder, no pictures, a picture without a caption, or a damaged ``metadata.jsonl``.
    """
    files = picture_files(folder)
    if (folder / METADATA).is_file():
        return _metadata(folder)
    found = [CaptionedFile(folder, file.name, _text(file.with_suffix(".txt"))) for file in by_stem(files).values()]
    bare = [entry.name for entry in found if not entry.caption]
    if bare:
        raise UserError(f"{len(bare)} of {len(files)} pictures have no caption, e.g. {bare[0]}", str(folder), _TODO)
    return found


def match_folders(winners: Path, losers: Path) -> list[tuple[CaptionedFile, CaptionedFile, int]]:
    """(winner, loser, number among those of one caption), in the winners' order."""
    captioned = [_has_captions(folder) for folder in (winners, losers)]
    if not any(captioned):
        todo = f"write NAME.txt beside each picture of one folder, or a {METADATA}"
        raise UserError("no captions in either folder", f"{winners} and {losers}", todo)
    first, second = (_read(f, has) for f, has in zip((winners, losers), captioned, strict=True))
    by_caption = all(captioned)
    if not by_caption:
        for side in (first, second):
            by_stem([file.root / file.name for file in side])
    pool: dict[str, list[CaptionedFile]] = {}
    for file in second:
        pool.setdefault(file.caption if by_caption else Path(file.name).stem, []).append(file)
    matched, used = [], dict.fromkeys(pool, 0)
    for file in first:
        key = file.caption if by_caption else Path(file.name).stem
        if used.get(key, 0) < len(pool.get(key, ())):
            other = pool[key][used[key]]
            caption = file.caption or other.caption
            winner = CaptionedFile(file.root, file.name, caption)
            matched.append((winner, CaptionedFile(other.root, other.name, caption), used[key]))
            used[key] += 1
    if not matched:
        by = "captions" if by_caption else "file names"
        what = (
            f"no {by} in common, e.g. '{first[0].caption or first[0].name}' and '{second[0].caption or second[0].name}'"
        )
        raise UserError(what, f"{winners} and {losers}", f"pictures are matched by {by}")
    return matched


def check_apart(first: Path, second: Path) -> None:
    """Raise :class:`UserError` if one folder is the other or inside it."""
    one, other = first.resolve(), second.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise UserError("the two folders overlap", f"{first} and {second}", "give two folders side by side")


def folder_fingerprint(files: list[CaptionedFile]) -> str:
    """sha256 of names, captions, sizes and modification times."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        path = file.root / file.name
        state = path.stat() if path.is_file() else None
        mark = (state.st_size, state.st_mtime_ns) if state else None
        digest.update(f"{file.name}\0{file.caption}\0{mark}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _metadata(folder: Path) -> list[CaptionedFile]:
    found = []
    try:
        text = decode((folder / METADATA).read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("cannot read the captions", str(folder / METADATA), str(error)) from None
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        where = f"{folder / METADATA}, line {number}"
        try:
            value: Any = json.loads(line.strip(BOM))
        except ValueError as error:
            raise UserError("the line is not JSON", where, str(error)) from None
        name = value.get("file_name") if isinstance(value, dict) else None
        caption = next((value[key] for key in _CAPTION_KEYS if value.get(key)), None) if name else None
        if not isinstance(name, str) or not isinstance(caption, str) or not caption_of(caption):
            raise UserError("no file_name or no caption", where, f"write file_name and {', '.join(_CAPTION_KEYS[:2])}")
        found.append(CaptionedFile(folder, name, _checked(caption, where)))
    if not found:
        raise UserError("the file names no pictures", str(folder / METADATA), _TODO)
    return found


def _text(file: Path) -> str:
    if not file.is_file():
        return ""
    data, problem = read_file(file.parent, file.name, "caption", MAX_CAPTION_BYTES)
    if data is None:
        raise UserError(problem, str(file), "put the caption itself into the folder")
    try:
        text = decode(data)
    except UnicodeDecodeError as error:
        raise UserError("cannot read the caption", str(file), str(error)) from None
    return _checked(text, str(file)) if caption_of(text) else ""


def _checked(caption: str, where: str) -> str:
    if problem := caption_problem(caption):
        raise UserError(problem, where, "write it in UTF-8")
    return caption_of(caption)


def _has_captions(folder: Path) -> bool:
    return (folder / METADATA).is_file() or any(file.with_suffix(".txt").is_file() for file in picture_files(folder))


def _read(folder: Path, captioned: bool) -> list[CaptionedFile]:
    return read_folder(folder) if captioned else [CaptionedFile(folder, f.name, "") for f in picture_files(folder)]
