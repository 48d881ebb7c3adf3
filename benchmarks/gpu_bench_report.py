"""What gpu_bench.csv says: the bars of the training step on a GPU, and a table a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bars import Panel, draw
from common import markdown
from devices import CPU, device_of

Row = dict[str, Any]
H200 = "H200"  # the card that the bars in milliseconds are of
NOT_MEASURED = "not measured"
GIB = 1 << 30


class Found:
    """The rows of one run, and what follows from them; None where a row is lacking."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def median(self, part: str, arm: str, column: str = "ms", **where: str) -> float | None:
        """Of an arm's repeats."""
        own = [row for row in self.rows if row["part"] == part and row["arm"] == arm]
        own = [row for row in own if all(str(row.get(name)) == value for name, value in where.items())]
        values = [float(row[column]) for row in own if row.get(column) not in (None, "")]
        return median(values) if values else None

    def ratio(self, above: tuple[str, ...], below: tuple[str, ...]) -> float | None:
        """Of two medians, given as the arguments of :meth:`median`."""
        a, b = self.median(*above), self.median(*below)
        return None if a is None or not b else a / b

    def flops(self, part: str, arm: str) -> float | None:
        """Operations of a step's passes without recomputation: counted a row, times the rows that it took."""
        full = part == "full" or arm.startswith("all weights")
        kind = "all weights" if full else "lora"
        found = [self.quantity(f"{side} of a row, {kind}") for side in ("forward", "backward")]
        rows = [self.median(part, arm, f"{side}_rows") for side in ("forward", "backward")]
        numbers = [value for value in (*found, *rows) if value is not None]
        return numbers[0] * numbers[2] + numbers[1] * numbers[3] if len(numbers) == 4 else None

    def quantity(self, name: str) -> float | None:
        """A count that stands in a row of its own."""
        values = [float(row["flops"]) for row in self.rows if row.get("quantity") == name]
        return median(values) if values else None

    def limit_ms(self, part: str, arm: str) -> float | None:
        """Milliseconds of the arm's operations at the rate of matrix products that this run measured."""
        flops, rate = self.flops(part, arm), self.median("rates", "bf16 matrix product", "tflop_s")
        return None if flops is None or not rate else 1e3 * flops / (rate * 1e12)

    def over_limit(self, part: str, arm: str) -> float | None:
        """Measured over :meth:`limit_ms`."""
        ms, least = self.median(part, arm), self.limit_ms(part, arm)
        return None if ms is None or not least else ms / least

    def idle(self, part: str, arm: str) -> float | None:
        """Percent of a step in which the device ran nothing."""
        ms, busy = self.median(part, arm), self.median(part, arm, "busy_ms")
        return None if busy is None or not ms else 100 * max(0.0, 1 - busy / ms)

    def gib(self, part: str, arm: str) -> float | None:
        """Most memory of the device."""
        peak = self.median(part, arm, "peak_device_bytes")
        return None if peak is None else peak / GIB

    def spo(self, column: str) -> float | None:
        """The literal order of work over ours."""
        sides = [self.median("spo", "round", column, side=side) for side in ("literal", "ours")]
        return None if sides[0] is None or not sides[1] else sides[0] / sides[1]

    def notes(self, part: str, arm: str) -> str:
        """What stopped the arm, or what it was refused for."""
        said = [str(row.get("note") or "") for row in self.rows if (row["part"], row["arm"]) == (part, arm)]
        return next((note for note in said if note.startswith(("refused", "failed"))), "")

    def attention(self) -> dict[tuple[str, str], float]:
        """Milliseconds of all layers' attention by (rows, backend), where every shape was measured."""
        own = [row for row in self.rows if row["part"] == "attention"]
        found: dict[tuple[str, str], float] = {}
        for rows, backend in dict.fromkeys((str(row["rows"]), row["backend"]) for row in own):
            shapes = {row["shape"]: int(row["layers"]) for row in own if str(row["rows"]) == rows}
            times = [(self.median("attention", f"{backend}: {shape}"), n) for shape, n in shapes.items()]
            measured = [ms * layers for ms, layers in times if ms is not None]
            if len(measured) == len(shapes):
                found[rows, backend] = sum(measured)
        return found


@dataclass(frozen=True)
class Bar:
    """One thing that a step has to reach.

    Attributes:
        arm, part: whose notes say why it may not count.
        h200: the bound is milliseconds of an H200, which on another card says nothing.
    """

    what: str
    arm: str
    unit: str
    bound: float
    measure: Callable[[Found], float | None]
    at_most: bool = True
    h200: bool = False
    part: str = "steps"

    def verdict(self, found: Found, device: str) -> tuple[str, str]:
        """(measured, met), as the table says them."""
        value, note = self.measure(found), found.notes(self.part, self.arm)
        if value is None:
            return "", note or NOT_MEASURED
        shown = f"{value:.4g} {self.unit}"
        if device == CPU:
            return shown, "a rehearsal"
        if note:
            return shown, f"no: {note}"
        if self.h200 and H200 not in device:
            return shown, "an H200's bar"
        return shown, "yes" if (value <= self.bound if self.at_most else value >= self.bound) else "no"


def _ms(what: str, arm: str, bound: float) -> Bar:
    return Bar(what, arm, "ms", bound, lambda found: found.median("steps", arm), h200=True)


def _faster(what: str, arm: str, bound: float) -> Bar:
    public = ("public", "as it is")
    return Bar(
        f"{what}, of the public script", arm, "×", bound, lambda f: f.ratio(public, ("steps", arm)), at_most=False
    )


def _over(what: str, arm: str, other: str, bound: float) -> Bar:
    return Bar(what, arm, "×", bound, lambda found: found.ratio(("steps", arm), ("steps", other)))


def _idle(what: str, arm: str) -> Bar:
    return Bar(f"time the GPU idles: {what}", arm, "%", 5, lambda found: found.idle("steps", arm))


def _spo(what: str, phase: str, bound: float) -> Bar:
    return Bar(what, "round", "×", bound, lambda found: found.spo(phase), at_most=False, part="spo")


def _full_over_limit(found: Found) -> float | None:
    return found.over_limit("full", "rpo-full")


BARS = (
    _ms("DPO, 4 pairs, adapter off", "dpo-4", 560),
    _faster("DPO, 4 pairs, adapter off", "dpo-4", 2.6),
    _ms("DPO, 4 pairs, ledger", "dpo-4-ledger", 385),
    _faster("DPO, 4 pairs, ledger", "dpo-4-ledger", 3.8),
    _ms("DPO, one pair a forward, ledger", "dpo-1-ledger", 125),
    _ms("DPO, 4 pairs, full recomputation", "dpo-4-recompute", 750),
    Bar(
        "DPO, 4 pairs, full recomputation: memory",
        "dpo-4-recompute",
        "GiB",
        11,
        lambda found: found.gib("steps", "dpo-4-recompute"),
    ),
    _over("RPO over DPO, adapter off", "rpo-4", "dpo-4", 1.05),
    _over("RPO over DPO, ledger", "rpo-4-ledger", "dpo-4-ledger", 1.05),
    _over("RPO over DPO, four micro-batches, ledger, kept graphs", "rpo-4x1-kept-ledger", "dpo-4x1-ledger", 1.10),
    Bar("full fine-tuning over its arithmetic limit", "rpo-full", "×", 2.2, _full_over_limit, part="full"),
    Bar("full fine-tuning: memory", "rpo-full", "GiB", 45, lambda found: found.gib("full", "rpo-full"), part="full"),
    _idle("DPO, 4 pairs, adapter off", "dpo-4"),
    _idle("DPO, 4 pairs, ledger", "dpo-4-ledger"),
    _idle("DPO, one pair, ledger", "dpo-1-ledger"),
    _spo("SPO, training, of the literal order of work", "training_ms", 1.95),
    _spo("SPO, rollout with scoring, of the same", "rollout_ms", 1.5),
)


def runs_of(rows: Sequence[Row]) -> dict[tuple[str, str], list[list[Row]]]:
    """By (device, model) the runs' rows, the newest run first: no ratio is taken across two runs."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault((device_of(row), row["model"]), {}).setdefault(str(row["run"]), []).append(row)
    return {key: [runs[name] for name in sorted(runs, reverse=True)] for key, runs in found.items()}


def bars_table(rows: Sequence[Row]) -> str:
    """The bars, a device and model after the other; each from the newest run that has what it needs."""
    parts = []
    for (device, model), runs in (runs_of(rows) or {("no GPU yet", "sdxl"): [[]]}).items():
        lines = []
        for bar in BARS:
            verdicts = [bar.verdict(Found(run), device) for run in runs]
            measured, met = next((v for v in verdicts if v[1] != NOT_MEASURED), verdicts[0])
            lines.append([bar.what, f"{'≤' if bar.at_most else '≥'} {bar.bound:g} {bar.unit}", measured, met])
        parts.append(f"**{model}, {device}**\n\n" + markdown(["what", "bar", "measured", "met"], lines))
    return "\n\n".join(parts)


def report(rows: Sequence[Row]) -> str:
    """Bars, then the newest run of each device: steps with their limits, rates, attention, SPO and the other parts."""
    parts = [bars_table(rows)]
    for (device, model), runs in runs_of(rows).items():
        found = Found(runs[0])
        parts += [f"**{model}, {device}: the newest run**", steps_table(found)]
        if shares := found.attention():
            parts.append(attention_lines(shares))
        rates = [found.median("rates", "bf16 matrix product", "tflop_s"), found.median("rates", "copy", "gb_s")]
        if None not in rates:
            parts.append(f"bf16 matrix products {rates[0]:.4g} TFLOP/s, copy {rates[1]:.4g} GB/s.")
        an_hour = [found.median("spo", "round", "prompts_an_hour", side=side) for side in ("ours", "literal")]
        if None not in an_hour:
            parts.append(f"SPO: {an_hour[0]:.4g} prompts an hour, by the literal order of work {an_hour[1]:.4g}.")
        if ratios := kernel_lines(found):
            parts.append(ratios)
        notes = dict.fromkeys(
            f"{row['part']}, {row.get('backend') or row['arm']}: {row['note']}" for row in runs[0] if row.get("note")
        )
        parts += ["\n".join(f"* {note}" for note in notes)] if notes else []
    return "\n\n".join(parts)


def steps_table(found: Found) -> str:
    """Every arm that was timed: median, limit, share of the matrix rate, idle share, memory."""
    lines = []
    for part, arm in dict.fromkeys((row["part"], row["arm"]) for row in found.rows if row["part"] not in _OTHERS):
        ms = found.median(part, arm)
        if ms is None:
            continue
        numbers = [found.limit_ms(part, arm), None, found.idle(part, arm), found.gib(part, arm)]
        numbers[1] = None if not numbers[0] else 100 * numbers[0] / ms
        lines.append([part, arm, f"{ms:.4g}", *("" if n is None else f"{n:.3g}" for n in numbers)])
    return markdown(["part", "arm", "ms a step", "limit, ms", "of the matrix rate, %", "idle, %", "GiB"], lines)


_OTHERS = ("rates", "attention", "spo", "kernels")


def kernel_lines(found: Found) -> str:
    """Ours and eager torch's milliseconds of every kernel, the slowest ratio first."""
    own = dict.fromkeys(row["arm"].rpartition(", ")[0] for row in found.rows if row["part"] == "kernels")
    lines = []
    for name in own:
        ours, eager = (found.median("kernels", f"{name}, {form}") for form in ("fastpref", "eager bf16"))
        if ours is not None and eager:
            lines.append((ours / eager, [name, f"{ours:.3g}", f"{eager:.3g}", f"{ours / eager:.2f}"]))
    ordered = [line for _, line in sorted(lines, key=lambda item: -item[0])]
    return markdown(["kernel", "ours, ms", "eager bf16, ms", "ours / eager"], ordered) if ordered else ""


def attention_lines(shares: dict[tuple[str, str], float]) -> str:
    """Which backend is the fastest, and how much ``auto`` (torch's own choice) leaves."""
    lines = []
    for rows in dict.fromkeys(rows for rows, _ in shares):
        own = {backend: ms for (of, backend), ms in shares.items() if of == rows}
        best = min(own, key=lambda name: own[name])
        listed = ", ".join(f"{name} {ms:.4g}" for name, ms in sorted(own.items(), key=lambda item: item[1]))
        lines.append(f"Attention of {rows} rows, all layers, forward and backward, ms: {listed}. Fastest: {best}.")
    return "\n\n".join(lines)


def plot(rows: Sequence[Row], out: Path) -> None:
    """Milliseconds of the steps and their arithmetic limits, a device below the other."""
    panels = []
    for (device, model), runs in runs_of(rows).items():
        found, groups = Found(runs[0]), {}
        for part, arm in dict.fromkeys((row["part"], row["arm"]) for row in runs[0]):
            if part in ("steps", "full", "public", "bare"):
                series = {"measured": found.median(part, arm), "arithmetic limit": found.limit_ms(part, arm)}
                groups[f"{part}: {arm}"] = {name: [ms] for name, ms in series.items() if ms is not None}
        panels.append(Panel(f"{model}, {device}", "ms a step", {k: v for k, v in groups.items() if v}))
    if panels := [panel for panel in panels if panel.groups]:
        draw(panels, out)
