"""The real images that pictures are held against: evaluation records (winners, losers) or two folders of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL.Image import Image

from fastpref.config import Config
from fastpref.data.images import ImageError, load_rgb, to_bucket
from fastpref.data.records import Record, open_records, read_captions, read_records
from fastpref.errors import UserError
from fastpref.evaluate.folders import CaptionedFile, check_apart, folder_fingerprint, read_folder

MIN_CAPTIONS = 4  # two to measure, two to hold them against


class Reals(Protocol):
    """Real images of the target and of the base style, by caption."""

    @property
    def captions(self) -> list[str]:
        """Distinct captions to draw and measure; of folders those that both styles have."""

    def images(self, size: tuple[int, int], *, target: bool) -> Iterator[tuple[Image, str]]:
        """(Picture at ``size``, caption) of one style, streamed; of folders only pictures of ``captions``."""

    def fingerprint(self) -> str:
        """sha256 that changes when the images or captions do."""


@dataclass(frozen=True)
class RecordReals:
    """Preference records: winners are in the target style, losers in the base style; ties have no sides."""

    records: str
    max_pixels: int

    @cached_property
    def captions(self) -> list[str]:
        return read_captions(self.records)

    @property
    def _path(self) -> str:
        if self.records == "emoji":
            from fastpref.emoji import HELDOUT_PARQUET

            return str(HELDOUT_PARQUET)
        return self.records

    def images(self, size: tuple[int, int], *, target: bool) -> Iterator[tuple[Image, str]]:
        for record in read_records(self._path):
            if not isinstance(record, Record) or record.label == 0.5:
                continue
            try:
                image = load_rgb(record.winner if target else record.loser, self.max_pixels)
            except ImageError as error:
                where = f"{self._path}, {record.where}"
                raise UserError(error.reason, where, "evaluation needs every real image") from None
            yield to_bucket(image, size), record.caption

    def fingerprint(self) -> str:
        return open_records(self._path).fingerprint()


@dataclass(frozen=True)
class FolderReals:
    """Two folders of captioned pictures, matched by caption."""

    target: list[CaptionedFile]
    base: list[CaptionedFile]
    max_pixels: int

    @classmethod
    def open(cls, target: Path, base: Path, max_pixels: int) -> FolderReals:
        """Read both folders' captions.

        Raises:
            UserError: one folder inside the other, files in both, or too few captions in common.
        """
        check_apart(target, base)
        reals = cls(read_folder(target), read_folder(base), max_pixels)
        if len(reals.captions) < MIN_CAPTIONS:
            what = f"{len(reals.captions)} captions are in both folders, {MIN_CAPTIONS} are needed"
            examples = f"captions there: '{reals.target[0].caption[:40]}' and '{reals.base[0].caption[:40]}'"
            raise UserError(what, f"{target} and {base}", examples)
        twins = _twins(reals.target, reals.base)
        if twins:
            raise UserError(f"{twins[0]} and {twins[1]} are one picture", f"{target} and {base}", "it has one style")
        return reals

    @cached_property
    def captions(self) -> list[str]:
        known = {file.caption for file in self.base}
        return list(dict.fromkeys(file.caption for file in self.target if file.caption in known))

    def images(self, size: tuple[int, int], *, target: bool) -> Iterator[tuple[Image, str]]:
        common = set(self.captions)
        for file in self.target if target else self.base:
            if file.caption in common:
                yield to_bucket(file.load(self.max_pixels), size), file.caption

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(map(folder_fingerprint, (self.target, self.base))).encode()).hexdigest()


def _twins(target: list[CaptionedFile], base: list[CaptionedFile]) -> tuple[str, str] | None:
    """Names of a file of either folder with the same bytes; only files of one size are read."""
    by_size: dict[int, list[CaptionedFile]] = {}
    for file in target:
        by_size.setdefault(file.size(), []).append(file)
    for file in base:
        for other in by_size.get(file.size(), ()):
            if file.read() == other.read():
                return other.name, file.name
    return None


def open_reals(config: Config) -> Reals:
    """The real images of a config: ``eval_target_images`` and ``eval_base_images``, else ``eval_records``."""
    if config.eval_target_images is not None and config.eval_base_images is not None:
        target, base = Path(config.eval_target_images), Path(config.eval_base_images)
        return FolderReals.open(target, base, config.max_image_pixels)
    return RecordReals(config.eval_records, config.max_image_pixels)
