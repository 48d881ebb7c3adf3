"""What the reference ledger adds to the logit β/2·Δreward in bf16, as a function of the batch shape and β.

    python benchmarks/ledger_noise.py [--models emoji mid] [--report] [--readme]

A step that switches LoRA off computes policy and reference in the same forward shape: their roundings are the same and
cancel, so an untrained policy has rewards of exactly 0. A ledger computed in another batch shape (other tiles, another
order of summation) or by other arithmetic keeps its rounding. Here the errors of the same draws are computed in several
shapes, with the fused operators, and in fp32 instead of bf16, where nothing cancels: the most
that bf16 can add. Each is compared with those of training's own forwards; a row is the root mean square of the logit's
noise at a β. Writes results/ledger_noise.csv, .md and .png.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bars import Panel, draw
from common import RESULTS, TABLES, markdown, provenance, publish, read_csv
from devices import CPU, add_device, device_of, name_of, open_device
from worlds import BATCH, MODELS, open_world, trainer_of

from fastpref.errors import UserError
from fastpref.train.figures import MAX_LOGIT_NOISE
from fastpref.train.offline import OfflineTrainer
from fastpref_kernels import implicit_reward

OUT = RESULTS / "ledger_noise.csv"
BETAS = (100, 500, 2000, 5000)
SHAPES = (1, 2, 4, 8, 16, 32)  # pairs of a forward
DRAWN = 32  # pairs of a batch that is cut into those shapes; training's forwards are of BATCH
FLOOR = 1e-8  # where the plot puts 0


def errors(trainer: OfflineTrainer, pairs: int, steps: int, *, policy: bool) -> torch.Tensor:
    """(2, steps·DRAWN) errors of the first ``steps``, computed ``pairs`` at a time by the untrained policy as in
    training, or by the reference without a graph."""
    found = []
    for step in range(steps):
        plan = trainer.sampler.batch(step)
        for start in range(0, DRAWN, pairs):
            batch = trainer.batches.build(plan, slice(start, start + pairs))
            predict = trainer.policy.predict if policy else trainer.policy.predict_reference
            pred = predict(batch.noisy, batch.timesteps, batch.conditioning).detach()
            found.append(-implicit_reward(pred, batch.target).double().view(2, -1))
    return torch.cat(found, dim=1)


def noise(training: torch.Tensor, ledger: torch.Tensor, beta: float) -> float:
    """Root mean square of β/2·(δ_w - δ_l), δ the difference of two (2, n) tables of errors."""
    apart = ledger - training
    return float((apart[0] - apart[1]).square().mean().sqrt() * beta / 2)


def measure(settings: list[str], steps: int) -> list[dict[str, Any]]:
    """Rows ``precision, ledger, beta, noise``."""
    rows: list[dict[str, Any]] = []
    recipe = (*settings, "method=dpo", f"batch_size={DRAWN}", f"micro_batch_size={BATCH}")
    for precision in ("bf16", "fp32"):
        trainer = trainer_of([*recipe, f"precision={precision}"])
        own = errors(trainer, BATCH, steps, policy=True)
        tables = {f"{pairs} pairs a forward": errors(trainer, pairs, steps, policy=False) for pairs in SHAPES}
        if precision == "bf16":
            for name, change in (("with fused_ops", "fused_ops=true"), ("computed in fp32", "precision=fp32")):
                other = trainer_of([*recipe, f"precision={precision}", change])
                tables[name] = errors(other, BATCH, steps, policy=False)
        for name, table in tables.items():
            rows += [
                {"precision": precision, "ledger": name, "beta": beta, "noise": f"{noise(own, table, beta):.3g}"}
                for beta in BETAS
            ]
    return rows


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], dict[int, str]]:
    """(model and device, precision, ledger) → β → noise."""
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        place = "" if device_of(row) == CPU else f", {device_of(row)}"
        key = row["model"] + place, row["precision"], row["ledger"]
        found.setdefault(key, {})[int(row["beta"])] = str(row["noise"])
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a model, precision and ledger, one column a β."""
    lines = []
    for (model, precision, ledger), own in groups(rows).items():
        mark = ", as in training" if ledger == f"{BATCH} pairs a forward" else ""
        lines.append([model, precision, f"{ledger}{mark}", *(own[beta] for beta in BETAS)])
    head = ["model", "training in", "ledger", *(f"β = {beta}" for beta in BETAS)]
    note = (
        f"Training is refused above {MAX_LOGIT_NOISE}. What keeps it below in half precision: the ledger is made in "
        "the same precision and in forwards of training's own shape; one of another micro-batch, attention, fused_ops "
        "or compile setting is not accepted, and the first step, where every reward has to be 0, measures what is left."
    )
    return f"{markdown(head, lines)}\n\n{note}"


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """The noise of every ledger, on a logarithmic axis that shows 0 as its left end."""
    panels = []
    for setting, precision in dict.fromkeys(key[:2] for key in groups(rows)):
        own = {key[2]: found for key, found in groups(rows).items() if key[:2] == (setting, precision)}
        bars = {
            ledger: {f"β = {beta}": [max(float(found[beta]), FLOOR)] for beta in BETAS} for ledger, found in own.items()
        }
        model, _, place = setting.partition(", ")
        title = f"{MODELS[model]}; training in {precision}{place and f' on {place}'}"
        axis = "noise in the logit (0 at the left end)"
        panels.append(Panel(title, axis, bars, MAX_LOGIT_NOISE, "refused above", logarithmic=True))
    draw(panels, out)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("emoji", "mid", "random"), default=("emoji", "mid"))
    add_device(parser)
    parser.add_argument("--steps", type=int, default=1, help=f"batches of {DRAWN} pairs that are compared")
    parser.add_argument("--short", action="store_true", help="one batch of the emoji model, no CSV")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="run nothing: table and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into benchmarks/README.md")
    options = parser.parse_args()
    try:
        device = name_of(open_device(options))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    rows: list[dict[str, Any]] = [] if options.short else list(read_csv(options.out))
    for model in ("emoji",) if options.short else () if options.report else options.models:
        about = {"model": model, "device": device, "threads": torch.get_num_threads()}
        with tempfile.TemporaryDirectory() as folder:
            world = open_world(model, Path(folder), [f"device={options.device}"])
            found = measure(world, 1 if options.short else options.steps)
        kept = [row for row in rows if (row["model"], device_of(row)) != (model, device)]
        rows = [*kept, *(about | row | provenance() for row in found)]
    if not rows:
        print(UserError("no rows to report", str(options.out), "run the benchmark first"), file=sys.stderr)
        sys.exit(2)
    text = table(rows)
    print(text)
    if options.short:
        return
    readme = TABLES if options.readme else None
    publish(options.out, rows, "Rounding that a ledger leaves in the logit", text, plot, readme)


if __name__ == "__main__":
    main()
