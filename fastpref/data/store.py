"""A prepared store: memory-mapped shards, columnar index, batches by position."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open

from fastpref.data import manifest as files
from fastpref.data.checksums import PREFIX, row_checksums
from fastpref.data.manifest import StoreManifest, read_manifest, shard_name
from fastpref.errors import UserError

_OPEN_SHARDS = 4096
_REMEDY = "copy it again or run 'fastpref prepare' with overwrite=true"


@dataclass(frozen=True)
class StoreBatch:
    """n pairs of one bucket, on the CPU, in the store's dtypes; None for what the store or the family does not have."""

    latents_w: torch.Tensor  # (n, C, H, W), shifted and scaled as the UNet takes them
    latents_l: torch.Tensor
    posterior_std_w: torch.Tensor | None  # (n, C, H, W), scaled: latents + std * normal is a posterior sample
    posterior_std_l: torch.Tensor | None
    prompt_embeds: torch.Tensor  # (n, L, D)
    pooled_prompt_embeds: torch.Tensor | None  # (n, P)
    time_ids_w: torch.Tensor | None  # (n, 6) fp32: the file's height, width, crop top, left, target height, width
    time_ids_l: torch.Tensor | None
    clip_text: torch.Tensor | None  # (n, E) fp32, unit norm
    clip_image_w: torch.Tensor | None
    clip_image_l: torch.Tensor | None
    label: torch.Tensor  # (n,) fp32: probability that the winner is preferred; 0.5 for ties under ties=half


@dataclass(frozen=True)
class ClipBatch:
    """CLIP embeddings of n pairs, each (n, E) fp32 of unit norm."""

    text: torch.Tensor
    image_w: torch.Tensor
    image_l: torch.Tensor


class Gathered:
    """Rows of a table by pair, not copied until they are asked for: ``gathered[indices]``."""

    def __init__(self, table: np.ndarray, rows: np.ndarray) -> None:
        self._table, self._rows = table, rows
        self.shape, self.dtype = (len(rows), table.shape[1]), table.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: np.ndarray | slice) -> np.ndarray:
        return self._table[self._rows[indices]]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


class Store:
    """Random access to prepared pairs. Opening reads the index only; shards are mapped when first used.

    Every row that is read is compared with its checksum.
    """

    def __init__(self, path: Path, manifest: StoreManifest) -> None:
        self.path, self.manifest = path, manifest
        self._shards: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()
        # the captions first: decoding text takes three times what it leaves
        self._captions, self._caption_shard, self._caption_row = self._columns(
            files.CAPTIONS, "caption", "shard", "row"
        )
        pa.default_memory_pool().release_unused()
        pairs = self._columns(files.PAIRS, "record", "image_w", "image_l", "caption", "label", "bucket")
        self.record, self._image_w, self._image_l, self._caption, self._label, bucket = pairs
        if manifest.ties == "keep":
            self._label = np.ones_like(self._label)
        self.bucket_ids = bucket.astype(np.int64)
        images = self._columns(files.IMAGES, "shard", "row", "bucket", "height", "width", "crop_top", "crop_left")
        self._image_shard, self._image_row, self._image_bucket, *self._sizes_and_crops = images
        self._is_xl = manifest.family == "sdxl"

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Store:
        """Open a finished store.

        Args:
            path: its directory.
            verify: also compare the sha256 of every file (reads the whole store); otherwise sizes and the sha256 of
                the index are compared.

        Raises:
            UserError: not a store, unfinished, another format version, or a file is missing or damaged.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for name, entry in manifest.files.items():
            file = path / name
            if not file.is_file():
                raise UserError(f"the store's file {name} is missing", str(path), _REMEDY)
            if file.stat().st_size != entry.bytes:
                todo = f"{file.stat().st_size} bytes instead of {entry.bytes}: {_REMEDY}"
                raise UserError(f"the store's file {name} is damaged", str(path), todo)
        store = cls(path, manifest)
        if verify:
            store.verify()
        return store

    def verify(self) -> None:
        """Compare the sha256 of every file; :class:`UserError` names the first that differs."""
        for name in self.manifest.files:
            self._verify_file(name)

    def check_model(self, model_fingerprint: str, family: str) -> None:
        """Raise :class:`UserError` if the store was made with another VAE, text encoder or family."""
        if family != self.manifest.family:
            what = f"the store was made for {self.manifest.family}, the model is {family}"
            raise UserError(what, str(self.path), "prepare a store with this model")
        if model_fingerprint != self.manifest.model_fingerprint:
            what = "a store made for another model: its VAE, text encoders or tokenizers differ"
            raise UserError(what, str(self.path), "prepare a store with this model")

    def __len__(self) -> int:
        return len(self._label)

    def batch(self, indices: ArrayLike, flip: ArrayLike | None = None, *, sizes: bool = True) -> StoreBatch:
        """The pairs at ``indices`` (n,), all of one bucket.

        Args:
            indices: positions in ``[0, len(store))``; a repeated one is returned repeatedly.
            flip: (n,) booleans, the pairs whose mirrored pictures are wanted; needs a store with ``flips``.
            sizes: the time ids of the pictures too (SDXL).

        Raises:
            ValueError: no or out-of-range indices, several buckets, or ``flip`` without stored flips.
            UserError: a shard cannot be read or a row of it is damaged.
        """
        at = np.asarray(indices, dtype=np.int64).reshape(-1)
        mirrored = np.zeros(len(at), dtype=bool) if flip is None else np.asarray(flip, dtype=bool).reshape(-1)
        self._check(at, mirrored)
        bucket = int(self.bucket_ids[at[0]])
        image_w, image_l, caption = self._image_w[at], self._image_l[at], self._caption[at]
        has_clip, is_xl = self.manifest.clip_fingerprint is not None, self._is_xl
        posterior = self.manifest.posterior
        return StoreBatch(
            latents_w=self._latents("latents", bucket, image_w, mirrored),
            latents_l=self._latents("latents", bucket, image_l, mirrored),
            posterior_std_w=self._latents("posterior_std", bucket, image_w, mirrored) if posterior else None,
            posterior_std_l=self._latents("posterior_std", bucket, image_l, mirrored) if posterior else None,
            prompt_embeds=self._text("text", "prompt_embeds", caption),
            pooled_prompt_embeds=self._text("text", "pooled_prompt_embeds", caption) if is_xl else None,
            time_ids_w=self._time_ids(image_w) if is_xl and sizes else None,
            time_ids_l=self._time_ids(image_l) if is_xl and sizes else None,
            clip_text=self._text("clip-text", "clip_text", caption) if has_clip else None,
            clip_image_w=self._images("clip-image", f"clip_image.{bucket}", image_w) if has_clip else None,
            clip_image_l=self._images("clip-image", f"clip_image.{bucket}", image_l) if has_clip else None,
            label=torch.from_numpy(self._label[at]),
        )

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels of the bucket of the pair at ``index``."""
        width, height = self.manifest.buckets[self.bucket_ids[index]]
        return height, width

    def time_ids(self, indices: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        """What SDXL would be told of the pictures of the pairs at ``indices``: winners and losers, each (n, 6) fp32."""
        at = np.asarray(indices, dtype=np.int64)
        return self._time_ids(self._image_w[at]), self._time_ids(self._image_l[at])

    def clip_batch(self, indices: ArrayLike) -> ClipBatch:
        """The CLIP rows of the pairs at ``indices`` (n,), all of one bucket, without reading latents.

        Raises:
            UserError: the store has no CLIP embeddings.
        """
        if self.manifest.clip_fingerprint is None:
            raise UserError("the store has no CLIP embeddings", str(self.path), "prepare it with clip=FOLDER")
        at = np.asarray(indices, dtype=np.int64).reshape(-1)
        self._check(at, np.zeros(len(at), dtype=bool))
        name = f"clip_image.{int(self.bucket_ids[at[0]])}"
        return ClipBatch(
            text=self._text("clip-text", "clip_text", self._caption[at]),
            image_w=self._images("clip-image", name, self._image_w[at]),
            image_l=self._images("clip-image", name, self._image_l[at]),
        )

    def empty_prompt(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``prompt_embeds (1, L, D)`` and, for SDXL, ``pooled_prompt_embeds (1, P)`` of the empty prompt."""
        empty = np.zeros(1, dtype=np.int64)
        pooled = self._text("text", "pooled_prompt_embeds", empty) if self._is_xl else None
        return self._text("text", "prompt_embeds", empty), pooled

    def clip_text_all(self) -> Gathered:
        """CLIP text embeddings of all pairs, ``(len, E)`` fp32: one row a distinct caption in memory.

        Raises:
            UserError: the store has no CLIP embeddings.
        """
        if self.manifest.clip_fingerprint is None:
            raise UserError("the store has no CLIP embeddings", str(self.path), "prepare it with clip=FOLDER")
        shards = range(int(self._caption_shard[-1]) + 1)
        parts = [self._rows("clip-text", n, "clip_text") for n in shards]
        starts = np.cumsum([0, *map(len, parts)])
        return Gathered(torch.cat(parts).numpy(), (starts[self._caption_shard] + self._caption_row)[self._caption])

    def captions(self, indices: ArrayLike) -> list[str]:
        """The captions of the pairs at ``indices``."""
        return self._captions.take(pa.array(self._caption[np.asarray(indices, dtype=np.int64)])).to_pylist()

    def pairs_per_caption(self, indices: ArrayLike) -> np.ndarray:
        """(n,) how many pairs of the store have the caption of each of the pairs at ``indices``."""
        return np.bincount(self._caption)[self._caption[np.asarray(indices, dtype=np.int64)]]

    def _check(self, at: np.ndarray, mirrored: np.ndarray) -> None:
        if not len(at) or at.min() < 0 or at.max() >= len(self):
            raise ValueError(f"indices must be in [0, {len(self)}) and not empty")
        if len(mirrored) != len(at):
            raise ValueError(f"flip has {len(mirrored)} entries for {len(at)} indices")
        if mirrored.any() and not self.manifest.flips:
            raise ValueError("the store has no mirrored latents: prepare it with flips=true")
        if (self.bucket_ids[at] != self.bucket_ids[at[0]]).any():
            raise ValueError("a batch is of one bucket")

    def _latents(self, name: str, bucket: int, images: np.ndarray, mirrored: np.ndarray) -> torch.Tensor:
        if not mirrored.any():
            return self._images("latents", f"{name}.{bucket}", images)
        if mirrored.all():
            return self._images("latents", f"{name}_flipped.{bucket}", images)
        flipped = self._images("latents", f"{name}_flipped.{bucket}", images[mirrored])
        straight = self._images("latents", f"{name}.{bucket}", images[~mirrored])
        out = straight.new_empty((len(images), *straight.shape[1:]))
        chosen = torch.from_numpy(mirrored)
        out[chosen], out[~chosen] = flipped, straight
        return out

    def _time_ids(self, images: np.ndarray) -> torch.Tensor:
        target = np.asarray(self.manifest.buckets, dtype=np.float32)[self._image_bucket[images]]
        columns = [column[images] for column in self._sizes_and_crops]
        return torch.from_numpy(np.stack([*columns, target[:, 1], target[:, 0]], axis=1).astype(np.float32))

    def _images(self, kind: str, name: str, images: np.ndarray) -> torch.Tensor:
        return self._gather(kind, name, self._image_shard[images], self._image_row[images])

    def _text(self, kind: str, name: str, captions: np.ndarray) -> torch.Tensor:
        return self._gather(kind, name, self._caption_shard[captions], self._caption_row[captions])

    def _gather(self, kind: str, name: str, shards: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        numbers = np.unique(shards)
        positions = torch.from_numpy(rows.astype(np.int64))
        if len(numbers) == 1:
            return self._rows(kind, int(numbers[0]), name, positions)
        out: torch.Tensor | None = None
        for number in numbers.tolist():
            where = torch.from_numpy(np.flatnonzero(shards == number))
            found = self._rows(kind, number, name, positions[where])
            if out is None:
                out = found.new_empty((len(rows), *found.shape[1:]))
            out[where] = found
        assert out is not None
        return out

    def _rows(self, kind: str, number: int, name: str, positions: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of the rows at ``positions`` (all without) of a tensor, each as its checksum says."""
        shard = shard_name(kind, number)
        tensors = self._shard(shard)
        try:
            places = torch.arange(len(tensors[name])) if positions is None else positions
            rows, sums = (tensors[key].index_select(0, places) for key in (name, PREFIX + name))
        except (KeyError, IndexError, RuntimeError) as error:
            raise UserError(f"the store's file {shard} lacks rows of {name}", str(self.path), _REMEDY) from error
        if row_checksums(shard, name, rows).tolist() != sums.tolist():
            todo = f"a row of {name} does not match its checksum: {_REMEDY}"
            raise UserError(f"the store's file {shard} is damaged", str(self.path), todo)
        return rows

    def _verify_file(self, name: str) -> None:
        with (self.path / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != self.manifest.files[name].sha256:
                todo = f"its sha256 differs: {_REMEDY}"
                raise UserError(f"the store's file {name} is damaged", str(self.path), todo)

    def _shard(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of a shard, mapped and not read; the least recently used is unmapped first."""
        if name in self._shards:
            self._shards.move_to_end(name)
            return self._shards[name]
        try:
            with safe_open(self.path / name, framework="pt") as shard:
                tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise UserError(f"the store's file {name} cannot be read", str(self.path), f"{error}: {_REMEDY}") from error
        self._shards[name] = tensors
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)
        return tensors

    def _columns(self, name: str, *columns: str) -> list[Any]:
        """Numbers as numpy arrays, texts as arrow's; one after another, in one thread: little is decoded at once."""
        try:
            self._verify_file(name)
            with pq.ParquetFile(self.path / name) as file:
                return [_values(file.read([column], use_threads=False).column(column)) for column in columns]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"the store's file {name} cannot be read", str(self.path), f"{error}: {_REMEDY}") from error


def _values(column: pa.ChunkedArray) -> Any:
    return column.to_numpy() if pa.types.is_primitive(column.type) else column
