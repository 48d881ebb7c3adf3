"""The undamaged originals: tiny models, records of every kind, pictures, stores whole and unfinished, and runs."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageCms, features
from safetensors.torch import load_file

from fastpref.config import Config, load_config
from fastpref.data import encode
from fastpref.data.prepare import prepare
from fastpref.data.store import Store, StoreBatch
from fastpref.models.lora_file import WEIGHTS_NAME
from fastpref.runs import run_training

PAIRS = 6
STEPS = 3  # of a run that is resumed; it was interrupted one step before
METHODS = ("dpo", "rpo", "spo")
_SCORER = '''
"""A scorer for step-wise runs: brightness and contrast."""

def bright(images, prompts, t):
    return 1500 * images.mean(dim=(1, 2, 3)) + 800 * images.std(dim=(1, 2, 3))
'''


@dataclass(frozen=True)
class World:
    """Everything below ``root``, made once; nothing of it is ever changed."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> World:
        """Fill ``root`` and put it on Python's path, for the scorer in it."""
        from fastpref.emoji.random_models import make_random_clip, make_random_sdxl

        world = cls(root)
        make_random_sdxl(root / "model", vae_factor=2)
        make_random_clip(root / "clip")
        (root / "fuzz_scorer.py").write_text(_SCORER)
        sys.path.insert(0, str(root))
        _write_records(root)
        prepare(world.config(store=root / "store"), progress=False)
        for name, calls in (("early", 1), ("late", 10**9)):
            with _interrupted(calls):
                prepare(world.config(store=root / name, shard_size=4, prepare_batch_size=4), progress=False)
        prepare(world.config(store=root / "whole", shard_size=4, prepare_batch_size=4), progress=False)
        for method in METHODS:
            run_training(world.run_config(method, root / "runs", STEPS - 1))
            run_training(world.run_config(method, root / "finished", STEPS))
        return world

    def settings(self, **more: Any) -> dict[str, Any]:
        """A small recipe on the world's models."""
        base = {
            **{"model": self.root / "model", "clip": self.root / "clip", "records": self.root / "records.parquet"},
            **{"store": self.root / "store", "resolution": 16, "evaluate": False, "tracker": "none", "device": "cpu"},
            **{"batch_size": 2, "lora_rank": 2, "max_reject_share": 0.6, "checkpoint_every": 1},
        }
        return {key: str(value) if isinstance(value, Path) else value for key, value in (base | more).items()}

    def config(self, **more: Any) -> Config:
        """:meth:`settings` as a config."""
        return load_config("", [f"{key}={json.dumps(value)}" for key, value in self.settings(**more).items()])

    def run_config(self, method: str, output_dir: Path, steps: int) -> Config:
        """A run that has every kind of state: an EMA, an optimizer, for SPO a round that is not trained through."""
        return self.config(**self.run_settings(method), output_dir=output_dir, steps=steps, resume="auto")

    def run_settings(self, method: str) -> dict[str, Any]:
        """What distinguishes the runs of the methods."""
        common = {"method": method, "name": method, "ema_decay": 0.5, "learning_rate": 1e-3}
        if method != "spo":
            return common
        return common | {
            **{"scorer": "fuzz_scorer:bright", "sample_steps": 4, "plain_steps": 1, "candidates": 2, "batch_size": 2},
            **{"rollout_prompts": 2, "score_threshold": 0.01, "guidance_scale": 3.0},
        }

    @cached_property
    def content(self) -> dict[tuple[bytes, bytes, str], dict[str, torch.Tensor]]:
        """What the undamaged store holds, by pair."""
        return store_content(self.root / "store")

    @cached_property
    def whole(self) -> dict[str, bytes]:
        """The bytes of the store that the unfinished ones would have become."""
        return {file.name: file.read_bytes() for file in (self.root / "whole").iterdir()}

    @cached_property
    def final(self) -> dict[str, dict[str, torch.Tensor]]:
        """The weights of the uninterrupted runs."""
        return {method: load_file(self.root / "finished" / method / WEIGHTS_NAME) for method in METHODS}

    @cached_property
    def pictures(self) -> dict[str, bytes]:
        """Pictures in every format and mode that is read."""
        return _pictures()


def store_content(path: Path) -> dict[tuple[bytes, bytes, str], dict[str, torch.Tensor]]:
    """Everything that training reads of a store: tensors of each pair by the hashes of its pictures and its caption."""
    store = Store.open(path)
    keys = pq.read_table(path / "images.parquet", columns=["sha256"]).column(0).to_pylist()
    empty = dict(enumerate(t for t in store.empty_prompt() if t is not None))
    found = {}
    for index in range(len(store)):
        batch: StoreBatch = store.batch([index])
        tensors = {name: value for name, value in vars(batch).items() if value is not None}
        tensors |= {f"empty.{n}": value for n, value in empty.items()}
        tensors["bucket"] = torch.tensor(store.bucket_ids[index])
        pair = (keys[store._image_w[index]], keys[store._image_l[index]], store.captions([index])[0])
        found[pair] = tensors
    return found


@contextmanager
def _interrupted(calls: int) -> Iterator[None]:
    """``prepare`` ends by a Ctrl-C: in the encoder after so many batches of pictures, at the latest by the index."""
    from fastpref.data import prepare as module

    images, finish, seen = encode.Encoders.images, module.finish, [0]

    def stopping(self: Any, pictures: Any) -> Any:
        seen[0] += 1
        if seen[0] > calls:
            raise KeyboardInterrupt
        return images(self, pictures)

    def unfinished(*_: Any) -> Any:
        raise KeyboardInterrupt

    encode.Encoders.images, module.finish = stopping, unfinished  # type: ignore[method-assign]
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        encode.Encoders.images, module.finish = images, finish  # type: ignore[method-assign]


def picture(seed: int, size: tuple[int, int] = (16, 16), kind: str = "PNG", mode: str = "RGB", **save: Any) -> bytes:
    """A smooth coloured picture, encoded."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    image, buffer = coarse.resize(size, Image.Resampling.BICUBIC).convert(mode), io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


def _pictures() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("P", (16, 16), n) for n in range(3)]
    # half the blue of sRGB: its pixels move
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    at = srgb.index(b"bXYZ")
    start = int.from_bytes(srgb[at + 4 : at + 8], "big") + 8
    profile = srgb[:start] + bytes(b // 2 for b in srgb[start : start + 12]) + srgb[start + 12 :]
    sixteen = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
    buffer = io.BytesIO()
    sixteen.save(buffer, "PNG")
    deep = io.BytesIO()
    sixteen.save(deep, "TIFF")
    modes = {"PNG": ("RGB", "RGBA", "P", "L", "LA", "1"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA")}
    modes |= {"AVIF": ("RGB", "RGBA")} if features.check("avif") else {}
    modes |= {"BMP": ("RGB", "P", "1"), "TIFF": ("RGB", "RGBA", "L", "CMYK", "LAB"), "GIF": ("P",)}
    found = {f"{kind} {mode}": picture(1, kind=kind, mode=mode) for kind, group in modes.items() for mode in group}
    return found | {
        "PNG I;16": buffer.getvalue(),
        "JPEG turned": picture(2, (24, 16), "JPEG", exif=exif),
        "PNG turned": picture(2, (24, 16), "PNG", exif=exif),
        "JPEG progressive": picture(3, (64, 48), "JPEG", progressive=True),
        "TIFF I;16": deep.getvalue(),
        "TIFF turned": picture(2, (24, 16), "TIFF", exif=exif),
        "PNG profile": picture(2, kind="PNG", icc_profile=profile),
        "JPEG profile": picture(2, kind="JPEG", icc_profile=profile),
        "TIFF deflate": picture(4, kind="TIFF", compression="tiff_adobe_deflate"),
        "TIFF lzw": picture(4, kind="TIFF", compression="tiff_lzw"),
        "GIF animated": picture(5, kind="GIF", mode="P", save_all=True, append_images=frames),
        "WEBP lossless": picture(6, kind="WEBP", lossless=True),
    }


def make_rows() -> list[dict[str, Any]]:
    """Pick-a-Pic rows of pictures of their own; one tie, and one without a label."""
    rows = [
        {
            "jpg_0": picture(10 + 2 * i, kind="JPEG" if i % 2 else "PNG"),
            "jpg_1": picture(11 + 2 * i),
            "label_0": float(i % 2 == 0),
            "caption": f"a picture of number {i}, red; blue",
            "has_label": True,
        }
        for i in range(PAIRS)
    ]
    return [*rows, rows[0] | {"label_0": 0.5, "caption": "tie"}, rows[1] | {"has_label": False, "caption": "none"}]


def _write_records(root: Path) -> None:
    """The same pairs as parquet, arrow, tar, jsonl, csv and a folder."""
    rows = make_rows()
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, root / "records.parquet", row_group_size=3, write_page_checksum=True)
    with pa.OSFile(str(root / "records.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    _write_tar(root / "records.tar", rows)
    files = root / "files"
    for folder in ("winner", "loser"):
        (files / folder).mkdir(parents=True)
    lines = []
    for i, row in enumerate(rows[:PAIRS]):
        first = ("winner", "loser") if row["label_0"] else ("loser", "winner")
        names = [f"{folder}/{i}.png" for folder in first]
        for name, side in zip(names, ("jpg_0", "jpg_1"), strict=True):
            (files / name).write_bytes(row[side])
        (files / f"{i}.txt").write_text(row["caption"])
        line = {"image_0": names[0], "image_1": names[1], "label_0": row["label_0"], "caption": row["caption"]}
        lines.append(line)
    (files / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (files / "pairs.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _write_tar(path: Path, rows: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, row in enumerate(rows):
            rest = json.dumps({k: v for k, v in row.items() if not k.startswith("jpg")}).encode()
            for extension, data in (("jpg_0", row["jpg_0"]), ("jpg_1", row["jpg_1"]), ("json", rest)):
                info = tarfile.TarInfo(f"{i:03d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
