"""What `make quickstart` does, measured: time, memory, style and content before and after.

    python benchmarks/quickstart.py [--readme]

Runs the recipe in a fresh process of the command line. Writes results/quickstart.csv and the picture beside it;
--readme puts the table between the markers of README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, fill, markdown, provenance, write_csv
from PIL import Image

RECIPE = "configs/emoji_rpo.yaml"
FIGURES = {"style_share": "line-art share", "style_distance": "distance to line art", "top5": "prompt found in top 5"}


def measure(runs: str) -> dict[str, Any]:
    """Train and evaluate the recipe; its row."""
    command = [sys.executable, "-m", "fastpref.cli", "train", RECIPE, "name=quickstart", f"output_dir={runs}"]
    subprocess.run(command, cwd=ROOT, check=True)
    run = Path(runs) / "quickstart"
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["evaluation"]["before"], summary["evaluation"]["after"]
    first_rows(run / "samples" / "before_after.png", RESULTS / "quickstart.png")
    row: dict[str, Any] = {"method": summary["method"], "steps": summary["steps"], "pairs": summary["samples_seen"]}
    for tag, found in (("before", before), ("after", after)):
        row[f"style_share_{tag}"] = round(found["style_share"], 3)
        row[f"style_distance_{tag}"] = round(found["style_distance"], 3)
        row[f"top5_{tag}"] = round(found["prompt_retrieval"]["top5"], 3)
    row["distance_floor"] = round(after["details"]["floor"], 3)
    row["seconds_total"] = round(summary["seconds_total"], 1)
    row["seconds_train"] = round(summary["seconds_train"], 1)
    row["peak_rss_gb"] = round(summary["peak_rss_bytes"] / 1e9, 2)
    row["unet_forwards"], row["unet_backwards"] = summary["unet_forwards"], summary["unet_backwards"]
    return row | provenance()


def first_rows(sheet: Path, out: Path, rows: int = 3, of: int = 8, head: int = 40) -> None:
    """The first ``rows`` of the before/after sheet's ``of`` rows, below its ``head`` pixels of title."""
    with Image.open(sheet) as page:
        page.crop((0, 0, page.width, head + (page.height - head) * rows // of)).save(out, optimize=True)


def table(row: dict[str, Any]) -> str:
    """The row as Markdown."""
    floor = {"style_distance": f" (real line art {row['distance_floor']})"}
    lines = [
        [label, f"{row[f'{key}_before']} → {row[f'{key}_after']}{floor.get(key, '')}"] for key, label in FIGURES.items()
    ]
    lines.append(["time", f"{row['seconds_total']} s, {row['seconds_train']} s of it training"])
    lines.append(["peak memory", f"{row['peak_rss_gb']} GB"])
    return markdown(["quickstart", "before → after"], lines)


def main() -> None:
    """Measure, write the CSV, and on request the README's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    subprocess.run([sys.executable, "-m", "fastpref.cli", "prepare", RECIPE], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as runs:
        row = measure(runs)
    write_csv(RESULTS / "quickstart.csv", [row])
    print(table(row))
    if options.readme:
        fill(ROOT / "README.md", "table: python benchmarks/quickstart.py", table(row))


if __name__ == "__main__":
    main()
