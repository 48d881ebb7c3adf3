"""How far a step is from the physical limit: our step over the bare UNet passes that its method needs.

    python benchmarks/limit.py [--quick] [--device cpu|cuda] [--model emoji|mid|full] [--compile [unet]] [--readme]

Ours and the bare passes take turns in one process on the same batch. The limit of a method is a policy forward and
backward, with the reference switched in by LoRA a reference forward too, and for RPO over several micro-batches with
rewards first another policy forward. Writes results/limit.csv, and .md and .png of all models in it; the last line is
``ratio NAME VALUE …``. ``--model full`` takes a few arms and 3 repeats, 20 minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bars import Panel, draw
from common import RESULTS, TABLES, markdown, provenance, publish, read_csv
from devices import add_device, device_of, forget_peak, name_of, open_device, peak_device_bytes, seconds, warm_up_steps
from worlds import MODELS, add_compile, open_world, place, setting_of, trainer_of

from fastpref.errors import UserError
from fastpref.train.batch import PairBatch
from fastpref.train.offline import OfflineTrainer

OUT = RESULTS / "limit.csv"
TARGET = 1.10
ARMS = {
    "sft": ["method=sft"],
    "dpo": ["method=dpo"],
    "dpo-ledger": ["method=dpo", "reference=ledger"],
    "rpo": ["method=rpo"],
    "rpo-ledger": ["method=rpo", "reference=ledger"],
    "rpo-2-ledger": ["method=rpo", "reference=ledger", "micro_batch_size=4"],
    "rpo-2-kept-ledger": ["method=rpo", "reference=ledger", "micro_batch_size=4", "accumulation=keep_graphs"],
}
QUICK = ("dpo", "dpo-ledger", "rpo-ledger")
# One pair a forward, so that RPO's two pairs are two micro-batches.
FULL_SIZE = {"dpo": ARMS["dpo"], "dpo-ledger": ARMS["dpo-ledger"], "rpo-2": ["method=rpo", "batch_size=2"]}


class Bare:
    """The UNet passes of a trainer's step and nothing else, on batches that are built beforehand."""

    def __init__(self, trainer: OfflineTrainer) -> None:
        self.trainer, self.policy = trainer, trainer.policy
        plan = trainer.sampler.batch(0)
        self.batches = [trainer.batches.build(plan, rows) for rows in trainer.micro_batches(trainer.config.batch_size)]
        self.extra_forward = len(self.batches) > 1 and trainer.config.accumulation == "rewards_first"
        self.extra_forward = self.extra_forward and trainer.objective.couples_pairs
        self.reference = trainer.objective.uses_reference and trainer.ledger is None

    def step(self) -> None:
        """What no implementation of the method can leave out."""
        if self.reference:
            for batch in self.batches:
                self.policy.predict_reference(*inputs_of(batch))
        if self.extra_forward:
            with torch.no_grad():
                for batch in self.batches:
                    self.policy.predict(*inputs_of(batch))
        errors = [self._error(batch) for batch in self.batches] if self._kept() else []
        for number, batch in enumerate(self.batches):
            (errors[number] if errors else self._error(batch)).backward()
        self.trainer.engine.discard()

    def _kept(self) -> bool:
        return self.trainer.objective.couples_pairs and not self.extra_forward

    def _error(self, batch: PairBatch) -> torch.Tensor:
        return (self.policy.predict(*inputs_of(batch)) - batch.target).square().mean()


def inputs_of(batch: PairBatch) -> tuple[Any, ...]:
    return batch.noisy, batch.timesteps, batch.conditioning


def measure(trainer: OfflineTrainer, repeats: int) -> list[dict[str, Any]]:
    """Rows ``repeat, ours_ms, bare_ms, peak_device_bytes`` (of ours); which side begins alternates.

    What comes before the first repeat warms up and is left out.
    """
    bare, rows, step, device = Bare(trainer), [], 0, trainer.policy.device
    for repeat in range(1 - warm_up_steps(device), repeats + 1):
        timed: dict[str, float] = {}
        for side in ("ours", "bare") if repeat % 2 else ("bare", "ours"):
            if side == "ours":
                forget_peak(device)
                timed[side] = seconds(partial(trainer.step, step), device)
                peak = peak_device_bytes(device)
                step += 1
            else:
                timed[side] = seconds(bare.step, device)
        if repeat > 0:
            times = {f"{side}_ms": round(1e3 * value, 3) for side, value in timed.items()}
            rows.append({"repeat": repeat, **times, "peak_device_bytes": peak})
    return rows


def ratios(rows: Sequence[dict[str, Any]], arm: str) -> list[float]:
    """Ours over bare, one a repeat."""
    return [float(row["ours_ms"]) / float(row["bare_ms"]) for row in rows if row["arm"] == arm]


def by_setting(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each model, as worlds.py lists them; compiled and eager, CPU and GPU apart."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=place):
        found.setdefault(setting_of(row), []).append(row)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians with the range of the repeats."""
    lines = []
    for setting, group in by_setting(rows).items():
        for arm in dict.fromkeys(row["arm"] for row in group):
            own, found = [row for row in group if row["arm"] == arm], ratios(group, arm)
            ms = [f"{median(float(row[f'{side}_ms']) for row in own):.1f}" for side in ("ours", "bare")]
            spread = f"{median(found):.3f} ({min(found):.3f} to {max(found):.3f})"
            met = "yes" if median(found) <= TARGET else "no"
            lines.append([setting, arm, *ms, spread, str(len(own)), met])
    head = ["model", "step", "ours, ms", "bare passes, ms", "ratio, median (range)", "repeats", f"at most {TARGET:.2f}"]
    return markdown(head, lines)


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """The ratio of every arm beside the target."""
    panels = [
        Panel(
            setting_of(group[0]).replace(group[0]["model"], MODELS[group[0]["model"]], 1),
            "our step over the bare UNet passes",
            {arm: {"median and range": ratios(group, arm)} for arm in dict.fromkeys(row["arm"] for row in group)},
            TARGET,
            f"at most {TARGET:.2f}",
        )
        for group in by_setting(rows).values()
    ]
    draw(panels, out)


def last_line(rows: Sequence[dict[str, Any]]) -> str:
    """``ratio NAME VALUE …`` of the medians."""
    arms = dict.fromkeys(row["arm"] for row in rows)
    return " ".join(["ratio", *(f"{arm} {median(ratios(rows, arm)):.4f}" for arm in arms)])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="emoji")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, 5 repeats, no CSV")
    parser.add_argument("--repeats", type=int, help="default: 7, of the full-size model 3")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    add_device(parser)
    add_compile(parser, "both sides with compile=true (blocks, the default) or unet")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="run nothing: table and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into benchmarks/README.md")
    return parser.parse_args()


def run(options: argparse.Namespace, about: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of the settings asked for."""
    arms = FULL_SIZE if options.model == "full" else ARMS
    repeats = options.repeats or (5 if options.quick else 3 if options.model == "full" else 7)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        device = [f"device={options.device}"]
        settings = [*open_world(options.model, Path(folder), device), f"compile={options.compile.lower()}"]
        for arm in [name for name in arms if name in QUICK or not options.quick]:
            print(arm, file=sys.stderr)
            found = measure(trainer_of(settings, *arms[arm]), repeats)
            rows += [about | {"arm": arm} | row | provenance() for row in found]
    return rows


def main() -> None:
    """Measure, write, print."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = name_of(open_device(options))
        about = {"model": options.model, "compile": options.compile, "device": device}
        about |= {"threads": torch.get_num_threads()}
        rows: list[dict[str, Any]] = [] if options.report else run(options, about)
        if not options.quick:
            mine = (options.model, options.compile, device)
            stored = [(row, (row["model"], row["compile"], device_of(row))) for row in read_csv(options.out)]
            rows = [*(row for row, own in stored if options.report or own != mine), *rows]
        if not rows:
            raise UserError("no rows to report", str(options.out), "run the benchmark first")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if not options.quick:
        readme = TABLES if options.readme else None
        publish(options.out, rows, "Our step over the bare UNet passes", table(rows), plot, readme)
    print(table(rows))
    for group in by_setting(rows).values():
        print(last_line(group))


if __name__ == "__main__":
    main()
