"""SFT, DPO and RPO on the bundled emoji world, as `make quickstart` runs RPO: one row a method, measured in this run.

    python benchmarks/emoji.py [--methods rpo dpo sft] [--readme]

Each method is a fresh process of the command line. Writes benchmarks/results/emoji.csv and, for RPO, the before/after
picture beside it; --readme puts the table between the markers of README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- emoji table: python benchmarks/emoji.py --readme -->", "<!-- end of emoji table -->"


def measure(method: str, runs: str) -> dict[str, Any]:
    """Train and evaluate one recipe; its row."""
    command = [sys.executable, "-m", "fastpref.cli", "train", f"configs/emoji_{method}.yaml", f"output_dir={runs}"]
    subprocess.run(command, cwd=ROOT, check=True)
    run = Path(runs) / f"emoji_{method}"
    summary = json.loads((run / "summary.json").read_text())
    before, after = summary["evaluation"]["before"], summary["evaluation"]["after"]
    if method == "rpo":
        first_rows(run / "samples" / "before_after.png", RESULTS / "quickstart.png")
    row: dict[str, Any] = {"method": method, "steps": summary["steps"], "pairs": summary["samples_seen"]}
    for name, found in (("before", before), ("after", after)):
        row[f"style_share_{name}"] = round(found["style_share"], 3)
        row[f"style_distance_{name}"] = round(found["style_distance"], 3)
        row[f"top5_{name}"] = round(found["prompt_retrieval"]["top5"], 3)
    row["seconds_total"] = round(summary["seconds_total"], 1)
    row["seconds_train"] = round(summary["seconds_train"], 1)
    row["peak_rss_gb"] = round(summary["peak_rss_bytes"] / 1e9, 2)
    row["unet_forwards"], row["unet_backwards"] = summary["unet_forwards"], summary["unet_backwards"]
    return row | {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def first_rows(sheet: Path, out: Path, rows: int = 3, of: int = 8, head: int = 40) -> None:
    """The first ``rows`` of the before/after sheet's ``of`` rows, below its ``head`` pixels of title."""
    with Image.open(sheet) as page:
        page.crop((0, 0, page.width, head + (page.height - head) * rows // of)).save(out, optimize=True)


def commit() -> str:
    """The commit that was measured, marked if the tree had changes."""
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| method | line-art share | distance to line art | prompt found in top 5 | train | total | peak RSS |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[f'{key}_before']} → {row[f'{key}_after']}" for key in ("style_share", "style_distance", "top5")]
        cost = [f"{row['seconds_train']} s", f"{row['seconds_total']} s", f"{row['peak_rss_gb']} GB"]
        lines.append("| " + " | ".join([row["method"].upper(), *cells, *cost]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the CSV, and on request the README's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["sft", "dpo", "rpo"], choices=["sft", "dpo", "rpo"])
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    subprocess.run([sys.executable, "-m", "fastpref.cli", "prepare", "configs/emoji_rpo.yaml"], cwd=ROOT, check=True)
    RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as runs:
        rows = [measure(method, runs) for method in options.methods]
    with (RESULTS / "emoji.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))
    if options.readme:
        readme = ROOT / "README.md"
        head, _, rest = readme.read_text().partition(BEGIN)
        _, _, tail = rest.partition(END)
        readme.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}")


if __name__ == "__main__":
    main()
