"""Preference records of the bundled world: ``python -m fastpref.emoji.records --npz emoji32.npz``.

Reads the pictures that ``fastpref.emoji.render`` made (arrays ``names``, ``flat``, ``mono``) and writes
``data/train.parquet`` and ``data/heldout.parquet`` in Pick-a-Pic's schema: ``jpg_0, jpg_1`` (image bytes, here lossless
WebP), ``label_0`` (1.0: jpg_0 preferred, 0.0: jpg_1), ``caption``, ``has_label``. Line art is preferred; which column
it stands in is a seeded coin.
"""

from __future__ import annotations

import argparse
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fastpref.emoji import DATA_DIR
from fastpref.emoji.concepts import caption_of, duplicate_clusters, select_concepts, split_heldout
from fastpref.errors import UserError

CONCEPTS = 740
HELDOUT = 88
SEED = 20240601


@dataclass(frozen=True)
class EmojiImages:
    """Captions and both pictures of each: ``flat`` and ``line`` are (N, 32, 32, 3) uint8."""

    captions: list[str]
    flat: np.ndarray
    line: np.ndarray


def encode_image(image: np.ndarray) -> bytes:
    """Lossless WebP bytes of an (H, W, 3) uint8 picture."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def decode_image(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8 picture of encoded bytes."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def records_table(images: EmojiImages, seed: int) -> pa.Table:
    """The Pick-a-Pic table of some pictures, one row a caption, in the order given."""
    first = np.random.default_rng(seed).random(len(images.captions)) < 0.5
    line = [encode_image(image) for image in images.line]
    flat = [encode_image(image) for image in images.flat]
    return pa.table(
        {
            "jpg_0": pa.array([a if f else b for a, b, f in zip(line, flat, first, strict=True)], pa.binary()),
            "jpg_1": pa.array([b if f else a for a, b, f in zip(line, flat, first, strict=True)], pa.binary()),
            "label_0": pa.array(first.astype(np.float64)),
            "caption": pa.array(images.captions, pa.string()),
            "has_label": pa.array(np.ones(len(first), dtype=bool)),
        }
    )


def read_records(path: Path) -> EmojiImages:
    """The pictures of a parquet file written here, winners as ``line`` and losers as ``flat``."""
    if not path.is_file():
        raise UserError("no emoji records", str(path), "build them with python -m fastpref.emoji.records --npz FILE")
    rows = pq.read_table(path).to_pydict()
    pairs = [
        (decode_image(a), decode_image(b)) if label == 1.0 else (decode_image(b), decode_image(a))
        for a, b, label in zip(rows["jpg_0"], rows["jpg_1"], rows["label_0"], strict=True)
    ]
    return EmojiImages(rows["caption"], np.stack([loser for _, loser in pairs]), np.stack([w for w, _ in pairs]))


def build_records(npz: Path, out: Path) -> tuple[int, int]:
    """Write both parquet files below ``out``; returns the numbers of training and held-out captions."""
    if not npz.is_file():
        raise UserError("no such file", str(npz), "make it with python -m fastpref.emoji.render")
    with np.load(npz) as arrays:
        names, flat, line = [str(n) for n in arrays["names"]], arrays["flat"], arrays["mono"]
    chosen = select_concepts(names, line, CONCEPTS)
    captions = [caption_of(names[i]) for i in chosen]
    clusters = duplicate_clusters(captions, flat[chosen], line[chosen])
    heldout = split_heldout(captions, clusters, HELDOUT, SEED)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows, offset in (("train", np.flatnonzero(~heldout), 0), ("heldout", np.flatnonzero(heldout), 1)):
        images = EmojiImages([captions[i] for i in rows], flat[chosen[rows]], line[chosen[rows]])
        temporary = out / f".{name}.parquet.tmp"
        pq.write_table(records_table(images, SEED + offset), temporary, compression="none")
        os.replace(temporary, out / f"{name}.parquet")
    return int((~heldout).sum()), int(heldout.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description="npz of both emoji styles to train.parquet and heldout.parquet")
    parser.add_argument("--npz", type=Path, required=True, help="output of python -m fastpref.emoji.render")
    parser.add_argument("--out", type=Path, default=DATA_DIR, help="folder of the two parquet files")
    arguments = parser.parse_args()
    train, heldout = build_records(arguments.npz, arguments.out)
    print(f"{train} training and {heldout} held-out captions in {arguments.out}")


if __name__ == "__main__":
    main()
