"""What a store says about itself: ``manifest.json``, written last, and the names of the files beside it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fastpref.errors import UserError
from fastpref.models.caption_length import CutCaptions

FORMAT = "fastpref-store"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PAIRS = "pairs.parquet"
IMAGES = "images.parquet"
CAPTIONS = "captions.parquet"
REJECTED = "rejected.jsonl"
WORK = "work"
START = "start.json"
SHARD_KINDS = ("latents", "clip-image", "text", "clip-text")


class StoredFile(BaseModel):
    """Size in bytes and sha256 of a file of the store."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class StoreManifest(BaseModel):
    """The store's contents, and the settings it was prepared with."""

    model_config = ConfigDict(frozen=True)

    format: Literal["fastpref-store"] = "fastpref-store"
    format_version: int = FORMAT_VERSION
    fingerprint: str  # of records, models and settings
    records: str
    family: Literal["sdxl", "sd15"]
    model_fingerprint: str
    clip_fingerprint: str | None
    dtype: str  # latents
    text_dtype: str
    resolution: int
    vae_scale_factor: int
    latent_channels: int
    scaling_factor: float
    buckets: list[tuple[int, int]]  # width, height in pixels, of every bucket in use or not
    posterior: bool
    flips: bool
    ties: Literal["drop", "half", "keep"]
    max_caption_tokens: Literal[77, 150, 225] = 77  # the field is younger than the format
    cut: CutCaptions | None = None  # None: all captions fit, or nobody counted
    shard_size: int
    pairs: int
    images: int
    captions: int  # without the empty prompt
    source_records: int
    rejected: int
    ties_dropped: int
    identical_dropped: int = 0
    unlabelled: int
    reasons: dict[str, int]
    files: dict[str, StoredFile]
    sha256: str = ""  # of all the rest

    def digest(self) -> str:
        """What ``sha256`` has to be."""
        return _digest(self.model_dump(mode="json"))

    @property
    def total_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(file.bytes for file in self.files.values())


def _digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def shard_name(kind: str, number: int) -> str:
    """File name of a shard, e.g. ``latents-00003.safetensors``."""
    return f"{kind}-{number:05d}.safetensors"


def read_manifest(path: Path) -> StoreManifest:
    """The manifest of a finished store.

    Raises:
        UserError: no such directory, not a store, an unfinished or damaged one, or one of another format version.
    """
    file = path / MANIFEST
    if not path.is_dir():
        raise UserError("no such store", str(path), "make it with 'fastpref prepare'")
    if not file.is_file():
        if (path / WORK / START).is_file():
            raise UserError("the store is unfinished", str(path), "run 'fastpref prepare' again: it resumes")
        raise UserError("the directory is not a store", str(path), "make one with 'fastpref prepare'")
    try:
        text = file.read_text(encoding="utf-8")
        manifest = StoreManifest.model_validate_json(text)
    except (OSError, ValueError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError("the manifest is damaged or not a store's", str(file), first) from error
    for name in manifest.files:
        if Path(name).name != name:
            raise UserError(f"the manifest lists '{name}', outside the store", str(file), "prepare the store again")
    if manifest.format_version != FORMAT_VERSION:
        todo = f"this fastpref reads version {FORMAT_VERSION}: prepare the store again"
        raise UserError(f"the store has format version {manifest.format_version}", str(path), todo)
    if manifest.sha256 != _digest(json.loads(text)):  # of what is written: an older store has fewer fields
        todo = "its sha256 differs: copy the store again or prepare it again with overwrite=true"
        raise UserError("the manifest is damaged", str(file), todo)
    return manifest
