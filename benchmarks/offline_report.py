"""The table of offline_vs_reference.py from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from common import markdown

SHARE = 0.9  # of the ceiling


def times(rows: Sequence[dict[str, Any]], side: str) -> list[float]:
    """Seconds a step of a side, one a repeat."""
    return [float(row["seconds"]) for row in rows if row["side"] == side and row.get("seconds")]


def ratios(rows: Sequence[dict[str, Any]], over: str, under: str) -> list[float]:
    """The quotient of two sides, one a repeat."""
    return [a / b for a, b in zip(times(rows, over), times(rows, under), strict=True)]


def ceiling(rows: Sequence[dict[str, Any]], side: str) -> float:
    """How much faster than the literal trainer the bare UNet passes of ``side`` are."""
    return median(ratios(rows, "literal", f"bare, {side}"))


def report(rows: Sequence[dict[str, Any]]) -> str:
    """One line a model, method and side of ours."""
    lines = []
    groups = dict.fromkeys((row["model"], row["method"], str(row["compile"])) for row in rows)
    for model, method, compiled in groups:
        own = [r for r in rows if (r["model"], r["method"], str(r["compile"])) == (model, method, compiled)]
        memory = {row["side"]: int(row["peak_rss_bytes"]) for row in own if row.get("peak_rss_bytes")}
        for side in ("ours", "ours, ledger"):
            if times(own, side):
                lines.append(
                    [f"{model}{', compiled' if compiled == 'True' else ''}", method, *_line(own, side, memory)]
                )
    head = ["model", "method", "reference", "literal, ms", "ours, ms", "speed-up (range)", "ceiling", "of the ceiling"]
    return markdown([*head, f"at least {SHARE:.0%}", "peak memory, literal → ours, GB"], lines)


def _line(own: Sequence[dict[str, Any]], side: str, memory: dict[str, int]) -> list[str]:
    found, most = ratios(own, "literal", side), ceiling(own, side)
    share = median(ratios(own, f"bare, {side}", side))
    return [
        "ledger" if "ledger" in side else "LoRA off" if own[0]["method"] != "sft" else "–",
        f"{1e3 * median(times(own, 'literal')):.0f}",
        f"{1e3 * median(times(own, side)):.0f}",
        f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})",
        f"{most:.2f}",
        f"{share:.0%}",
        "yes" if share >= SHARE else "no",
        f"{memory['literal'] / 1e9:.2f} → {memory[side] / 1e9:.2f}" if side in memory else "–",
    ]
