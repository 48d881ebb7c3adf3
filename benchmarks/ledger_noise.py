"""The noise that half precision leaves in the logit β/2·Δreward, by where the reference's errors come from.

    python benchmarks/ledger_noise.py [--models emoji mid] [--report] [--readme]

With the LoRA switched off in the step, the roundings of policy and reference are the same, and cancel, until the LoRA
leaves zero. So an adapter-off DPO run in bf16 is stopped after 0, 1, 10 and 100 steps, and its weights' logits are
taken with several references: switched off in bf16; a ledger made in bf16 by the same pass; one by a pass that rounds
otherwise, as a GPU's may; ledgers made in fp32, of the weights as a bf16 pass rounds them or as they are in the file.
Each against fp32 with the same weights: root mean square of the logit's error, one minus the cosine of DPO's LoRA
gradient. Writes results/ledger_noise.csv, .md and .png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from bars import Panel, draw
from common import RESULTS, TABLES, markdown, publish, read_csv
from devices import CPU, add_device, device_of
from precision_arms import (
    ONE_DTYPE,
    ROUNDED,
    Weights,
    angle,
    compute,
    errors_of,
    gradient,
    load,
    logit,
    opened,
    rms,
    weights_of,
)
from torch import Tensor
from worlds import BATCH, MODELS, config_of, remeasured

from fastpref.errors import UserError
from fastpref.models.loading import model_dir_of, resolve_device
from fastpref.train.offline import OfflineTrainer
from fastpref.train.reference import open_reference
from fastpref.train.untrained import rounding_apart

OUT = RESULTS / "ledger_noise.csv"
BETAS = (2000, 5000)
BETA = 2000  # of the training
STEPS = (0, 1, 10, 100)
DRAWS = {"emoji": 16, "mid": 4}  # batches that are compared
OFF, ESTIMATE = "adapter off", "adapter off, as the first step estimates it"
LEDGERS = {  # the settings that it is made with
    "ledger, bf16, same pass": ("precision=bf16", "ledger_precision=training"),
    "ledger, bf16, rounded otherwise": ("precision=bf16", "ledger_precision=training", "fused_ops=true"),
    "ledger, fp32": ("precision=bf16", "ledger_precision=fp32"),
    "ledger, fp32, weights of the file": ("precision=fp32",),
}


def ledger_of(trainer: OfflineTrainer, settings: list[str], made: Sequence[str], draws: int) -> list[Tensor]:
    """(2, n) errors of each draw, as ``prepare --reference`` computes them."""
    config = config_of(settings, *made)
    reference = open_reference(config, model_dir_of(config), resolve_device(config.device))
    found = []
    for step in range(draws):
        batch = trainer.batches.build(trainer.sampler.batch(step), slice(0, BATCH))
        prediction = reference.predict_reference(batch.noisy, batch.timesteps, batch.conditioning)
        found.append(errors_of(prediction, batch.target).double())
    return found


def stops(settings: list[str], until: Sequence[int]) -> dict[int, Weights]:
    """The LoRA's weights after so many steps of an adapter-off run in bf16."""
    trainer, found = opened(settings, ONE_DTYPE), {}
    for step in range(max(until) + 1):
        if step in until:
            found[step] = weights_of(trainer)
        if step < max(until):
            trainer.step(step)
    trainer.close()
    return found


def measure(settings: list[str], draws: int, until: Sequence[int]) -> list[dict[str, Any]]:
    """Rows ``steps, reference, logit_β, noise_β, angle_2000``, the first of them the true logit's root mean square."""
    settings = [*settings, "method=dpo", f"beta={BETA}", f"steps={max(until) + draws}"]
    weights = stops(settings, until)
    trainer, exact = opened(settings, ONE_DTYPE), opened(settings, ROUNDED)
    ledgers = {name: ledger_of(trainer, settings, made, draws) for name, made in LEDGERS.items()}
    rows = [estimate(trainer, draws)]
    for steps, trained in weights.items():
        load(trainer, trained)
        load(exact, trained)
        found: dict[tuple[str, str], list[float]] = {}
        for step in range(draws):
            table = {name: errors[step] for name, errors in ledgers.items()}
            for name, figures in compared(trainer, exact, step, table).items():
                for figure, value in figures.items():
                    found.setdefault((name, figure), []).append(value)
        for name in (OFF, *LEDGERS):
            row = {figure: values for (owner, figure), values in found.items() if owner == name}
            squares = {f: fmean(v * v for v in values) ** 0.5 for f, values in row.items() if not f.startswith("angle")}
            means = {f: fmean(values) for f, values in row.items() if f.startswith("angle")}
            rows.append({"steps": steps, "reference": name, **{f: f"{v:.4g}" for f, v in (squares | means).items()}})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def estimate(trainer: OfflineTrainer, draws: int) -> dict[str, Any]:
    """The row of what a run with a ledger says of itself: how far forwards lie apart that round independently."""
    batches = [trainer.batches.build(trainer.sampler.batch(step), slice(0, BATCH)) for step in range(draws)]
    winners, losers = torch.cat([rounding_apart(trainer.policy, batch, 1) for batch in batches], dim=1)
    row: dict[str, Any] = {"steps": 0, "reference": ESTIMATE, f"angle_{BETA}": ""}
    for beta in BETAS:
        row |= {f"logit_{beta}": "0", f"noise_{beta}": f"{rms(winners - losers) * beta / 2:.4g}"}
    return row


def compared(
    trainer: OfflineTrainer, exact: OfflineTrainer, step: int, ledgers: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """One batch: by reference, its figures."""
    _, errors, off = compute(trainer, step)
    _, true_errors, true_reference = compute(exact, step)
    slope = gradient(exact, true_errors, true_reference, BETA)
    figures: dict[str, dict[str, float]] = {}
    for name, reference in {OFF: off, **ledgers}.items():
        own = figures[name] = {}
        for beta in BETAS:
            true = logit(true_errors, true_reference, beta)
            own[f"logit_{beta}"] = rms(true)
            own[f"noise_{beta}"] = rms(logit(errors, reference, beta) - true)
        own[f"angle_{BETA}"] = angle(gradient(trainer, errors, reference, BETA), slope)
    return figures


def where(row: dict[str, Any]) -> str:
    """The model, and the device unless it is a CPU."""
    return f"{row['model']}{'' if device_of(row) == CPU else f', {device_of(row)}'}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a model, stop and reference."""
    columns = [*(f"noise_{beta}" for beta in BETAS), f"angle_{BETA}"]
    lines = []
    for row in rows:
        figures = [f"{float(row[key]):.2g}" if row[key] != "" else "–" for key in columns]
        lines.append([where(row), str(row["steps"]), f"{float(row['logit_2000']):.2g}", row["reference"], *figures])
    head = ["model", "after steps", "the logit itself, β = 2000", "reference"]
    head += [*(f"noise, β = {beta}" for beta in BETAS), f"1 - cos of the gradient, β = {BETA}"]
    return markdown(head, lines)


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """The logit's noise at β 2000 by reference and number of steps."""
    panels = []
    for model in dict.fromkeys(map(where, rows)):
        own = [row for row in rows if where(row) == model]
        bars = {
            name: {f"after {row['steps']}": [float(row["noise_2000"])] for row in own if row["reference"] == name}
            for name in dict.fromkeys(row["reference"] for row in own)
        }
        panels.append(Panel(MODELS[model.partition(",")[0]], "noise in the logit, β = 2000, bf16", bars))
    draw(panels, out)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("emoji", "mid", "full", "random"), default=("emoji", "mid"))
    add_device(parser)
    parser.add_argument("--draws", type=int, help=f"batches that are compared; without it {DRAWS}, else 2")
    parser.add_argument("--short", action="store_true", help="one batch of the emoji model, two stops, no CSV")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="run nothing: table and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into benchmarks/README.md")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = [] if options.short else list(read_csv(options.out))
    try:
        models = ("emoji",) if options.short else () if options.report else options.models
        until = (0, 1) if options.short else STEPS

        def measured(world: list[str], model: str) -> list[dict[str, Any]]:
            return measure(world, 1 if options.short else options.draws or DRAWS.get(model, 2), until)

        rows = remeasured(rows, models, options, measured)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    text = table(rows)
    print(text)
    if options.short:
        return
    readme = TABLES if options.readme else None
    publish(options.out, rows, "Noise that half precision leaves in the logit", text, plot, readme)


if __name__ == "__main__":
    main()
