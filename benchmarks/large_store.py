"""A store of any number of records whose index is whole and whose shards hold a few rows that all records share."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from fastpref.atomic import write_json, write_table
from fastpref.data import manifest as files
from fastpref.data.manifest import StoredFile, read_manifest
from fastpref.data.store import Store

_WORDS = ("a red cat on the moon", "blue heart in a green circle", "yellow dog with a white hat", "the black sun")


def make_large_store(small: Path, folder: Path, records: int) -> Path:
    """Blow the index of the prepared store ``small`` up to ``records`` pairs of two pictures and a caption each.

    Each record has pictures and a caption of its own in the index, as where nothing repeats; they point at the rows of
    ``small``'s shards in turn.
    """
    store, manifest = Store.open(small), read_manifest(small)
    folder.mkdir(parents=True)
    for name in manifest.files:
        if name.endswith(".safetensors"):
            shutil.copy(small / name, folder / name)
    number, images = np.arange(records), np.arange(2 * records)
    pairs = {"record": number, "image_w": images[::2], "image_l": images[1::2], "caption": number + 1}
    table = {name: values.astype(np.int32) for name, values in pairs.items()}
    table |= {"label": np.ones(records, np.float32), "bucket": np.zeros(records, np.int32)}
    written = {files.PAIRS: write_table(folder / files.PAIRS, pa.table(table))}
    source = np.stack([store._image_shard, store._image_row])[:, images % len(store._image_row)]
    columns = {"shard": source[0], "row": source[1], "bucket": np.zeros(2 * records, np.int32)}
    columns |= {name: np.full(2 * records, 512, np.int32) for name in ("width", "height")}
    columns |= {name: np.zeros(2 * records, np.int32) for name in ("crop_top", "crop_left")}
    written[files.IMAGES] = write_table(folder / files.IMAGES, pa.table(columns))
    rows = np.arange(records + 1) % len(store._caption_row)
    captions = pa.array([f"{_WORDS[n % 4]}, number {n}" for n in range(records + 1)])
    text = {"caption": captions, "shard": store._caption_shard[rows], "row": store._caption_row[rows]}
    written[files.CAPTIONS] = write_table(folder / files.CAPTIONS, pa.table(text))
    entries = {
        name: entry for name, entry in manifest.files.items() if name not in written and name.endswith("tensors")
    }
    entries |= {name: StoredFile(**entry) for name, entry in written.items()}
    counts = {"pairs": records, "images": 2 * records, "captions": records, "source_records": records}
    result = manifest.model_copy(update={**counts, "files": entries})
    result = result.model_copy(update={"sha256": result.digest()})
    write_json(folder / files.MANIFEST, result.model_dump(mode="json"))
    return folder
