"""The directory of a store while it is made: who may write it, what is done already, and waiting for other ranks.

``work/start.json`` names the job. A scan segment is ``work/scan-N``; a finished shard is in the journal as
``work/KIND-N`` with the size and sha256 of its files. Each is sealed and appears whole or not at all, so a killed run
continues with the first one missing, and makes again what is damaged. ``manifest.json`` is written last and ``work/``
removed: only then is the directory a store.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.atomic import (
    TEMPORARY,
    make_directory,
    read_sealed,
    remove_temporaries,
    table_bytes,
    write_json,
    write_sealed,
)
from fastpref.data import manifest
from fastpref.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

STALL_SECONDS = 1800.0
_POLL_SECONDS = 0.1
_CLEARING = "being cleared"


@dataclass(frozen=True)
class Ranks:
    """This process among those of the launcher (environment RANK, WORLD_SIZE, LOCAL_RANK)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_env(cls) -> Ranks:
        """Ranks as torchrun and deepspeed set them; one process without."""
        try:
            rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            local_rank = int(os.environ.get("LOCAL_RANK", rank))
        except ValueError as error:
            raise UserError("RANK, WORLD_SIZE or LOCAL_RANK is no number", "environment", str(error)) from error
        if not 0 <= rank < size:
            raise UserError(f"RANK is {rank} of WORLD_SIZE {size}", "environment", "use a launcher or unset both")
        return cls(rank, size, local_rank)

    def share(self, items: list[Any]) -> list[tuple[int, Any]]:
        """Every ``size``-th numbered item, starting with the rank's own."""
        return list(enumerate(items))[self.rank :: self.size]


class Workspace:
    """A store directory that this job may fill."""

    def __init__(self, path: Path, fingerprint: str, ranks: Ranks) -> None:
        self.path, self.work, self.ranks = path, path / manifest.WORK, ranks
        self._fingerprint = fingerprint
        self._started = time.time()

    def claim(self, overwrite: bool) -> bool:
        """Get ready to write; False if the finished store of this very job is there already.

        Raises:
            UserError: a store of other settings without ``overwrite``, a directory that is no store, or not writable.
        """
        if self.ranks.rank:
            return self._join(overwrite)
        if self.path.exists() and not self.path.is_dir():
            raise UserError("the store's path is a file", str(self.path), "give a directory")
        if finished := self.finished_as():
            if finished == self._fingerprint and not overwrite:
                self.remove_work()
                return False
            if not overwrite:
                todo = "give another store, or overwrite=true to replace it"
                raise UserError(
                    "a store of other records, model or settings, or of another fastpref, is there",
                    str(self.path),
                    todo,
                )
            self._clear()
        elif self.work.is_dir():
            self._resume(overwrite)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise UserError("the directory is not empty and not a store", str(self.path), "give another one")
        make_directory(self.work)
        write_json(self.work / manifest.START, {"fingerprint": self._fingerprint})
        return True

    def finished_as(self) -> str | None:
        """The fingerprint of the finished store that is there ('unknown' if its manifest is damaged), or None."""
        file = self.path / manifest.MANIFEST
        if not file.is_file() or f'"{manifest.FORMAT}"' not in file.read_text(encoding="utf-8", errors="replace"):
            return None
        return str(_read(file).get("fingerprint") or "unknown")

    def _resume(self, overwrite: bool) -> None:
        started = _read(self.work / manifest.START).get("fingerprint")
        if started is None:
            # Killed before start.json was whole: then there is nothing else either.
            if any(
                not file.name.endswith(TEMPORARY)
                for file in [*self.work.iterdir(), *self.path.iterdir()]
                if file != self.work
            ):
                raise UserError("the directory is not empty and not a store", str(self.path), "give another one")
            return
        if started == self._fingerprint:
            return
        begun = any(self.work.glob("text-*")) or any(self.work.glob("image-*"))
        if started != _CLEARING and begun and not overwrite:
            todo = "give another store, or overwrite=true to start again"
            raise UserError(
                "an unfinished store of other records, model or settings, or of another fastpref, is there",
                str(self.path),
                todo,
            )
        self._clear()

    def _join(self, overwrite: bool) -> bool:
        """Ranks above 0 wait for rank 0's decision."""
        file = self.path / manifest.MANIFEST

        def ready() -> bool:
            return finished() or _read(self.work / manifest.START).get("fingerprint") == self._fingerprint

        def finished() -> bool:
            if self.finished_as() != self._fingerprint:
                return False
            return not overwrite or file.stat().st_mtime >= self._started

        deadline = time.monotonic() + STALL_SECONDS
        while not ready():
            if time.monotonic() > deadline:
                raise UserError("rank 0 did not start the store", str(self.path), "start all ranks of WORLD_SIZE")
            time.sleep(_POLL_SECONDS)
        return not finished()

    def _clear(self) -> None:
        """Remove what prepare wrote, and nothing else; if killed on the way, the directory counts as unfinished."""
        make_directory(self.work)
        write_json(self.work / manifest.START, {"fingerprint": _CLEARING})
        (self.path / manifest.MANIFEST).unlink(missing_ok=True)
        for name in (manifest.PAIRS, manifest.IMAGES, manifest.CAPTIONS, manifest.REJECTED):
            (self.path / name).unlink(missing_ok=True)
        for kind in manifest.SHARD_KINDS:
            for shard in self.path.glob(f"{kind}-[0-9]*.safetensors"):
                shard.unlink()
        for file in self.work.iterdir():
            if file.name != manifest.START:
                file.unlink()

    def remove_work(self) -> None:
        """Remove the scan, the journal and temporary files."""
        remove_temporaries(self.path)
        shutil.rmtree(self.work, ignore_errors=True)

    def scan_file(self, number: int) -> Path:
        """The table of a scan segment."""
        return self.work / f"scan-{number:05d}"

    def write_scan(self, number: int, table: pa.Table) -> None:
        """Put down a scan segment."""
        write_sealed(self.scan_file(number), table_bytes(table))

    def read_scan(self, number: int) -> pa.Table:
        """The scan segment that is there; :class:`UserError` if it is damaged."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pq.read_table(pa.BufferReader(read_sealed(self.scan_file(number))))

    def is_scanned(self, number: int) -> bool:
        """Whether the scan segment is there, undamaged."""
        return _sealed(self.scan_file(number)) is not None

    def journal(self, kind: str, number: int) -> Path:
        """The journal entry of a finished 'text' or 'image' shard."""
        return self.work / f"{kind}-{number:05d}"

    def write_journal(
        self, kind: str, number: int, files: dict[str, Any], rows: list[int], failed: dict[int, str]
    ) -> None:
        """Note that a shard is finished: its files, the row of each item (-1: failed), and why some failed."""
        entry = {"files": files, "rows": rows, "failed": {str(k): v for k, v in sorted(failed.items())}}
        write_sealed(self.journal(kind, number), json.dumps(entry).encode())

    def read_journal(self, kind: str, number: int) -> dict[str, Any]:
        """What :meth:`write_journal` noted; :class:`UserError` if it is damaged."""
        return json.loads(read_sealed(self.journal(kind, number)))

    def is_encoded(self, kind: str, number: int) -> bool:
        """Whether the shard is finished and its files are as the journal says."""
        noted = _sealed(self.journal(kind, number))
        return noted is not None and all(
            _sha256(self.path / name) == entry["sha256"] for name, entry in json.loads(noted)["files"].items()
        )

    def beat(self) -> None:
        """Tell the other ranks that this one is alive."""
        if self.ranks.size > 1:
            (self.work / f"alive-{self.ranks.rank}").touch()

    def wait_for(self, files: list[Path]) -> None:
        """Wait until all ``files`` exist.

        Raises:
            UserError: nothing new and no sign of life from any other rank for half an hour.
        """
        missing = [file for file in files if not file.is_file()]
        last, seen = time.monotonic(), None
        while missing:
            time.sleep(_POLL_SECONDS)
            missing = [file for file in missing if not file.is_file()]
            others = [file for file in self.work.glob("alive-*") if file.name != f"alive-{self.ranks.rank}"]
            state = (len(missing), max((file.stat().st_mtime for file in others), default=0.0))
            if state != seen:
                last, seen = time.monotonic(), state
            elif time.monotonic() - last > STALL_SECONDS:
                todo = "is every rank of WORLD_SIZE running? run prepare again: it resumes"
                raise UserError(
                    f"{len(missing)} parts of other ranks are missing, e.g. {missing[0].name}", str(self.path), todo
                )


def _sealed(path: Path) -> bytes | None:
    """The content of a sealed file; None if there is none or it is damaged."""
    try:
        return read_sealed(path)
    except (FileNotFoundError, UserError):
        return None


def _sha256(path: Path) -> str | None:
    """None if the file cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none (yet)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
