"""Which curves of a run the report draws, and the words beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastpref.evaluate.charts import Chart, Series, draw
from fastpref.evaluate.pools import Round
from fastpref.evaluate.words import SCORERS


def metric_charts(config: dict[str, Any], metrics: dict[str, list[float]]) -> list[Chart]:
    """The charts over ``metrics.jsonl``'s steps, of the columns that are there."""
    steps = metrics.get("step", [])
    if not steps:
        return []

    def pair(stem: str) -> list[Series]:
        return [Series("winner", metrics[f"{stem}_winner"], "a"), Series("loser", metrics[f"{stem}_loser"], "b")]

    charts = []
    if "loss" in metrics:
        charts.append(draw("Loss", "", steps, [Series("loss", metrics["loss"], "c")]))
    for title, stem, note, line in (
        ("Implicit rewards", "reward", "reference's error − policy's error; above zero the policy is better", 0.0),
        ("Denoising errors", "err", "mean squared error of the policy", None),
        ("Likelihood ratios", "ratio", "policy to reference, of the step taken; above one it became likelier", 1.0),
    ):
        if f"{stem}_winner" in metrics and f"{stem}_loser" in metrics:
            charts.append(draw(title, note, steps, pair(stem), line=line))
    clip = config.get("max_grad_norm")
    clipping = f"before clipping at {clip:g}" if isinstance(clip, int | float) else "not clipped"
    ahead = (
        "likelihood ratio" if "ratio_winner" in metrics else "score" if config.get("method") in SCORERS else "reward"
    )
    for title, key, note, line in (
        (
            "Pairwise accuracy",
            "accuracy",
            f"share of pairs whose winner has the higher {ahead}; a tie is half a win",
            0.5,
        ),
        ("Ratios clipped", "ratio_clipped", "share of likelihood ratios at their bound, which give no gradient", 0.0),
        ("Effective contrasts", "effective_contrasts", "losers that each winner is really compared with", None),
        ("Gradient norm", "grad_norm", clipping, float(clip) if isinstance(clip, int | float) else None),
        ("Learning rate", "lr", "", None),
    ):
        if any(math.isfinite(value) for value in metrics.get(key, [])):
            series = [Series(key.replace("_", " "), metrics[key], "c")]
            charts.append(draw(title, note, steps, series, line=line, raw=key == "lr"))
    return charts


def round_charts(rounds: Sequence[Round]) -> list[Chart]:
    """Scores and pairs kept by timestep, first round against last, and pairs kept by round."""
    if not rounds:
        return []
    first, last = rounds[0], rounds[-1]
    comparable = len(rounds) > 1 and first.timesteps == last.timesteps
    note = f"solid: round {last.number}" + (f"; dashed: round {first.number}" if comparable else "")
    curves = (("best", "score_best", "a"), ("mean", "score_mean", "c"), ("worst", "score_worst", "b"))

    def by_timestep(title: str, words: str, wanted: Sequence[tuple[str, str, str]]) -> Chart:
        earlier = [Series(name, getattr(first, key), style, earlier=True) for name, key, style in wanted]
        series = [*(earlier if comparable else []), *(Series(n, getattr(last, k), s) for n, k, s in wanted)]
        marks = [f"{t:g}" for t in last.timesteps]
        return draw(title, f"{words}; {note}", range(len(marks)), series, raw=True, axis="t", marks=marks)

    kept = [r.pairs_kept / r.pools if r.pools else math.nan for r in rounds]
    by_round = draw(
        "Pairs kept by round",
        "share of all pools of the round",
        [r.number for r in rounds],
        [Series("kept", kept, "c")],
        raw=True,
        axis="round",
        line=0.0,
    )
    return [
        by_timestep("Scores by timestep", "mean over the pools", curves),
        by_timestep(
            "Score gaps by timestep", "best − worst", [("median", "gap_median", "c"), ("needed", "gap_needed", "b")]
        ),
        by_timestep("Pairs kept by timestep", "share of the pools", [("kept", "kept_share", "c")]),
        by_round,
    ]
