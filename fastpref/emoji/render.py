"""Render both emoji sets to one npz, the input of ``fastpref.emoji.records``.

    npm install @iconify-json/fluent-emoji-flat @iconify-json/fluent-emoji-high-contrast
    pip install resvg-py
    python -m fastpref.emoji.render node_modules emoji32.npz

Only needed to rebuild the parquet files from the vector drawings; resvg-py is not a dependency of fastpref.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastpref.emoji import IMAGE_SIZE
from fastpref.errors import UserError

PACKAGES = {"flat": "fluent-emoji-flat", "mono": "fluent-emoji-high-contrast"}
OVERSAMPLING = 4
SKIN_TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)$|(light|medium|dark)(-(light|dark))?(-skin)?$")


def read_icon_set(node_modules: Path, package: str) -> dict[str, Any]:
    """The parsed icons.json of one iconify package."""
    path = node_modules / "@iconify-json" / package / "icons.json"
    if not path.is_file():
        raise UserError("icon set not installed", str(path), f"npm install @iconify-json/{package}")
    icons: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return icons


def render_icon(rasterize: Any, icons: dict[str, Any], name: str) -> np.ndarray:
    """(32, 32, 3) uint8: the drawing on white, rasterized at four times the size and reduced with Lanczos."""
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, IMAGE_SIZE)) for side in ("width", "height"))
    namespace = "http://www.w3.org/2000/svg"
    svg = f'<svg xmlns="{namespace}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    large = OVERSAMPLING * IMAGE_SIZE
    drawing = Image.open(io.BytesIO(bytes(rasterize(svg_string=svg, width=large, height=large)))).convert("RGBA")
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    return np.asarray(page.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def main() -> None:
    parser = argparse.ArgumentParser(description="rasterize the emoji that both styles have, without skin tones")
    parser.add_argument("node_modules", type=Path)
    parser.add_argument("npz", type=Path)
    arguments = parser.parse_args()
    rasterize = importlib.import_module("resvg_py").svg_to_bytes
    sets = {style: read_icon_set(arguments.node_modules, package) for style, package in PACKAGES.items()}
    names = [name for name in sets["mono"]["icons"] if name in sets["flat"]["icons"] and not SKIN_TONE.search(name)]
    images = {s: np.stack([render_icon(rasterize, icons, n) for n in names]) for s, icons in sets.items()}
    temporary = arguments.npz.with_name(arguments.npz.name + ".tmp.npz")
    np.savez_compressed(temporary, names=np.array(names), flat=images["flat"], mono=images["mono"])
    os.replace(temporary, arguments.npz)
    print(f"{len(names)} emoji in {arguments.npz}")


if __name__ == "__main__":
    main()
