"""The bar charts of the benchmarks: medians with the range of the repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Panel:
    """One chart: a group of bars a label, one bar of it a series; a missing series leaves a gap."""

    title: str
    axis: str  # what the bars' length is
    groups: dict[str, dict[str, Sequence[float]]]  # label → series → the repeats
    line: float | None = None  # a bar's target, dashed
    line_label: str = ""
    logarithmic: bool = False


def draw(panels: Sequence[Panel], out: Path) -> None:
    """Write the panels below one another as a PNG."""
    from matplotlib.figure import Figure

    series = list(dict.fromkeys(name for panel in panels for group in panel.groups.values() for name in group))
    lengths = [len(panel.groups) * max(len(series), 1) for panel in panels]
    figure = Figure(figsize=(9, 0.9 * len(panels) + 0.15 * sum(lengths) + 0.6), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": [n + 2 for n in lengths]})
    width, drawn = 0.8 / max(len(series), 1), {}
    for axes, panel in zip(all_axes[:, 0], panels, strict=True):
        for place, name in enumerate(series):
            rows = [(at, group[name]) for at, group in enumerate(panel.groups.values()) if name in group]
            if rows:
                middle = [median(values) for _, values in rows]
                around = [
                    [m - min(values) for m, (_, values) in zip(middle, rows, strict=True)],
                    [max(values) - m for m, (_, values) in zip(middle, rows, strict=True)],
                ]
                where = [at + (place - (len(series) - 1) / 2) * width for at, _ in rows]
                several = any(len(values) > 1 for _, values in rows)
                drawn[name] = axes.barh(
                    where, middle, width, xerr=around if several else None, color=f"C{place}", capsize=2
                )
        if panel.line is not None:
            drawn[panel.line_label] = axes.axvline(panel.line, color="black", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(panel.groups)), list(panel.groups), fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log" if panel.logarithmic else "linear")
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(panel.axis, fontsize=8)
    figure.legend(list(drawn.values()), list(drawn), fontsize=7, loc="outside lower center", ncols=4)
    figure.savefig(out, dpi=110, metadata={"Software": None})
