"""Pictures, records and recipes for the data tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastpref.config import Config


def make_picture(seed: int, size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    """A smooth coloured picture of ``(width, height)``, encoded."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def make_rows(count: int, size: tuple[int, int] = (32, 32)) -> list[dict[str, Any]]:
    """Pick-a-Pic rows with distinct pictures and captions; odd rows prefer jpg_1."""
    return [
        {
            "jpg_0": make_picture(2 * i, size),
            "jpg_1": make_picture(2 * i + 1, size),
            "label_0": float(i % 2 == 0),
            "caption": f"a picture of number {i}",
            "has_label": True,
        }
        for i in range(count)
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 5) -> Path:
    """Rows as a parquet file."""
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def picture() -> Callable[..., bytes]:
    return make_picture


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    return make_rows


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows to a parquet file below tmp_path."""

    def write(rows: list[dict[str, Any]], name: str = "records.parquet") -> Path:
        return write_parquet(tmp_path / name, rows)

    return write


@pytest.fixture
def recipe(sdxl: Path, clip: Path, tmp_path: Path) -> Callable[..., Config]:
    """A config with the tiny SDXL and CLIP, storing into tmp_path/store."""

    def make(records: Path | str, **settings: Any) -> Config:
        defaults = {
            "records": str(records),
            "model": str(sdxl),
            "clip": str(clip),
            "store": str(tmp_path / "store"),
            "shard_size": 6,
            "prepare_batch_size": 4,
            "max_reject_share": 0.0,
        }
        return Config(**(defaults | settings))

    return make
