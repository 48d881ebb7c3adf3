"""Tables and plots of the comparison: mean and 95 % interval over seeds, and paired differences between arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import markdown
from scipy import stats

METRICS = {"style_share": "line-art share", "style_distance": "distance to line art", "top5": "prompt found in top 5"}
BETTER = {"style_share": 1, "style_distance": -1, "top5": 1}  # sign of an improvement
Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Interval:
    """Mean of n values and half the width of its 95 % Student t interval (nan for one value)."""

    mean: float
    half: float
    n: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out zero, else 0."""
        return 0 if not abs(self.mean) > self.half else int(math.copysign(1, self.mean))

    def text(self, digits: int = 2, signed: bool = False) -> str:
        """``mean ± half``."""
        mean = f"{self.mean:+.{digits}f}" if signed else f"{self.mean:.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t interval; the values are taken for independent draws of a normal law."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return Interval(mean, math.nan, n)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return Interval(mean, float(stats.t.ppf(0.975, n - 1)) * math.sqrt(variance / n), n)


def by_seed(rows: Rows, arm: str, metric: str) -> dict[int, float]:
    """Seed to value."""
    return {int(row["seed"]): float(row[metric]) for row in rows if row["arm"] == arm and row[metric] not in ("", None)}


def paired(rows: Rows, arm: str, against: str, metric: str) -> Interval | None:
    """Interval of ``arm - against`` over the seeds that both have."""
    left, right = by_seed(rows, arm, metric), by_seed(rows, against, metric)
    common = sorted(left.keys() & right.keys())
    return interval([left[seed] - right[seed] for seed in common]) if common else None


def panel_table(plan: dict[str, Any], rows: Rows, panel: str) -> str:
    """One line an arm of the panel that was run."""
    lines = []
    for name, arm in plan["arms"].items():
        if arm["panel"] != panel or not by_seed(rows, name, "style_share"):
            continue
        cells = [interval(list(by_seed(rows, name, metric).values())).text() for metric in METRICS]
        rewards = by_seed(rows, name, "last_reward_winner")
        reward = interval(list(rewards.values())).text(4, signed=True) if rewards else "–"
        work = [interval(list(by_seed(rows, name, f"unet_{way}").values())).mean for way in ("forwards", "backwards")]
        seeds = len(by_seed(rows, name, "style_share"))
        lines.append([f"{arm['label']}", *cells, reward, f"{work[0]:.0f} / {work[1]:.0f}", str(seeds)])
    if not lines:
        return ""
    head = ["arm", *METRICS.values(), "winners' reward", "UNet rows forward / backward", "seeds"]
    return f"**{plan['panels'][panel]}**\n\n{markdown(head, lines)}"


def contrast_table(plan: dict[str, Any], rows: Rows) -> str:
    """Paired differences; in bold where the interval leaves out zero, with who is better."""
    lines = []
    for arm, against in plan["contrasts"]:
        found = {metric: paired(rows, arm, against, metric) for metric in METRICS}
        if None not in found.values():
            cells = [_verdict(metric, value, arm, against) for metric, value in found.items() if value is not None]
            lines.append([f"{_short(arm)} − {_short(against)}", *cells])
    return markdown(["difference, same seed", *METRICS.values()], lines) if lines else ""


def _verdict(metric: str, value: Interval, arm: str, against: str) -> str:
    side = value.sign * BETTER[metric]
    text = value.text(signed=True)
    return text if side == 0 else f"**{text}** ({_short(arm if side > 0 else against)})"


def _short(arm: str) -> str:
    first, _, rest = arm.partition("_")
    return first.upper() + (f" {rest.replace('_', ' ')}" if rest else "")


def base_line(rows: Rows) -> str:
    """The base model's figures."""
    base = next((row for row in rows if row["arm"] == "base"), None)
    if base is None:
        return "The base was not measured."
    figures = ", ".join(f"{label} {float(base[metric]):.2f}" for metric, label in METRICS.items())
    return f"Before training: {figures}; the floor of the distance is {float(base['distance_floor']):.2f}."


def report(plan: dict[str, Any], rows: Rows) -> str:
    """Everything, as Markdown."""
    parts = [base_line(rows), *(panel_table(plan, rows, panel) for panel in plan["panels"])]
    parts.append("**Paired differences** (bold: the 95 % interval leaves out zero; in brackets who is better)")
    parts.append(contrast_table(plan, rows))
    return "\n\n".join(part for part in parts if part)


def summary_table(plan: dict[str, Any], rows: Rows) -> str:
    """What the README shows: the methods with and without wrong labels, and the paired differences."""
    parts = [base_line(rows), *(panel_table(plan, rows, panel) for panel in ("methods", "noise"))]
    return "\n\n".join([*(part for part in parts if part), contrast_table(plan, rows)])


def plot(plan: dict[str, Any], rows: Rows, path: Path) -> None:
    """One column a metric, one line an arm: every seed as a point, the mean with its interval, the base dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in plan["arms"] if by_seed(rows, name, "style_share")]
    figure, axes = plt.subplots(1, len(METRICS), figsize=(13, 1.2 + 0.32 * len(names)), sharey=True, squeeze=False)
    colours = {panel: f"C{i}" for i, panel in enumerate(plan["panels"])}
    for axis, (metric, label) in zip(axes[0], METRICS.items(), strict=True):
        _draw(axis, names, lambda name, m=metric: by_seed(rows, name, m), lambda n: colours[plan["arms"][n]["panel"]])
        for value in by_seed(rows, "base", metric).values():
            axis.axvline(value, color="grey", linestyle="--", linewidth=1, label="before training")
        axis.set_title(label + (" (lower is better)" if BETTER[metric] < 0 else ""), fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        if BETTER[metric] < 0:
            axis.set_xscale("log")
            ticks = [3, 5, 10, 20, 50, 100]
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
        else:
            axis.set_xlim(left=0.0, right=1.03 if metric == "style_share" else None)  # intervals of few seeds go beyond
    axes[0][0].set_yticks(range(len(names)), [_short(name) for name in names], fontsize=8)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _draw(axis: Any, names: list[str], values: Callable[[str], dict[int, float]], colour: Callable[[str], str]) -> None:
    for line, name in enumerate(names):
        found = list(values(name).values())
        middle = interval(found)
        half = 0.0 if math.isnan(middle.half) else middle.half
        axis.scatter(found, [line] * len(found), s=12, color=colour(name), alpha=0.5)
        axis.errorbar(middle.mean, line, xerr=half, fmt="o", markersize=4, capsize=3, color=colour(name))
