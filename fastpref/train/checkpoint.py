"""Checkpoints that are either whole or not there, and are checked before they are believed.

``checkpoints/step-NNNNNN/`` holds ``state.json``, ``state.safetensors`` (of several ranks ``state.rankN.safetensors``
each) and ``manifest.json`` with the sha256 of all. It is written under another name, synced and renamed by rank 0 when
every rank has written, so a kill at any moment leaves the one before it in place. A rank saves whole tensors or pieces
of them; on loading they are joined, so the number of ranks may be another one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastpref.atomic import write_tensors
from fastpref.errors import UserError
from fastpref.train.engine import Piece, State
from fastpref.train.world import World

FORMAT = 1
_VALUES = "state.json"
_AT = "@"  # between the name of a tensor and the first element of a piece
_NAME = re.compile(r"step-(\d{6,18})")


@dataclass
class Checkpoint:
    """What was saved after ``step`` optimizer steps; a tensor is read when it is asked for."""

    path: Path
    step: int
    tensors: Mapping[str, torch.Tensor]
    values: dict[str, Any]


class DamagedCheckpoint(Exception):
    """A checkpoint directory whose contents are not what its manifest says."""


class Draft:
    """A checkpoint on its way: opened by all ranks, written by each, committed by all.

    Args:
        values: rank 0's count; they are kept as they are now.
        keep: newest checkpoints that stay. spared: the step of one that stays beside them.
    """

    def __init__(
        self, folder: Path, step: int, values: dict[str, Any], keep: int, world: World, spared: int | None = None
    ) -> None:
        self.step, self.keep, self.world, self.spared = step, keep, world, spared
        self.final, self.path = checkpoint_folder(folder, step), folder / f".step-{step:06d}.tmp"
        self._values = json.dumps({"step": step, **values})

    def open(self) -> None:
        """Make its directory, in place of what a kill has left of others."""
        with self.world.together(), _disk(self.path):
            if self.world.is_main:
                for leftover in self.final.parent.glob(".step-*.tmp"):
                    shutil.rmtree(leftover, ignore_errors=True)
                self.path.mkdir(parents=True)

    def write(self, tensors: State) -> str:
        """Put this rank's part on disk, without the others; its checksum."""
        with _disk(self.path):
            return _write(self.path / _shard(self.world.rank, self.world.size), tensors)

    def commit(self, checksum: str) -> None:
        """Once every rank has written: make it a checkpoint, and drop those that are too old."""
        hashes = {_shard(rank, self.world.size): found for rank, found in enumerate(self.world.objects(checksum))}
        with self.world.together(), _disk(self.path):
            if self.world.is_main:
                _commit(self.path, self.final, hashes, self._values)
                for old in checkpoint_folders(self.final.parent)[self.keep :]:
                    if _step(old) != self.spared:
                        shutil.rmtree(old, ignore_errors=True)

    def drop(self) -> None:
        """Leave nothing of it."""
        if self.world.is_main:
            shutil.rmtree(self.path, ignore_errors=True)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: State,
    values: dict[str, Any],
    keep: int,
    world: World | None = None,
    spared: int | None = None,
) -> Path:
    """Write ``folder/step-NNNNNN`` atomically and drop all but the ``keep`` newest. Every rank has to come here.

    Args:
        tensors: this rank's part. values: rank 0's count. spared: the step of one that is kept beside the newest.

    Raises:
        UserError: a rank cannot write; the checkpoints that were there stay, and every rank raises it.
    """
    draft = Draft(folder, step, values, keep, world or World(), spared)
    try:
        draft.open()
        with draft.world.together():
            checksum = draft.write(tensors)
        draft.commit(checksum)
    except UserError:
        draft.drop()
        raise
    return draft.final


def _write(path: Path, tensors: State) -> str:
    """One rank's shard; its checksum."""
    plain, shapes = {}, {}
    for name, value in tensors.items():
        if isinstance(value, Piece):
            plain[f"{name}{_AT}{value.start}"], shapes[name] = value.tensor, list(value.shape)
        else:
            plain[name] = value
    write_tensors(path, plain, {"shapes": json.dumps(shapes)} if shapes else None)
    return _sha256(path)


def _commit(draft: Path, final: Path, hashes: dict[str, str], values: str) -> None:
    for name in hashes:
        if not (draft / name).is_file():
            raise UserError(f"{name} is not there", str(draft), "every rank needs the same output_dir: share it")
    (draft / _VALUES).write_text(values)
    hashes = {**hashes, _VALUES: _sha256(draft / _VALUES)}
    manifest = {"format": FORMAT, "step": _step(final), "ranks": len(hashes) - 1, "sha256": hashes}
    (draft / "manifest.json").write_text(json.dumps(manifest))
    for file in (*draft.iterdir(), draft):
        _sync(file)
    if final.exists():
        shutil.rmtree(final)
    os.replace(draft, final)
    _sync(final.parent)


def load_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Open and verify one checkpoint; one rank's verdict is enough for all.

    Raises:
        DamagedCheckpoint: a file is missing, cut short or altered, or ranks' pieces do not make up a tensor.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        ranks = int(manifest.get("ranks", 1))
        shards = [_shard(rank, ranks) for rank in range(ranks)]
        for name in [*shards, _VALUES] if verify else []:
            if _sha256(path / name) != manifest["sha256"][name]:
                raise DamagedCheckpoint(f"{name} does not match its checksum")
        values = json.loads((path / _VALUES).read_text())
        if not manifest["step"] == values["step"] == _step(path):
            raise DamagedCheckpoint(f"manifest.json says step {manifest['step']}, {_VALUES} {values['step']}")
        return Checkpoint(path, int(manifest["step"]), _Joined([path / name for name in shards]), values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedCheckpoint(" ".join(str(error).split())) from error


def newest_intact(folder: Path) -> Iterator[Checkpoint | tuple[Path, str]]:
    """Walk from the newest checkpoint down: (path, fault) for each damaged one, then the first intact one, and stop."""
    for path in checkpoint_folders(folder):
        try:
            checkpoint = load_checkpoint(path)
        except DamagedCheckpoint as fault:
            yield path, str(fault)
            continue
        yield checkpoint
        return


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, newest first; unread."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def newest_step(folder: Path) -> int:
    """Optimizer steps of the newest checkpoint, 0 if there is none."""
    return max(map(_step, checkpoint_folders(folder)), default=0)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where ``folder`` has the checkpoint of ``step``."""
    return folder / f"step-{step:06d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _shard(rank: int, ranks: int) -> str:
    return "state.safetensors" if ranks == 1 else f"state.rank{rank}.safetensors"


@contextmanager
def _disk(where: Path) -> Iterator[None]:
    """What the disk refuses is told in one line."""
    try:
        yield
    except OSError as error:
        raise UserError("cannot write the checkpoint", str(where), error.strerror or str(error)) from error


class _Joined(Mapping[str, torch.Tensor]):
    """The ranks' tensors by name, read from disk one at a time."""

    def __init__(self, files: list[Path]) -> None:
        self._places: dict[str, list[tuple[int, Any, str]]] = {}
        self._shapes: dict[str, list[int]] = {}
        for file in files:
            opened = safe_open(file, framework="pt")
            shapes = json.loads((opened.metadata() or {}).get("shapes", "{}"))
            self._shapes |= shapes
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                name, _, start = key.rpartition(_AT) if key.rpartition(_AT)[0] in shapes else (key, "", "0")
                self._places.setdefault(name, []).append((int(start), opened, key))
        for name, shape in self._shapes.items():
            held = sum(opened.get_slice(key).get_shape()[0] for _, opened, key in self._places[name])
            if held != math.prod(shape):
                raise DamagedCheckpoint(f"{name}: {held} of {math.prod(shape)} elements are there")

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [opened.get_tensor(key) for _, opened, key in sorted(self._places[name], key=lambda part: part[0])]
        return torch.cat(parts).view(self._shapes[name]) if name in self._shapes else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
