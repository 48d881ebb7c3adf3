"""The kernels against eager torch: timed on a GPU, counted without one; RPO's CPU path against the matrix form.

    python benchmarks/kernels.py [gpu] [counts] [cpu] [rpo] [--sizes 1024 16384] [--repeats 3] [--plot]

    gpu     ms, GB/s, share of the copy bandwidth of the same run, peak memory: fastpref, eager fp32 and bf16, compiled
    counts  bytes per element, launches and peak memory of the interpreted kernels and of eager torch: counts, not times
    cpu     the CPU path at latent sizes, by pytest-benchmark
    rpo     rpo_loss on the CPU with M = N, D = 256: time and peak memory beyond the inputs, each in its own process, in
            turn with the matrix form; fails above 64 MB or if slower at the largest size

Without a choice: gpu where there is one, else counts and rpo. Rows are kept in benchmarks/results/kernels.csv, a run
replaces those of its kind; --plot draws kernels_*.png beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, provenance, read_csv, write_csv

HERE = Path(__file__).parent
CSV = RESULTS / "kernels.csv"
LIMIT = 64 << 20  # bytes beyond the inputs that rpo_loss may take on the CPU
Row = dict[str, Any]


def _child(script: str, *arguments: str, interpreted: bool = False) -> Any:
    """JSON that a script beside this one prints, from a process of its own."""
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def rpo(sizes: list[int], repeats: int) -> list[Row]:
    """Median of the repeats, which alternate between the two forms."""
    rows = []
    for size in sizes:
        found: dict[str, list[Row]] = {"fastpref": [], "eager fp32": []}
        for _ in range(repeats):
            for form, results in found.items():
                results.append(_child("kernels_rpo.py", form, str(size)))
        for form, results in found.items():
            median = {key: statistics.median(r[key] for r in results) for key in ("seconds", "peak_bytes")}
            rows.append(
                {
                    "kind": "rpo",
                    "workload": "rpo_loss[outside]",
                    "shape": f"{size}x{size}x256",
                    "form": form,
                    "ms": round(1e3 * median["seconds"], 1),
                    "peak_mb": round(median["peak_bytes"] / (1 << 20), 1),
                    "repeats": repeats,
                    "threads": torch.get_num_threads(),
                }
            )
            print(f"rpo {size}: {form}: {rows[-1]['ms']} ms, {rows[-1]['peak_mb']} MB beyond the inputs", flush=True)
    return rows


def broken_claims(rows: list[Row]) -> list[str]:
    """What `rpo` promises and did not hold at the largest size."""
    ours, theirs = rows[-2:]
    broken = []
    if ours["peak_mb"] > LIMIT / (1 << 20):
        broken.append(f"{ours['shape']}: {ours['peak_mb']} MB beyond the inputs, promised {LIMIT >> 20}")
    if ours["ms"] > theirs["ms"]:
        broken.append(f"{ours['shape']}: {ours['ms']} ms, the matrix form takes {theirs['ms']}")
    return broken


def cpu() -> list[Row]:
    """Medians of pytest-benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "-q", str(HERE / "kernels_cpu.py"), f"--benchmark-json={out}"]
        subprocess.run(command, cwd=ROOT, check=True)
        found = json.loads(out.read_text())["benchmarks"]
    return [
        {
            "kind": "cpu",
            **{key: entry["extra_info"][key] for key in ("workload", "shape", "form")},
            "ms": round(1e3 * entry["stats"]["median"], 3),
            "repeats": entry["stats"]["rounds"],
            "threads": torch.get_num_threads(),
        }
        for entry in found
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[[], "gpu", "counts", "cpu", "rpo"], help="default: see above")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 1024, 4096, 16384], help="M = N of rpo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    what = options.what or (["gpu"] if torch.cuda.is_available() else ["counts", "rpo"])
    if "gpu" in what and not torch.cuda.is_available():
        parser.error("gpu: torch.cuda.is_available() is False")
    measured: dict[str, list[Row]] = {}
    if "gpu" in what:
        measured["gpu"] = _child("kernels_gpu.py")
    if "counts" in what:
        measured["counts"] = _child("kernels_counts.py", interpreted=True)
    if "cpu" in what:
        measured["cpu"] = cpu()
    if "rpo" in what:
        measured["rpo"] = rpo(options.sizes, options.repeats)
    kept: list[Row] = [row for row in read_csv(CSV) if row["kind"] not in measured]
    origin = provenance()
    write_csv(CSV, kept + [row | origin for rows in measured.values() for row in rows])
    if options.plot:
        from kernels_plot import draw

        draw(read_csv(CSV), RESULTS)
    broken = broken_claims(measured["rpo"]) if "rpo" in measured else []
    print("\n".join(broken) or f"wrote {CSV.relative_to(ROOT)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
