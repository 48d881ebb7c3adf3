"""Plots of op_bench.csv."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Rows = list[dict[str, str]]


def _rpo(rows: Rows, out: Path) -> None:
    """Time and peak memory of the two forms over M."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for axis, key, label in zip(
        axes, ("ms", "peak_mb"), ("ms, forward and backward", "MB beyond the inputs"), strict=True
    ):
        for form in dict.fromkeys(row["form"] for row in rows):
            points = [(int(r["shape"].split("x")[0]), float(r[key])) for r in rows if r["form"] == form]
            axis.plot(*zip(*points, strict=True), marker="o", label=form)
        axis.set(xscale="log", yscale="log", xlabel="M = N", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"rpo_loss on {rows[0]['cores']} CPU cores, D = 256")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _bars(rows: Rows, key: str, label: str, out: Path) -> None:
    """A group of bars for each workload (and shape), one for each form."""
    names = list(dict.fromkeys(f"{row['workload']} {row['shape']}" for row in rows))
    forms = list(dict.fromkeys(row["form"] for row in rows))
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.32 * len(names)))
    for i, form in enumerate(forms):
        values = {f"{r['workload']} {r['shape']}": float(r[key]) for r in rows if r["form"] == form and r.get(key)}
        places = [n + (i - len(forms) / 2) / (len(forms) + 1) for n in range(len(names))]
        axis.barh(places, [values.get(name, 0.0) for name in names], height=0.9 / (len(forms) + 1), label=form)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw(rows: Rows, folder: Path) -> None:
    """One picture for each kind of measurement that there is."""
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("rpo", "counts", "cpu", "gpu")}
    if by_kind["rpo"]:
        _rpo(by_kind["rpo"], folder / "op_bench_rpo.png")
    if by_kind["counts"]:
        counted = [row for row in by_kind["counts"] if not row["workload"].startswith("rpo")]
        label = "bytes moved per element, forward and backward (counted)"
        _bars(counted, "bytes_per_element", label, folder / "op_bench_counts.png")
    if by_kind["gpu"]:
        _bars(by_kind["gpu"], "share_of_copy", "share of the copy bandwidth", folder / "op_bench_gpu.png")
