"""Tables and plot of offline_vs_reference.py from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bars import Panel, draw
from common import markdown
from worlds import place, setting_of

SHARE = 0.9  # of the ceiling
METHODS = ("sft", "dpo", "rpo")
SIDES, PUBLIC = ("ours", "ours, ledger"), "public script"
FULL_SIZE = (
    "full: the UNet, VAE and text encoders have SDXL's public shapes and random bf16 weights; the VAE runs in "
    "fp32, as in the public scripts; pictures of 512 px, one pair a step (rpo: two), gradient checkpointing, 3 "
    "repeats of one step; CLIP (rpo) is a small one. The sides hold the UNet's frozen weights once where they "
    "take turns, each its own where memory is measured."
)
ABOUT_PUBLIC = (
    "The public script is diffusers' train_diffusion_dpo_sdxl.py as it is: same model folder, parquet file, "
    "batch, LoRA rank, precision and threads, launched once in every repeat behind the others' turns, its steps "
    "timed from its progress line after two of warm-up. It draws its own noise, so its losses are not compared."
)
ABOUT_EAGER = (
    "A whole compiled step (compile=true; one graph: compile=unet) beside bare passes that are not compiled, by turns "
    "in one process: above 1 it is faster than any eager step could be."
)


def eager_of(side: str) -> str:
    """The name of the bare passes of ``side`` without compile, where ours has it."""
    return f"bare eager, {side}"


def times(rows: Sequence[dict[str, Any]], side: str) -> list[float]:
    """Seconds a step of a side, one a repeat."""
    return [float(row["seconds"]) for row in rows if row["side"] == side and row.get("seconds")]


def ratios(rows: Sequence[dict[str, Any]], over: str, under: str) -> list[float]:
    """The quotient of two sides, one a repeat."""
    return [a / b for a, b in zip(times(rows, over), times(rows, under), strict=True)]


def ceiling(rows: Sequence[dict[str, Any]], side: str) -> float:
    """How much faster than the literal trainer the bare UNet passes of ``side`` are."""
    return median(ratios(rows, "literal", f"bare, {side}"))


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """What was measured together: model (compiled or not, on which device), method, torch."""
    return setting_of(row), str(row["method"]), str(row["torch"])


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(model, method) → rows, models as worlds.py lists them; their name says what else tells two groups apart."""
    several = len({row["torch"] for row in rows}) > 1
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=_place):
        setting, method, version = key_of(row)
        name = f"{setting}{f', torch {version}' if several else ''}"
        found.setdefault((name, method), []).append(row)
    return found


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["torch"], *place(row), METHODS.index(row["method"])


def report(rows: Sequence[dict[str, Any]]) -> str:
    """One line a model, method and side of ours; then those of the public script."""
    lines, public, beyond = [], [], []
    for (name, method), own in groups(rows).items():
        peaks = {row["side"]: row.get("peak_device_bytes") or row.get("peak_rss_bytes") for row in own}
        memory = {side: int(peak) for side, peak in peaks.items() if peak}
        for side in SIDES:
            if times(own, side):
                lines.append([name, method, *_line(own, side, memory)])
            if times(own, eager_of(side)):
                beyond.append([name, method, *_eager_line(own, side)])
        if times(own, PUBLIC):
            public.append([name, method, *_public_line(own)])
    head = ["model", "method", "reference", "literal, ms", "ours, ms", "speed-up (range)", "ceiling", "of the ceiling"]
    text = markdown([*head, f"at least {SHARE:.0%}", "peak memory, literal → ours, GB"], lines)
    if any(row["model"] == "full" for row in rows):
        text += f"\n\n{FULL_SIZE}"
    if beyond:
        head = ["model", "method", "reference", "eager bare passes, ms", "compiled step, ms", "bare over step (range)"]
        text += f"\n\n{markdown([*head, 'beyond the eager ceiling'], beyond)}\n\n{ABOUT_EAGER}"
    if public:
        head = ["model", "method", "public script, ms", "over ours, LoRA off (range)", "over ours, ledger (range)"]
        text += f"\n\n{markdown([*head, 'over the literal trainer (range)'], public)}\n\n{ABOUT_PUBLIC}"
    return text


def _public_line(own: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{1e3 * median(times(own, PUBLIC)):.0f}", *(_spread(ratios(own, PUBLIC, s)) for s in (*SIDES, "literal"))]


def _eager_line(own: Sequence[dict[str, Any]], side: str) -> list[str]:
    eager, found = eager_of(side), ratios(own, eager_of(side), side)
    values = [f"{1e3 * median(times(own, name)):.0f}" for name in (eager, side)]
    return [_reference(own, side), *values, _spread(found), "yes" if median(found) > 1 else "no"]


def _reference(own: Sequence[dict[str, Any]], side: str) -> str:
    return "ledger" if "ledger" in side else "LoRA off" if own[0]["method"] != "sft" else "–"


def _spread(found: Sequence[float]) -> str:
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def _line(own: Sequence[dict[str, Any]], side: str, memory: dict[str, int]) -> list[str]:
    found, most = ratios(own, "literal", side), ceiling(own, side)
    share = median(ratios(own, f"bare, {side}", side))
    return [
        _reference(own, side),
        f"{1e3 * median(times(own, 'literal')):.0f}",
        f"{1e3 * median(times(own, side)):.0f}",
        _spread(found),
        f"{most:.2f}",
        f"{share:.0%}",
        "yes" if share >= SHARE else "no",
        f"{memory['literal'] / 1e9:.2f} → {memory[side] / 1e9:.2f}" if side in memory else "–",
    ]


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Speed-up over the literal trainer and over the public script, beside the ceiling."""
    panels: dict[str, dict[str, dict[str, list[float]]]] = {}
    for (name, method), own in groups(rows).items():
        for side in SIDES:
            if times(own, side):
                bars = {"over the literal trainer": ratios(own, "literal", side)}
                bars["ceiling: bare UNet passes"] = ratios(own, "literal", f"bare, {side}")
                if times(own, eager_of(side)):
                    bars["ceiling without compile"] = ratios(own, "literal", eager_of(side))
                if times(own, PUBLIC):
                    bars["over diffusers' script"] = ratios(own, PUBLIC, side)
                label = method if method == "sft" else f"{method}, {'ledger' if 'ledger' in side else 'LoRA off'}"
                panels.setdefault(name, {})[label] = bars
    draw([Panel(name, "times as fast", found, 1.0, "as fast") for name, found in panels.items()], out)
