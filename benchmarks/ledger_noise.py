"""What the reference ledger adds to the logit β/2·Δreward in bf16, as a function of the batch shape and β.

    python benchmarks/ledger_noise.py [--model emoji|mid|random] [--readme]

A step that switches LoRA off computes policy and reference in the same forward shape: their roundings are the same and
cancel, so an untrained policy has rewards of exactly 0. A ledger computed in another batch shape (other tiles, another
order of summation) keeps its rounding. Here the errors of the same draws are computed in several shapes and compared
with those of training's own; rows are written for the root mean square of the logit's noise at several β, in bf16 and
fp32. Writes results/ledger_noise.csv and .md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, fill, markdown, provenance, write_csv
from worlds import BATCH, MODELS, open_world, trainer_of

from fastpref.atomic import write_bytes
from fastpref.train.figures import MAX_LOGIT_NOISE
from fastpref.train.offline import OfflineTrainer
from fastpref_kernels import implicit_reward

OUT = RESULTS / "ledger_noise.csv"
BETAS = (100, 500, 2000, 5000)
SHAPES = (1, 2, 4, 8)  # pairs of a forward; training's is the last


def errors(trainer: OfflineTrainer, pairs: int, steps: int, *, policy: bool) -> torch.Tensor:
    """(2, steps·batch) errors of the first ``steps``, computed ``pairs`` at a time by the untrained policy as in
    training, or by the reference without a graph."""
    found = []
    for step in range(steps):
        plan = trainer.sampler.batch(step)
        for start in range(0, BATCH, pairs):
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
    """Rows ``precision, pairs, beta, noise``."""
    rows: list[dict[str, Any]] = []
    for precision in ("bf16", "fp32"):
        trainer = trainer_of(settings, "method=dpo", f"precision={precision}")
        own = errors(trainer, BATCH, steps, policy=True)
        for pairs in SHAPES:
            table = errors(trainer, pairs, steps, policy=False)
            rows += [
                {"precision": precision, "pairs": pairs, "beta": beta, "noise": f"{noise(own, table, beta):.3g}"}
                for beta in BETAS
            ]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a precision and shape, one column a β."""
    lines = []
    for precision, pairs in dict.fromkeys((row["precision"], row["pairs"]) for row in rows):
        own = {row["beta"]: row["noise"] for row in rows if (row["precision"], row["pairs"]) == (precision, pairs)}
        mark = ", as in training" if pairs == BATCH else ""
        lines.append([precision, f"{pairs}{mark}", *(str(own[beta]) for beta in BETAS)])
    head = ["precision", "pairs a forward of the ledger", *(f"β = {beta}" for beta in BETAS)]
    note = (
        f"Training is refused above {MAX_LOGIT_NOISE}. What keeps it below in half precision: the ledger is made in "
        "forwards of training's own shape, and one of another micro-batch or compile setting is not accepted."
    )
    return f"{markdown(head, lines)}\n\n{note}"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="emoji")
    parser.add_argument("--steps", type=int, default=4, help=f"batches of {BATCH} pairs that are compared")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--readme", action="store_true", help="also put the table into README.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(open_world(options.model, Path(folder)), options.steps)
    about = {"model": options.model, "threads": torch.get_num_threads()}
    write_csv(options.out, [about | row | provenance() for row in rows])
    write_bytes(
        options.out.with_suffix(".md"), f"# Rounding that a ledger leaves in the logit\n\n{table(rows)}\n".encode()
    )
    if options.readme:
        fill(ROOT / "README.md", "table: ledger_noise", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
