"""Tables and plot of SPO against the literal order of work, from the rows of spo_vs_reference.csv."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import markdown

TRAINING_BAR, SHARE_BAR = 1.8, 0.9  # of the training phase's ratio, and of the predicted ratio of the whole round
PHASES = ("rollout", "scoring", "training")
ROLLOUT, SCORING, TRAINING = PHASES
# What is counted and timed on both sides: its phase, and the parts whose time a row predicts it, literal and ours.
SPANS: dict[str, tuple[str, str | None, str | None]] = {
    "text encoders": (ROLLOUT, "text encoders, a batch", "text encoders, one prompt"),
    "UNet of the rollout": (ROLLOUT, "UNet, LoRA beside", "UNet, LoRA merged"),
    "noise and steps": (ROLLOUT, None, None),
    "VAE decode": (SCORING, "VAE decode, a step's candidates", "VAE decode, in chunks"),
    "preference model, image": (SCORING, "SPM image, unfolded", "SPM image, folded"),
    "preference model, text": (SCORING, "SPM text, each candidate", "SPM text, each prompt"),
    "policy forward": (TRAINING, "UNet forward + backward", "UNet forward + backward"),
    "backward": (TRAINING, None, None),  # in the part before
    "reference forward": (TRAINING, "reference, full copy", "reference, LoRA off"),
    "loss": (TRAINING, None, None),
    "optimizer": (TRAINING, None, None),
}
SIDES = ("literal", "ours")
Rows = Sequence[dict[str, Any]]


def column(rows: Rows, side: str, name: str) -> list[float]:
    """A column of one side, repeat by repeat."""
    chosen = sorted((row for row in rows if row["side"] == side), key=lambda row: int(row["repeat"]))
    return [float(row[name]) for row in chosen]


def seconds(rows: Rows, side: str, phase: str) -> list[float]:
    return column(rows, side, f"seconds {phase}")


def ratios(rows: Rows, phase: str) -> list[float]:
    """Literal to ours, repeat by repeat."""
    return [a / b for a, b in zip(*(seconds(rows, side, phase) for side in SIDES), strict=True)]


def predicted(rows: Rows, side: str, phase: str) -> float:
    """Seconds that the counts and the median times of the parts come to; ``total`` is all phases."""
    found = 0.0
    for name, (own, *parts) in SPANS.items():
        part = parts[SIDES.index(side)]
        if part is not None and phase in (own, "total"):
            found += column(rows, side, f"rows {name}")[0] * median(column(rows, "parts", f"ms {part}")) / 1000
    return found


def predicted_ratio(rows: Rows, phase: str = "total") -> float:
    """Literal to ours; NaN where the parts of ours take no time."""
    ours = predicted(rows, "ours", phase)
    return predicted(rows, "literal", phase) / ours if ours else math.nan


def achieved(rows: Rows) -> float:
    """The measured ratio of the whole round over the predicted one."""
    return median(ratios(rows, "total")) / predicted_ratio(rows)


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """``median (least to most)``."""
    least, most = min(values), max(values)
    return f"{median(values):.{digits}f}{unit} ({least:.{digits}f} to {most:.{digits}f})"


def phase_table(rows: Rows) -> str:
    """Seconds and ratios of each phase, measured and predicted."""
    lines = []
    for phase in (*PHASES, "total"):
        literal, ours = (seconds(rows, side, phase) for side in SIDES)
        measured, expected = ratios(rows, phase), predicted_ratio(rows, phase)
        share = f"{100 * median(measured) / expected:.0f} %" if expected > 0 else "–"
        lines.append([phase, spread(literal), spread(ours), spread(measured, unit="×"), f"{expected:.2f}×", share])
    head = ["phase", "literal, s", "ours, s", "ratio", "predicted", "achieved"]
    return markdown(head, lines)


def count_table(rows: Rows) -> str:
    """What a prompt and a kept pair cost on both sides, in rows."""
    prompts, pairs = (column(rows, "ours", name)[0] for name in ("prompts", "pairs"))
    of = {name: prompts for name in SPANS if column(rows, "ours", f"rows {name}")[0]}
    of |= dict.fromkeys(("policy forward", "reference forward", "backward"), pairs)
    lines = []
    for name, parts in of.items():
        cells = [f"{column(rows, side, f'rows {name}')[0] / parts:.4g}" for side in SIDES]
        lines.append([f"{name}, a {'prompt' if parts == prompts else 'kept pair'}", *cells])
    return markdown(["rows", "literal", "ours"], lines)


def part_table(rows: Rows) -> str:
    """The parts, timed alone."""
    names = dict.fromkeys(part for _, *parts in SPANS.values() for part in parts if part is not None)
    lines = [[name, spread(column(rows, "parts", f"ms {name}"), 3)] for name in names]
    return markdown(["part", "ms a row"], lines)


def rest(rows: Rows, side: str) -> float:
    """Median seconds of a round that no span holds: data handling, merging the LoRA, reading figures, records."""
    spans = [column(rows, side, f"seconds in {name}") for name in SPANS]
    return median(total - sum(parts) for total, *parts in zip(seconds(rows, side, "total"), *spans, strict=True))


def span_table(rows: Rows) -> str:
    """Where a round's seconds go."""
    lines = []
    for name in SPANS:
        lines.append([name, *(f"{median(column(rows, side, f'seconds in {name}')):.3f}" for side in SIDES)])
    lines.append(["data handling and the rest", *(f"{rest(rows, side):.3f}" for side in SIDES)])
    return markdown(["seconds of a round in", "literal", "ours"], lines)


def verdicts(rows: Rows) -> str:
    """The two bars."""
    training, share = median(ratios(rows, TRAINING)), achieved(rows)

    def met(value: float, bar: float) -> str:
        return "met" if value >= bar else "missed"

    return (
        f"Training phase {training:.2f}× faster (at least {TRAINING_BAR}: {met(training, TRAINING_BAR)}); the whole "
        f"round {median(ratios(rows, 'total')):.2f}×, {100 * share:.0f} % of what the parts and the counts predict "
        f"(at least {100 * SHARE_BAR:.0f} %: {met(share, SHARE_BAR)})."
    )


def about(rows: Rows) -> str:
    """What was measured, on what."""
    row = next(row for row in rows if row["side"] == "ours")
    repeats, apart = len(seconds(rows, "ours", "total")), max(column(rows, "ours", "loss difference"))
    return (
        f"One round of {row['prompts']} prompts, {row['pairs']} pairs kept, {row['batches']} optimizer steps, on the "
        f"{row['model']} model; {repeats} repeats by turns, median (least to most); {row['threads']} threads, "
        f"torch {row['torch']}, commit {row['commit']}. Both sides kept the same pairs; their losses "
        f"differ by {apart:.0e} at most."
    )


def report(rows: Rows) -> str:
    """Everything, as Markdown."""
    parts = [about(rows), verdicts(rows), phase_table(rows), count_table(rows), part_table(rows), span_table(rows)]
    return "\n\n".join(parts)


def summary(rows: Rows) -> str:
    """What the README shows."""
    return "\n\n".join([about(rows), phase_table(rows), verdicts(rows), count_table(rows)])


def plot(rows: Rows, path: Path) -> None:
    """A stacked bar a side: where the seconds of a round go."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.2))
    colours, left = plt.get_cmap("tab20").colors, [0.0, 0.0]  # type: ignore[attr-defined]
    for place, name in enumerate([*SPANS, "data handling and the rest"]):
        values = [median(column(rows, s, f"seconds in {name}")) if name in SPANS else rest(rows, s) for s in SIDES]
        axis.barh(SIDES, values, left=left, color=colours[place], label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a round")
    axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
