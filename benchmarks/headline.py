"""The README's table of how fast it is, from the CSVs of the benchmarks it names.

python benchmarks/headline.py [--readme]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import gpu_bench_report
import limit
import offline_report
import spo_vs_reference_report
from common import RESULTS, ROOT, fill, markdown, read_csv
from devices import CPU, device_of

Rows = Sequence[dict[str, Any]]
MODELS = {"emoji": "the bundled model", "full": "SDXL's shape, 512 px"}


def table(results: Path = RESULTS) -> str:
    """What, how many times as fast, where, and which benchmark says so."""
    lines = [*_offline(_rows(results, "offline_vs_reference")), *_limit(_rows(results, "limit"))]
    lines += [*_spo(_rows(results, "spo_vs_reference")), *_gpu(_rows(results, "gpu_bench"))]
    return markdown(["what", "where", "measured", "command"], lines)


def _rows(results: Path, name: str) -> list[dict[str, Any]]:
    path = results / f"{name}.csv"
    return list(read_csv(path)) if path.is_file() else []


def _offline(rows: Rows) -> list[list[str]]:
    lines = []
    command = "`benchmarks/offline_vs_reference.py`"
    for (name, method), own in offline_report.groups(rows).items():
        model = name.partition(",")[0]
        if method != "dpo" or model not in MODELS or offline_report.setting_of(own[0]) != model:
            continue
        for over, what in (
            ("literal", "a trainer written as the public scripts are"),
            (offline_report.PUBLIC, "diffusers' own script"),
        ):
            if not offline_report.times(own, over) or (
                over == "literal" and offline_report.times(own, "public script")
            ):
                continue
            found = [median(offline_report.ratios(own, over, side)) for side in offline_report.SIDES]
            measured = f"{found[0]:.2f}x as fast; with a ledger {found[1]:.2f}x"
            lines.append([f"a DPO step beside {what}", f"{MODELS[model]}, two CPU cores", measured, command])
    return lines


def _limit(rows: Rows) -> list[list[str]]:
    own = [row for row in rows if device_of(row) == CPU]
    found = [median(limit.ratios(of, arm)) for of in limit.by_setting(own).values() for arm in {r["arm"] for r in of}]
    if not found:
        return []
    what = "a whole step (SFT, DPO, RPO) over the UNet passes that it needs"
    measured = f"{min(found):.2f} to {max(found):.2f} of their time"
    return [[what, f"{len(found)} settings, two CPU cores", measured, "`benchmarks/limit.py`"]]


def _spo(rows: Rows) -> list[list[str]]:
    own = [row for row in rows if device_of(row) == CPU]
    if not own:
        return []
    measured = f"{median(spo_vs_reference_report.ratios(own, 'total')):.2f}x as fast"
    what = "a round of SPO beside the literal order of work"
    return [[what, "the bundled model, two CPU cores", measured, "`benchmarks/spo_vs_reference.py`"]]


def _gpu(rows: Rows) -> list[list[str]]:
    """What a card's newest run measured of the bars' first lines, those of a DPO step."""
    command = "`make gpu-bench`"
    lines = [
        [f"{bar.what}: SDXL, 1024 px", device, verdict[0], command]
        for (device, model), runs in gpu_bench_report.runs_of(rows).items()
        for bar in gpu_bench_report.BARS[:4]
        if (verdict := bar.verdict(gpu_bench_report.Found(runs[0]), device))[1] != gpu_bench_report.NOT_MEASURED
        and (model, device == CPU) == ("sdxl", False)
    ]
    return lines or [["a training step of SDXL, 1024 px", "a GPU", "not measured yet", command]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="also put the table into README.md")
    text = table()
    print(text)
    if parser.parse_args().readme:
        fill(ROOT / "README.md", "table: headline", text)
