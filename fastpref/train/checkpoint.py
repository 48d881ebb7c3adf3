"""Checkpoints that are either whole or not there, and are checked before they are believed.

``checkpoints/step-NNNNNN/`` holds ``state.safetensors``, ``state.json`` and ``manifest.json`` with the sha256 of both.
It is written under another name, synced and renamed, so a kill at any moment leaves the one before it in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastpref.atomic import write_tensors
from fastpref.errors import UserError

FORMAT = 1
_FILES = ("state.safetensors", "state.json")
_NAME = re.compile(r"step-(\d{6,18})")


@dataclass
class Checkpoint:
    """What was saved after ``step`` optimizer steps."""

    path: Path
    step: int
    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


class DamagedCheckpoint(Exception):
    """A checkpoint directory whose contents are not what its manifest says."""


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], values: dict[str, Any], keep: int
) -> Path:
    """Write ``folder/step-NNNNNN`` atomically and drop all but the ``keep`` newest.

    Raises:
        UserError: the disk is full or cannot be written; what was there before stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, draft = folder / f"step-{step:06d}", folder / f".step-{step:06d}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        write_tensors(draft / "state.safetensors", tensors)
        (draft / "state.json").write_text(json.dumps({"step": step, **values}))
        hashes = {name: _sha256(draft / name) for name in _FILES}
        (draft / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": step, "sha256": hashes}))
        for file in (*draft.iterdir(), draft):
            _sync(file)
        if final.exists():
            shutil.rmtree(final)
        os.replace(draft, final)
        _sync(folder)
    except (OSError, UserError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        todo = f"{error}; the checkpoint before it is intact: make room, then go on with resume=auto"
        raise UserError("cannot write the checkpoint", str(final), todo) from error
    for old in checkpoint_folders(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        DamagedCheckpoint: a file is missing, cut short or altered.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in _FILES:
            if _sha256(path / name) != manifest["sha256"][name]:
                raise DamagedCheckpoint(f"{name} does not match its checksum")
        values = json.loads((path / "state.json").read_text())
        if not manifest["step"] == values["step"] == _step(path):
            raise DamagedCheckpoint(f"manifest.json says step {manifest['step']}, state.json {values['step']}")
        return Checkpoint(path, int(manifest["step"]), load_file(path / "state.safetensors"), values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
