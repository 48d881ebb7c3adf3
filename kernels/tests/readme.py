"""The parts of kernels/README.md that are generated, between markers; the table of ops is written by

python kernels/tests/readme.py
"""

from __future__ import annotations

from pathlib import Path

from cases import Row, rows

README = Path(__file__).parents[1] / "README.md"
PATCHES = Row("`patch_unet(unet)`, `unpatch_unet(unet)`", "swap the last three into a diffusers UNet and out again", "")
HEADS = Row("op", "value", "gradient", "bytes forward", "backward")


def written(name: str) -> str:
    """A part as it is now, with its markers. Raises ValueError if they are not there."""
    text, begin, end = README.read_text(), f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"{README.name}: the markers {begin} and {end} are missing")
    return text[text.index(begin) : text.index(end) + len(end)]


def marked(name: str, lines: list[str]) -> str:
    return "\n".join([f"<!-- {name}:begin -->", *lines, f"<!-- {name}:end -->"])


def write(name: str, text: str) -> None:
    README.write_text(README.read_text().replace(written(name), text))


def ops_table() -> str:
    """A row for each op and its variants, from the cases."""
    lines = ["| " + " | ".join(row) + " |" for row in (HEADS, *rows(), PATCHES)]
    return marked("ops", [lines[0], "|" + "---|" * len(HEADS), *lines[1:]])


if __name__ == "__main__":
    write("ops", ops_table())
