"""The bundled world: captioned Fluent emoji in two styles and tiny models trained on them. Paths only."""

from __future__ import annotations

from pathlib import Path

EMOJI_DIR = Path(__file__).resolve().parent
DATA_DIR = EMOJI_DIR / "data"
TRAIN_PARQUET = DATA_DIR / "train.parquet"
HELDOUT_PARQUET = DATA_DIR / "heldout.parquet"
MODEL_DIR = EMOJI_DIR / "model"
CLIP_DIR = EMOJI_DIR / "clip"
STYLE_DIR = EMOJI_DIR / "style"

IMAGE_SIZE = 32  # pixels, height and width of every picture
STYLES = ("flat", "line")  # order of the style logits; "line" (line art) is the preferred one

__all__ = [
    "CLIP_DIR",
    "DATA_DIR",
    "EMOJI_DIR",
    "HELDOUT_PARQUET",
    "IMAGE_SIZE",
    "MODEL_DIR",
    "STYLES",
    "STYLE_DIR",
    "TRAIN_PARQUET",
]
