"""Line charts as inline SVG: no library in the report, colours from its style sheet, so that dark mode works."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 440, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 10, 28
_MAX_POINTS = 600
_MAX_LABELS = 8
_SMOOTH_FROM = 20  # fewer points are drawn as they are


@dataclass(frozen=True)
class Series:
    """One curve; a value that is not finite is a gap."""

    name: str
    values: Sequence[float]
    style: str = "a"  # class of the style sheet: a, b, c
    earlier: bool = False  # dashed and without a figure: what to compare the curve of the same style with


@dataclass(frozen=True)
class Chart:
    """A small chart and the words around it."""

    title: str
    note: str
    series: list[Series]
    svg: str = ""
    last: list[tuple[str, str, str]] = field(default_factory=list)  # (style, name, final smoothed value)


def draw(
    title: str,
    note: str,
    steps: Sequence[float],
    series: Sequence[Series],
    *,
    line: float | None = None,
    raw: bool = False,
    axis: str = "step",
    marks: Sequence[str] | None = None,
) -> Chart:
    """A chart of one or more curves over the steps.

    Each curve is drawn twice where it is long: raw and faint, and smoothed (exponential, over a twentieth of the run).
    The axis is logarithmic where positive values span more than a factor of 50.

    Args:
        line: a level to mark, e.g. 0 for rewards.
        raw: do not smooth.
        axis: what the steps are, below the left end.
        marks: what to write below the steps in place of their numbers; some are left out where they are many.
    """
    curves = [(s, s.values if raw else smooth(s.values)) for s in series]
    values = [v for s in series for v in s.values if math.isfinite(v)]
    final = [(s.style, s.name, number(_last(curve))) for s, curve in curves if not s.earlier]
    if not values:
        return Chart(title, note, list(series), "", final)
    low, high, logarithmic = _bounds(values, line)
    parts = _frame(steps, low, high, logarithmic, axis, marks)

    def place(step: float, value: float) -> tuple[float, float]:
        return _x(step, steps), _y(value, low, high, logarithmic)

    if line is not None and low <= line <= high:
        level = _y(line, low, high, logarithmic)
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
    for s, curve in curves:
        if curve is not s.values:
            parts.append(f'<path class="raw {s.style}" d="{_path(steps, s.values, place)}"/>')
    for s, curve in curves:
        parts.append(
            f'<path class="curve {s.style}{" earlier" if s.earlier else ""}" d="{_path(steps, curve, place)}"/>'
        )
    label = f"{title}: " + ", ".join(f"{name} ends at {value}" for _, name, value in final)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_escape(label)}">{"".join(parts)}</svg>'
    return Chart(title, note, list(series), svg, final)


def smooth(values: Sequence[float]) -> Sequence[float]:
    """Exponential moving average with its start corrected; gaps stay gaps. Short curves are returned as they are."""
    if len(values) < _SMOOTH_FROM:
        return values
    keep = 1 - 2 / (1 + len(values) / 20)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight if weight and math.isfinite(value) else math.nan)
    return result


def number(value: float) -> str:
    """A value in four characters or so."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two bounds, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _bounds(values: Sequence[float], line: float | None) -> tuple[float, float, bool]:
    ordered = sorted(values)
    # A few outliers must not flatten the rest: cut where one per cent at an end is far from everything else.
    cut = len(ordered) // 100
    low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
    spread = high - low
    low, high = max(ordered[0], low - spread), min(ordered[-1], high + spread)
    if low > 0 and high / low > 50 and (line is None or line > 0):
        return low * 0.8, high * 1.25, True
    if line is not None:
        low, high = min(low, line), max(high, line)
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    floor = 0.0 if low >= 0 and low < 0.3 * high else low - margin
    return floor, high + margin, False


def _frame(
    steps: Sequence[float], low: float, high: float, logarithmic: bool, axis: str, labels: Sequence[str] | None
) -> list[str]:
    parts = []
    if logarithmic:
        decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        marks = [10.0**k for k in decades] or [low, high]
    else:
        marks = ticks(low, high)
    for mark in marks:
        y = _y(mark, low, high, logarithmic)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{number(mark)}</text>')
    parts.append(f'<text x="{_LEFT - 7}" y="{HEIGHT - 9}" text-anchor="end">{_escape(axis)}</text>')
    first, last = steps[0], steps[-1]
    stride = -(-len(steps) // _MAX_LABELS)
    below = {mark: f"{mark:.0f}" for mark in (ticks(first, last, 5) if last > first else [first])}
    if labels is not None:
        below = {steps[i]: labels[i] for i in range(len(steps) - 1, -1, -stride)}
    for mark, label in below.items():
        anchor = "end" if _x(mark, steps) > WIDTH - 24 else "middle"
        parts.append(f'<text x="{_x(mark, steps):.1f}" y="{HEIGHT - 9}" text-anchor="{anchor}">{_escape(label)}</text>')
    return parts


def _x(step: float, steps: Sequence[float]) -> float:
    span = steps[-1] - steps[0]
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * ((step - steps[0]) / span if span else 0.5)


def _y(value: float, low: float, high: float, logarithmic: bool) -> float:
    if logarithmic:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    share = min(1.0, max(0.0, (value - low) / (high - low)))
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _path(steps: Sequence[float], values: Sequence[float], place: object) -> str:
    assert callable(place)
    stride = max(1, len(values) // _MAX_POINTS)
    commands, pen_down = [], False
    for i in range(0, len(values), stride):
        if not math.isfinite(values[i]):
            pen_down = False
            continue
        x, y = place(steps[i], values[i])
        commands.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        if not pen_down:
            commands.append("h0")  # a lone point shows as a dot under round line caps
        pen_down = True
    return "".join(commands)


def _last(values: Sequence[float]) -> float:
    return next((v for v in reversed(values) if math.isfinite(v)), math.nan)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
