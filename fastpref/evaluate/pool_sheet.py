"""The picture of step pools: a column a denoising step, a row a candidate, winner, loser and the chosen one marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from fastpref.evaluate.sheets import FAINT, INK, PAPER, fit_text

WINNER, LOSER = (33, 102, 172), (196, 96, 29)  # the report's colours of winner and loser
PALE = 0.68  # how far a pool that is not trained on fades to paper
COLUMNS = 16  # of a band; more are spread over several
# All lengths are those of a page to be shown at half its size.
_TILE, _LARGE_TILE, _FEW = 128, 256, 6
_FRAME, _GAP, _MARGIN, _LINE, _BADGE, _DOT, _FONT, _BETWEEN = 8, 14, 28, 46, 30, 9, 30, 20


@dataclass(frozen=True)
class PoolColumn:
    """A denoising step: its candidates and which of them (by row) won, lost and went on."""

    title: str
    images: Sequence[Image.Image]
    winner: int | None
    loser: int | None
    chosen: int | None
    kept: bool  # whether the pair is trained on


def pool_sheet(columns: Sequence[PoolColumn], caption: str, *, noisy: bool = False) -> Image.Image:
    """The page of a prompt's pools, denoising from left to right, in as few bands as hold ``COLUMNS`` each.

    Args:
        caption: the prompt.
        noisy: the pictures are noisy latents, not what they promise to become.
    """
    tile = _LARGE_TILE if len(columns) <= _FEW else _TILE
    tiles = [[_fitted(image, tile) for image in column.images] for column in columns]
    width, height = tiles[0][0].size
    cell = (width + 2 * _FRAME + _GAP, height + 2 * _FRAME + _GAP)
    bands = -(-len(columns) // COLUMNS)
    per_band = -(-len(columns) // bands)
    band_height = _LINE + max(len(column) for column in tiles) * cell[1] + _BETWEEN
    font = ImageFont.load_default(_FONT)
    least = _legend(None, 0, 0, font)
    page_width = 2 * _MARGIN + max(per_band * cell[0] - _GAP, least)
    page = Image.new("RGB", (page_width, 2 * _MARGIN + 2 * _LINE + bands * band_height - _BETWEEN), PAPER)
    draw = ImageDraw.Draw(page)
    what = f"{caption}{' · noisy candidates, decoded' if noisy else ''}"
    draw.text((_MARGIN, _MARGIN - 6), fit_text(draw, what, page_width - 2 * _MARGIN, font), fill=INK, font=font)
    for index, (column, pictures) in enumerate(zip(columns, tiles, strict=True)):
        left = _MARGIN + (index % per_band) * cell[0]
        top = _MARGIN + _LINE + 8 + (index // per_band) * band_height
        page.paste(_column(column, pictures, cell), (left, top + _LINE))
        place = (left + _FRAME + width / 2, top + _LINE - 10)
        draw.text(place, column.title, fill=INK if column.kept else FAINT, font=font, anchor="ms")
        if column.chosen is not None:
            x, y = left + cell[0] - _GAP / 2, top + _LINE + column.chosen * cell[1] + _FRAME + height / 2
            _dot(draw, x, y)
    _legend(draw, _MARGIN, page.height - _MARGIN - _LINE // 2 + 4, font)
    return page


def _column(column: PoolColumn, tiles: Sequence[Image.Image], cell: tuple[int, int]) -> Image.Image:
    """The candidates below each other, framed; faded if the pair is not trained on."""
    width, height = cell[0] - _GAP, cell[1] - _GAP
    strip = Image.new("RGB", (width, len(tiles) * cell[1] - _GAP), PAPER)
    draw = ImageDraw.Draw(strip)
    for row, tile in enumerate(tiles):
        top = row * cell[1]
        colour = WINNER if row == column.winner else LOSER if row == column.loser else None
        if colour:
            draw.rectangle((0, top, width - 1, top + height - 1), fill=colour)
        else:
            inset = _FRAME - 2
            edges = (inset, top + inset, width - 1 - inset, top + height - 1 - inset)
            draw.rectangle(edges, fill=_mixed(INK, 0.85))
        strip.paste(tile, (_FRAME, top + _FRAME))
        if colour:
            _badge(draw, 0, top, colour, up=row == column.winner)
    return strip if column.kept else Image.blend(strip, Image.new("RGB", strip.size, PAPER), PALE)


def _fitted(image: Image.Image, tile: int) -> Image.Image:
    """A picture whose longer side is ``tile`` or, for small ones, its largest multiple below; hard edges stay hard."""
    longest, image = max(image.size), image.convert("RGB")
    if longest <= tile:
        factor = tile // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * tile / longest)), max(1, round(image.height * tile / longest)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _badge(draw: ImageDraw.ImageDraw, left: float, top: float, colour: tuple[int, int, int], *, up: bool) -> None:
    """A triangle, point up or down, on a square of the frame's colour."""
    draw.rectangle((left, top, left + _BADGE - 1, top + _BADGE - 1), fill=colour)
    base, point = (top + _BADGE - 8, top + 8) if up else (top + 8, top + _BADGE - 8)
    draw.polygon([(left + 6, base), (left + _BADGE - 7, base), (left + _BADGE / 2, point)], fill=PAPER)


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    draw.ellipse((x - _DOT - 3, y - _DOT - 3, x + _DOT + 3, y + _DOT + 3), fill=PAPER)
    draw.ellipse((x - _DOT, y - _DOT, x + _DOT, y + _DOT), fill=INK)


def _legend(
    draw: ImageDraw.ImageDraw | None, left: float, middle: float, font: ImageFont.ImageFont | ImageFont.FreeTypeFont
) -> int:
    """What the marks mean, in one line; returns its width (without ``draw`` that is all)."""
    start = left
    for mark, words in (
        ("winner", "highest score"),
        ("loser", "lowest score"),
        ("dot", "goes on to the next step"),
        ("pale", "faded: not trained on"),
    ):
        if draw is not None and mark in ("winner", "loser"):
            colour = WINNER if mark == "winner" else LOSER
            _badge(draw, left, middle - _BADGE / 2, colour, up=mark == "winner")
        if draw is not None and mark == "dot":
            _dot(draw, left + _BADGE / 2, middle)
        left += 0 if mark == "pale" else _BADGE + 10
        if draw is not None:
            draw.text((left, middle), words, fill=FAINT, font=font, anchor="lm")
        left += font.getlength(words) + 40
    return int(left - 40 - start)


def _mixed(colour: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, PAPER, strict=True))
    return red, green, blue
