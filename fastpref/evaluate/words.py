"""What the report says about a run in words and numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.evaluate.charts import number

if TYPE_CHECKING:
    from fastpref.evaluate.pools import Round

SCORERS = {"spm": "step-aware preference model", "lrm": "latent reward model"}
_STEPWISE = ("spo", "lpo")


def headline(config: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> str:
    """What the run did, in one sentence, with the numbers."""
    method = str(config.get("method", "training")).upper()
    accuracies = [_mean_accuracy(result) for result in (before, after)]
    if config.get("method") in SCORERS and None not in accuracies:
        return (
            f"The {SCORERS[config['method']]} tells the preferred picture in {accuracies[1]:.0%} of held-out pairs, "
            f"before training in {accuracies[0]:.0%}"
        )
    shares = before.get("style_share"), after.get("style_share")
    if shares[0] is None or shares[1] is None:
        return f"{method} on {Path(str(config.get('model', '?'))).name}"
    change = shares[1] - shares[0]
    verb = "raised" if change > 0.005 else "lowered" if change < -0.005 else "left"
    span = f"at {shares[1]:.0%}" if verb == "left" else f"from {shares[0]:.0%} to {shares[1]:.0%}"
    return f"{method} {verb} the share of pictures in the preferred style {span}"


def subtitle(config: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """The settings that matter most, each in a few words."""
    words = [f"{config.get('steps', '?')} steps of {config.get('batch_size', '?')} pairs"]
    if config.get("method") in _STEPWISE:
        words.append(f"K {config.get('candidates')}, threshold {_span(config.get('score_threshold'))}")
        words.append(f"scored by {config.get('scorer') or config.get('clip')}")
    if config.get("method") in ("dpo", "rpo", *_STEPWISE):
        words.append(f"β {config.get('beta'):g}")
    if config.get("method") == "rpo":
        words.append(
            f"τ {config.get('temperature'):g}, weights {config.get('weight')}, {config.get('embedding')} similarity"
        )
    if config.get("safeguard"):
        words.append(f"safeguard μ {config['safeguard']:g}")
    lora = config.get("train") == "lora"
    words.append(f"LoRA of rank {config.get('lora_rank')}" if lora else "all weights trained")
    words.append(f"learning rate {number(float(config.get('learning_rate', math.nan)))}")
    if summary.get("seconds_total"):
        words.append(duration(summary["seconds_total"]))
    return words


def metric_rows(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, str]]:
    """The metric table: name, before, after, change, what to hold it against; a number nobody computed is a dash."""
    details = after.get("details") or before.get("details") or {}
    floor, ceiling, chance = details.get("floor"), details.get("ceiling") or {}, details.get("chance") or {}
    base = details.get("base_distance")
    pictures = int(details.get("pictures") or 0)

    def share(name: str, note: str, keys: tuple[str, ...], against: str) -> dict[str, str]:
        values = _dig(before, keys), _dig(after, keys)
        row = _metric_row(name, note, *values, "{:.0%}", against)
        if values[0] is not None and values[1] is not None and _beyond_chance(values[0], values[1], pictures):
            row["verdict"] = "good" if values[1] > values[0] else "bad"
        return row

    def retrieval(k: str, note: str) -> dict[str, str]:
        against = [
            f"{name} {bound[k]:.0%}" for name, bound in (("real pictures", ceiling), ("chance", chance)) if k in bound
        ]
        return share(f"Prompt retrieval, {k.replace('top', 'top ')}", note, ("prompt_retrieval", k), ", ".join(against))

    distances = _dig(before, ("style_distance",)), _dig(after, ("style_distance",))
    note = "Fréchet distance to other real preferred pictures, lower is better"
    against = "" if floor is None else f"real preferred pictures {floor:.3g}"
    against += f", real dispreferred {base:.3g}" if base is not None else ""
    left = _dig(after or before, ("details", "distance_left"))
    against += f"; {max(0.0, left):.0%} of that way is left" if left is not None else ""
    distance = _metric_row("Style distance", note, *distances, "{:.3g}", against)
    if distances[0] is not None and distances[1] is not None and distance["before"] != distance["after"]:
        distance["verdict"] = "good" if distances[1] < distances[0] else "bad"
    return [
        share("Style share", "pictures classified as the preferred style", ("style_share",), ""),
        distance,
        retrieval("top1", "own caption has the nearest real picture"),
        retrieval("top5", "own caption is among the five nearest"),
    ]


def accuracy_rows(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, str]]:
    """The table of a preference model's accuracy on held-out pairs, a row a timestep; empty for other methods."""
    found = [result.get("pair_accuracy") or {} for result in (before, after)]
    pairs = int((after.get("details") or before.get("details") or {}).get("pairs") or 0)
    rows = []
    for timestep in found[1] or found[0]:
        values = found[0].get(timestep), found[1].get(timestep)
        row = _metric_row(f"t = {timestep}", "", *values, "{:.0%}", "")
        if values[0] is not None and values[1] is not None and _beyond_chance(values[0], values[1], pairs):
            row["verdict"] = "good" if values[1] > values[0] else "bad"
        rows.append(row)
    return rows


def result_lines(result: dict[str, Any]) -> list[str]:
    """One evaluation for a terminal: a line a metric, with what to hold it against."""
    lines = []
    for row in metric_rows(result, {}):
        against = f" ({row['against']})" if row["against"] else ""
        lines.append(f"{row['name']}: {row['before']}{against}")
    left_out = (result.get("details") or {}).get("left_out") or {}
    return lines + [f"left out: {reason}" for reason in dict.fromkeys(left_out.values())]


def notes(
    config: dict[str, Any],
    metrics: dict[str, list[float]],
    summary: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
    rounds: Sequence[Round] = (),
) -> list[str]:
    """What a reader should know before trusting the numbers."""
    found = _stepwise_notes(metrics, rounds)
    mean, error = _tail(metrics.get("reward_winner", []))
    if mean < -2 * error and config.get("method") != "sft":
        found.append(
            f"The winners' reward ends below zero ({number(mean)}): the policy denoises the preferred "
            "pictures worse than its reference and wins only because the others got worse still (likelihood "
            "displacement). A safeguard, an SFT term (sft_weight) or a smaller learning rate hold it."
        )
    kept = [_dig(result, ("prompt_retrieval", "top5")) for result in (before, after)]
    if kept[0] and kept[1] is not None and kept[1] < 0.8 * kept[0]:
        found.append(
            "More than a fifth of the prompt retrieval was lost: the pictures show their captions less than before."
        )
    if summary.get("skipped_steps"):
        found.append(f"{summary['skipped_steps']} steps were skipped because their loss was not finite.")
    return found


def _stepwise_notes(metrics: dict[str, list[float]], rounds: Sequence[Round]) -> list[str]:
    """The same of spo and lpo: likelihood ratios, and which pools were trained on."""
    found = []
    mean, error = _tail(metrics.get("ratio_winner", []))
    if mean < 1 - 2 * error:
        found.append(
            f"The winners' likelihood ratio ends below one ({mean:.4g}): the steps preferred have become less likely "
            "than under the reference, only less so than the others (likelihood displacement)."
        )
    clipped = _tail(metrics.get("ratio_clipped", []))[0]
    if clipped > 0.5:
        found.append(
            f"{clipped:.0%} of the likelihood ratios end clipped, and a clipped one gives no gradient. A smaller "
            "learning rate or fewer prompts a round (rollout_prompts) hold the policy nearer to the one that drew them."
        )
    pools, dropped = sum(r.pools for r in rounds), sum(r.dropped for r in rounds)
    if dropped:
        found.append(f"{dropped:,} of {pools:,} pools were dropped because a score of theirs was not finite.")
    if rounds and rounds[-1].pairs_kept < 0.05 * rounds[-1].pools:
        kept = f"{rounds[-1].pairs_kept:,} of {rounds[-1].pools:,} pools"
        found.append(
            f"The last round kept {kept}: the scorer hardly tells the candidates apart any more. A lower "
            "score_threshold keeps more of them."
        )
    return found


def _mean_accuracy(result: dict[str, Any]) -> float | None:
    by_timestep = result.get("pair_accuracy") or {}
    return statistics.fmean(by_timestep.values()) if by_timestep else None


def _span(threshold: Any) -> str:
    ends = threshold if isinstance(threshold, list | tuple) else [threshold]
    return " to ".join(f"{end:g}" if isinstance(end, int | float) else "?" for end in ends)


def _metric_row(
    name: str, note: str, before: float | None, after: float | None, form: str, against: str
) -> dict[str, str]:
    row = {"name": name, "note": note, "against": against, "change": "–", "verdict": ""}
    row["before"] = "–" if before is None else form.format(before)
    row["after"] = "–" if after is None else form.format(after)
    if before is not None and after is not None:
        difference = after - before
        change = f"{100 * difference:+.0f} points" if form.endswith("%}") else f"{difference:+.3g}"
        row["change"] = change.replace("-", "\N{MINUS SIGN}")
    return row


def _beyond_chance(before: float, after: float, pictures: int) -> bool:
    """Whether two shares of so many pictures differ by more than twice the standard error of their difference."""
    variance = before * (1 - before) + after * (1 - after)
    return before != after and abs(after - before) > 2 * math.sqrt(variance / max(1, pictures))


def _dig(result: dict[str, Any], keys: tuple[str, ...]) -> float | None:
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _tail(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the last tenth (at least ten values) and its standard error; NaN if there are fewer than ten."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 10:
        return math.nan, math.nan
    tail = finite[-max(10, len(finite) // 10) :]
    return statistics.fmean(tail), statistics.stdev(tail) / math.sqrt(len(tail))


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
