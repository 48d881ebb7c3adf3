"""The files of a set of preference pairs while it is made: shards in Pick-a-Pic's schema, a split each, resumable.

``work/start.json`` names the job and ``work/SPLIT/`` holds its finished shards, each whole or not there. When all are
there they move to ``SPLIT/``, and ``pairs.json``, written last, says that the set is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastpref.atomic import check_writable, make_directory, read_json, write_json, write_table
from fastpref.errors import UserError

SPLITS = ("train", "heldout")
MANIFEST, WORK, START = "pairs.json", "work", "start.json"
SHEET = "contact_sheet.png"
SCHEMA = pa.schema(
    {
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "caption": pa.string(),
        "has_label": pa.bool_(),
        "seed": pa.int64(),
        "winner_prompt": pa.string(),
    }
)


@dataclass(frozen=True)
class Pair:
    """Encoded pictures of one caption; ``winner_prompt`` is what the winner was drawn with."""

    winner: bytes
    loser: bytes
    caption: str
    seed: int
    winner_prompt: str

    def row(self) -> dict[str, Any]:
        """As a record. Which column the winner stands in changes from seed to seed, so position tells nothing."""
        from fastpref.models.prompt_book import prompt_id

        first = (prompt_id(self.caption) + self.seed) % 2 == 0
        images = (self.winner, self.loser) if first else (self.loser, self.winner)
        row: dict[str, Any] = {"jpg_0": images[0], "jpg_1": images[1], "label_0": float(first)}
        row |= {"label_1": float(not first), "caption": self.caption, "has_label": True}
        return row | {"seed": self.seed, "winner_prompt": self.winner_prompt}


class PairFiles:
    """A directory that one job may fill."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self._fingerprint = path, fingerprint

    def check(self, overwrite: bool) -> bool:
        """Whether there is anything to do; writes nothing.

        Raises:
            UserError: the directory cannot be written, is something else, or holds pairs of other settings.
        """
        check_writable(self.path)
        finished = read_json(self.path / MANIFEST).get("fingerprint")
        begun = read_json(self.path / WORK / START).get("fingerprint")
        known = finished or begun
        if self.path.is_dir() and any(self.path.iterdir()) and known is None:
            raise UserError("the directory is not empty and holds no pairs", str(self.path), "choose another place")
        if known is not None and known != self._fingerprint and not overwrite:
            todo = "choose another place, or --overwrite"
            raise UserError("pairs of other prompts, model or settings are there", str(self.path), todo)
        return overwrite or finished != self._fingerprint

    def claim(self, overwrite: bool) -> None:
        """Get ready to write; with ``overwrite`` what an earlier job of any settings wrote goes first."""
        if overwrite or read_json(self.path / WORK / START).get("fingerprint") not in (None, self._fingerprint):
            (self.path / MANIFEST).unlink(missing_ok=True)
            (self.path / SHEET).unlink(missing_ok=True)
            for name in (*SPLITS, WORK):
                shutil.rmtree(self.path / name, ignore_errors=True)
        make_directory(self.path / WORK)
        write_json(self.path / WORK / START, {"fingerprint": self._fingerprint})

    def missing(self, split: str, number: int) -> bool:
        """Whether a shard has still to be made."""
        return not any(folder.joinpath(_name(split, number)).is_file() for folder in self._folders(split))

    def write(self, split: str, number: int, pairs: Iterable[Pair]) -> None:
        """Write a shard in one step."""
        folder = self.path / WORK / split
        make_directory(folder)
        write_table(folder / _name(split, number), pa.Table.from_pylist([pair.row() for pair in pairs], schema=SCHEMA))

    def read(self, split: str, number: int, limit: int) -> list[Pair]:
        """The first ``limit`` pairs of a finished shard."""
        file = next(f for f in (folder / _name(split, number) for folder in self._folders(split)) if f.is_file())
        pairs = []
        for row in pq.read_table(file).slice(0, limit).to_pylist():
            first = row["label_0"] == 1.0
            winner, loser = (row["jpg_0"], row["jpg_1"]) if first else (row["jpg_1"], row["jpg_0"])
            pairs.append(Pair(winner, loser, row["caption"], row["seed"], row["winner_prompt"]))
        return pairs

    def finish(self, manifest: dict[str, Any]) -> None:
        """Put the shards in place and write ``pairs.json``."""
        for split in SPLITS:
            work, final = self._folders(split)
            for file in sorted(work.glob("*.parquet")):
                make_directory(final)
                os.replace(file, final / file.name)
        write_json(self.path / MANIFEST, manifest | {"fingerprint": self._fingerprint})
        shutil.rmtree(self.path / WORK)

    def _folders(self, split: str) -> tuple[Path, Path]:
        return self.path / WORK / split, self.path / split


def _name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.parquet"
