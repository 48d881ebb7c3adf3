"""PNG files, sheets of pictures, and pictures as tensors."""

from __future__ import annotations

import hashlib
import io
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fastpref.atomic import make_directory, write_bytes

TILE = 96  # pixels: smaller pictures are enlarged to it by whole factors, larger ones reduced to 256
MAX_TILE = 256
PAPER, INK, FAINT = (255, 255, 255), (32, 33, 36), (110, 112, 118)
_SLUG_BYTES = 80


def slugs(prompts: Sequence[str]) -> dict[str, str]:
    """A file name for every prompt: its words, hyphenated, and six digits of its sha256 where two would be the same."""
    plain = {prompt: _slug(prompt) for prompt in prompts}
    uses = Counter(plain.values())
    return {p: s if uses[s] == 1 else f"{s}-{hashlib.sha256(p.encode()).hexdigest()[:6]}" for p, s in plain.items()}


def save_png(image: Image.Image, path: Path) -> Path:
    """Write a PNG atomically; raises a UserError if it cannot be written."""
    make_directory(path.parent)
    png = io.BytesIO()
    image.save(png, format="PNG")
    write_bytes(path, png.getvalue())
    return path


def display_size(image: Image.Image, tile: int = TILE) -> Image.Image:
    """A picture at a size to look at: small ones enlarged by a whole factor without smoothing, large ones reduced."""
    longest = max(image.size)
    if longest * 2 <= tile:
        factor = tile // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if longest > MAX_TILE:
        scale = MAX_TILE / longest
        return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return image


def to_batch(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size to ``(n, 3, H, W)`` fp32 in [0, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous() / 255


def contact_sheet(rows: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """One block a prompt: its pictures in a row, the caption below; blocks fill a roughly square page."""
    return _page([([row], caption) for row, caption in zip(rows, captions, strict=True)], header="")


BEFORE_AFTER = "upper row: before · lower row: after training, same prompt and seed"


def before_after_sheet(
    pairs: Sequence[Sequence[tuple[Image.Image, Image.Image]]], captions: Sequence[str], header: str = BEFORE_AFTER
) -> Image.Image:
    """One block a prompt: the first of each pair in the upper row, the second below, a column a pair."""
    blocks = [([[b for b, _ in p], [a for _, a in p]], c) for p, c in zip(pairs, captions, strict=True)]
    return _page(blocks, header=header)


def _page(
    blocks: Sequence[tuple[Sequence[Sequence[Image.Image]], str]], header: str, gap: int = 4, margin: int = 16
) -> Image.Image:
    first = display_size(blocks[0][0][0][0])
    width, height = first.size
    rows, columns = len(blocks[0][0]), max(len(row) for block, _ in blocks for row in block)
    font = ImageFont.load_default(13)
    block_width, line = columns * (width + gap) - gap, 20
    block_height = rows * (height + gap) + line
    across = _across(len(blocks), (len(blocks) * block_height / block_width) ** 0.5)
    down = -(-len(blocks) // across)
    top = margin + (line + 8 if header else 0)
    size = (2 * margin + across * (block_width + margin) - margin, top + down * (block_height + margin))
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    if header:
        draw.text((margin, margin - 4), fit_text(draw, header, size[0] - 2 * margin, font), fill=FAINT, font=font)
    for index, (block, caption) in enumerate(blocks):
        left, upper = (
            margin + (index % across) * (block_width + margin),
            top + (index // across) * (block_height + margin),
        )
        for r, row in enumerate(block):
            for c, image in enumerate(row):
                page.paste(display_size(image).convert("RGB"), (left + c * (width + gap), upper + r * (height + gap)))
        text = fit_text(draw, caption, block_width, font)
        draw.text((left, upper + rows * (height + gap)), text, fill=INK, font=font)
    return page


def _across(count: int, square: float) -> int:
    """Blocks side by side: about as many as make a square page, so that few places stay empty."""
    near = [n for n in range(round(square) - 2, round(square) + 3) if 1 <= n <= count]
    return min(near or [1], key=lambda n: (-count % n, abs(n - square)))


def fit_text(
    draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> str:
    """``text`` in one line, and as much of it as fits into ``width`` pixels."""
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= width:
        return text
    kept = bisect_right(
        range(1, len(text)), float(width), key=lambda count: draw.textlength(text[:count] + "…", font=font)
    )
    return text[:kept] + "…"


def _slug(prompt: str) -> str:
    words = "-".join(re.findall(r"\w+", prompt.lower()))
    return words.encode()[:_SLUG_BYTES].decode(errors="ignore").rstrip("-") or "prompt"
