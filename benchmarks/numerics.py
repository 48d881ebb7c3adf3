"""What half precision costs a step against float64, and what each part that stays in fp32 buys.

    python benchmarks/numerics.py [--models emoji mid] [--report] [--readme]

Policy and reference (the LoRA switched off) of the same batches in fp64, fp32 and several ways of bf16, with a LoRA
that was trained for some steps. A figure is the mean over draws, each a batch of 8 pairs, with their standard
deviation: root mean square errors of the prediction, of the reward and of the logit β/2·Δreward, and one minus the
cosine of DPO's LoRA gradient. Writes results/numerics.csv, .md and .png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from bars import Panel, draw
from common import RESULTS, TABLES, markdown, publish, read_csv
from devices import CPU, add_device, device_of
from precision_arms import (
    AUTOCAST,
    ISLANDS,
    ONE_DTYPE,
    ROUNDED,
    Weights,
    angle,
    compute,
    gradient,
    opened,
    rms,
    weights_of,
)
from worlds import BATCH, MODELS, remeasured

from fastpref.errors import UserError

OUT = RESULTS / "numerics.csv"
BETAS = (2000, 5000)
BETA = 2000  # of the training before, and of the gradient
ARMS = ("fp32", ROUNDED, AUTOCAST, ONE_DTYPE, "no fp32 islands", *ISLANDS)
NAMES = {
    ROUNDED: "fp32 on weights rounded to bf16",
    AUTOCAST: "bf16, autocast over fp32 LoRA weights",
    ONE_DTYPE: "bf16, one dtype with fp32 islands: as trained",
    "no fp32 islands": "bf16, one dtype without islands",
    **{island: f"bf16, in fp32 only: {island}" for island in ISLANDS},
}
FIGURES = {"prediction": "prediction", "reward": "reward", **{f"logit_{b}": f"logit, β = {b}" for b in BETAS}}
FIGURES["angle"] = "1 - cos of the gradient"
DRAWS = {"emoji": 24, "mid": 6}  # batches that are compared
STEPS = 20  # of training before


def recipe(settings: list[str], steps: int) -> list[str]:
    """DPO, adapter-off."""
    return [*settings, "method=dpo", f"beta={BETA}", f"steps={steps}"]


def trained(settings: list[str], steps: int) -> Weights:
    """LoRA weights after ``steps`` in fp32."""
    trainer = opened(settings, "fp32")
    for step in range(steps):
        trainer.step(step)
    trainer.close()
    return weights_of(trainer)


class Draw(NamedTuple):
    """What an arm makes of one batch, in fp64."""

    prediction: torch.Tensor
    rewards: torch.Tensor  # (2, n)
    gradient: torch.Tensor


def draws_of(settings: list[str], arm: str, weights: Weights, draws: int) -> list[Draw]:
    """Each draw in the arithmetic of an arm."""
    trainer, found = opened(settings, arm, weights), []
    for step in range(draws):
        prediction, errors, reference = compute(trainer, step)
        slope = gradient(trainer, errors, reference, BETA)
        found.append(Draw(prediction, reference - errors.detach().double(), slope))
    return found


def figures_of(found: Draw, exact: Draw) -> dict[str, float]:
    """How far one draw is off."""
    reward = found.rewards - exact.rewards
    row = {"prediction": rms(found.prediction - exact.prediction), "reward": rms(reward)}
    row |= {f"logit_{beta}": rms((reward[0] - reward[1]) * beta / 2) for beta in BETAS}
    return row | {"angle": angle(found.gradient, exact.gradient)}


def measure(settings: list[str], draws: int, steps: int) -> list[dict[str, Any]]:
    """A row an arm."""
    settings = recipe(settings, steps)
    weights = trained(settings, steps)
    exact = draws_of(settings, "fp64", weights, draws)
    rows = []
    for arm in ARMS:
        found = [figures_of(*both) for both in zip(draws_of(settings, arm, weights, draws), exact, strict=True)]
        row: dict[str, Any] = {"arm": arm, "draws": draws, "trained_steps": steps}
        for figure in FIGURES:
            values = [one[figure] for one in found]
            row[figure], row[f"{figure}_sd"] = f"{fmean(values):.4g}", f"{stdev(values) if draws > 1 else 0:.2g}"
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def where(row: dict[str, Any]) -> str:
    """The model, and the device unless it is a CPU."""
    return f"{row['model']}{'' if device_of(row) == CPU else f', {device_of(row)}'}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a model and arm."""
    lines = []
    for row in rows:
        figures = [f"{float(row[key]):.2g} ± {float(row[f'{key}_sd']):.1g}" for key in FIGURES]
        lines.append([where(row), NAMES.get(row["arm"], row["arm"]), *figures])
    counts = {where(row): f"{row['draws']} on {where(row)}" for row in rows}
    steps = rows[0]["trained_steps"]
    note = f"Draws of {BATCH} pairs: {', '.join(counts.values())}; the LoRA was trained {steps} steps."
    return f"{markdown(['model', 'pass', *FIGURES.values()], lines)}\n\n{note}"


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Errors of logit and gradient, with one standard deviation."""
    panels = []
    for model in dict.fromkeys(map(where, rows)):
        for key in ("prediction", "logit_2000", "angle"):
            bars = {}
            for row in (row for row in rows if where(row) == model and row["arm"] != "fp32"):
                middle, spread = float(row[key]), float(row[f"{key}_sd"])
                bars[NAMES[row["arm"]]] = {"mean, one standard deviation": [middle - spread, middle, middle + spread]}
            panels.append(Panel(f"{MODELS[model.partition(',')[0]]}", f"{FIGURES[key]}, against fp64", bars))
    draw(panels, out)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("emoji", "mid", "random"), default=("emoji", "mid"))
    add_device(parser)
    parser.add_argument("--draws", type=int, help=f"batches that are compared; without it {DRAWS}")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training before")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="run nothing: table and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into benchmarks/README.md")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = list(read_csv(options.out))
    try:
        rows = remeasured(
            rows,
            () if options.report else options.models,
            options,
            lambda world, model: measure(world, options.draws or DRAWS.get(model, 2), options.steps),
        )
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    text = table(rows)
    print(text)
    publish(options.out, rows, "What half precision costs a step", text, plot, TABLES if options.readme else None)


if __name__ == "__main__":
    main()
