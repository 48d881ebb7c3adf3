"""How time and memory grow: with the batch, the contrast group, the resolution, the number of records and of ranks.

    python benchmarks/scaling.py [--only KIND…] [--repeats 5] [--short] [--report] [--readme]
    python benchmarks/scaling.py --only ranks --ranks 1 2 4 8

Every point runs in a process of its own, whose peak resident memory it reports: RPO steps of the bundled model with the
ledger for the first three; for records the opening of a store of 10³ … 10⁶ of them, a step's sampling and reading in
the first and in a later epoch; for the loader the rate at which batches come beside the rate at which the model takes
them. For ranks see scaling_ranks.py: DPO steps, LoRA and all weights, plain and under ZeRO 1-3, and the bytes a rank
sends in one over those that ``fastpref plan`` names. Writes results/scaling.csv, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import scaling_ranks
import torch
from common import RESULTS, TABLES, markdown, provenance, publish, read_csv
from devices import CPU, add_device, device_of, name_of, open_device, peak_device_bytes, seconds, warm_up_steps
from large_store import make_large_store
from worlds import config_of, open_world, trainer_of

from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.memory import peak_rss_bytes
from fastpref.train.inputs import open_sampler

OUT = RESULTS / "scaling.csv"
POINTS: dict[str, tuple[int, ...]] = {
    "batch": (2, 4, 8, 16),
    "group": (2, 4, 8, 16),
    "resolution": (16, 32, 64),
    "records": (10**3, 10**4, 10**5, 10**6),
    "loader": (1, 8),
    "ranks": (1, 2),
}
SHORT: dict[str, tuple[int, ...]] = {"batch": (2, 8), "records": (10**3, 10**5), "loader": (8,), "ranks": (2,)}
MOST_SECONDS, MOST_BYTES = 1.0, 200e6  # of opening 10⁶ records
FEEDS = 10  # times the model's rate
ON_HOST = ("records", "ranks")  # these need no GPU and use none


def step_point(settings: list[str], overrides: list[str], repeats: int) -> dict[str, Any]:
    """Median seconds of an RPO step, and what the process needed."""
    trainer = trainer_of(settings, "method=rpo", "reference=ledger", *overrides)
    device = trainer.policy.device
    warm = warm_up_steps(device)
    for step in range(warm):
        trainer.step(step)
    found = [seconds(partial(trainer.step, step), device) for step in range(warm, warm + repeats)]
    memory = {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": peak_device_bytes(device)}
    return {"seconds": median(found), "spread": max(found) - min(found), **memory}


def records_point(settings: list[str], records: int, folder: Path, repeats: int) -> dict[str, Any]:
    """Opening a store, and batches of 512 pairs of its first and its eighth epoch."""
    path = folder / f"records-{records}"
    if not path.is_dir():
        make_large_store(Path(config_of(settings).store), path, records)
        raise SystemExit(0)  # what making it needed is not what opening it needs
    Store.open(Path(config_of(settings).store))  # what reading parquet needs in any case
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_rss_bytes()
    began = time.perf_counter()
    store = Store.open(path)
    opened = time.perf_counter() - began
    grown = peak_rss_bytes() - before
    sampler = open_sampler(config_of(settings, "batch_size=512", "method=dpo"), store)
    answer = {"seconds": opened, "grown_bytes": grown}
    for name, first in (("first", 0), ("later", 7 * sampler.batches_per_epoch)):
        plan = sampler.batch(first)
        sampled = [seconds(partial(sampler.batch, first + n)) for n in range(1, repeats + 1)]
        answer[f"sampling_{name}"] = median(sampled)
        answer[f"reading_{name}"] = median(seconds(partial(store.batch, plan.indices)) for _ in range(repeats))
    return answer | {"peak_rss_bytes": peak_rss_bytes()}


def loader_point(settings: list[str], micro_batch: int, repeats: int) -> dict[str, Any]:
    """Pairs a second: read and noised with nobody training, and trained."""
    trainer = trainer_of(settings, "method=dpo", "reference=ledger", f"micro_batch_size={micro_batch}")
    device = trainer.policy.device
    warm = warm_up_steps(device)
    for step in range(warm):
        trainer.step(step)
    steps, size, micro = range(warm, warm + repeats), trainer.config.batch_size, range(len(trainer._micro))

    def feed() -> None:
        for step in steps:
            for number in micro:
                loaded = trainer._loader.take(step, number)
                trainer.batches.build(loaded.plan, loaded.rows, loaded.stored)

    fed = seconds(feed, device)
    trained = sum(seconds(partial(trainer.step, step), device) for step in steps)
    pairs = repeats * size
    return {"seconds": fed / repeats, "pairs_fed": pairs / fed, "pairs_trained": pairs / trained}


def point(kind: str, value: int, settings: list[str], folder: Path, repeats: int) -> dict[str, Any]:
    """One point in this process."""
    if kind == "records":
        return records_point(settings, value, folder, repeats)
    if kind == "loader":
        return loader_point(settings, value, repeats)
    overrides = {
        "batch": [f"batch_size={value}"],
        "group": ["batch_size=16", f"group_size={value}"],
        "resolution": [f"resolution={value}", f"store={folder / f'store-{value}'}"],
    }[kind]
    if kind == "resolution":
        from fastpref.data.prepare import prepare

        prepare(config_of(settings, *overrides), progress=False)
    return step_point(settings, overrides, repeats)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a point."""
    lines = []
    for row in rows:
        peak = row.get("peak_device_bytes") or row.get("peak_rss_bytes")
        memory = f"{float(peak) / 1e9:.2f}" if peak else "–"
        milliseconds = f"{1e3 * float(row['seconds']):.1f}"
        where = [] if device_of(row) == CPU else [device_of(row)]
        lines.append([row["kind"], f"{int(row['value'])}", milliseconds, memory, ", ".join([*where, *_notes(row)])])
    return markdown(["what grows", "to", "ms a step (records: to open)", "peak memory, GB", "also"], lines)


def _notes(row: dict[str, Any]) -> list[str]:
    labels = {"sampling_first": "sampling", "sampling_later": "in epoch 8", "reading_first": "reading"}
    notes = [f"{label} {1e3 * float(row[key]):.2f} ms" for key, label in labels.items() if row.get(key)]
    if row.get("grown_bytes"):
        notes.append(f"opening takes {float(row['grown_bytes']) / 1e6:.0f} MB")
    if row.get("pairs_fed"):
        ratio = float(row["pairs_fed"]) / float(row["pairs_trained"])
        met = "met" if ratio >= FEEDS else "missed"
        notes.append(f"feeds {ratio:.0f} times what is trained (at least {FEEDS}: {met})")
    if row["kind"] == "records" and int(row["value"]) == max(POINTS["records"]):
        met = float(row["seconds"]) <= MOST_SECONDS and float(row["grown_bytes"]) <= MOST_BYTES
        notes.append(f"at most {MOST_SECONDS:.0f} s and {MOST_BYTES / 1e6:.0f} MB: {'met' if met else 'missed'}")
    return [*notes, scaling_ranks.note(row)] if row.get("arm") else notes


def plot(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Seconds and memory over each growing quantity."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in POINTS if kind != "loader" and any(row["kind"] == kind for row in rows)]
    figure = Figure(figsize=(3.2 * max(len(kinds), 1), 5), layout="constrained")
    for place, kind in enumerate(kinds):
        own = [row for row in rows if row["kind"] == kind]
        columns = (("seconds", 1e3, "ms"), ("peak_rss_bytes", 1e-9, "peak memory, GB"))
        for line, (key, scale, label) in enumerate(columns):
            axes = figure.add_subplot(2, len(kinds), line * len(kinds) + place + 1)
            for arm in dict.fromkeys(row.get("arm") for row in own):
                of_arm = [row for row in own if row.get("arm") == arm]
                where = [int(row["value"]) for row in of_arm]
                axes.plot(where, [float(row[key]) * scale for row in of_arm], "o-", label=arm)
            if kind == "ranks" and not line:
                axes.legend(fontsize=6)
            axes.set_xscale("log", base=10 if kind == "records" else 2)
            if kind != "records":
                values = sorted({int(row["value"]) for row in own})
                axes.set_xticks(values, [str(value) for value in values])
            axes.set_ylim(0, 1.15 * scale * max(float(row[key]) for row in own))
            axes.set(xlabel=kind, ylabel=label)
    figure.savefig(out, dpi=120)


def measure(
    points: dict[str, tuple[int, ...]],
    settings: list[str],
    folder: Path,
    repeats: int,
    *,
    short: bool = False,
    device: str = CPU,
) -> list[dict[str, Any]]:
    """All points, each in fresh processes; ``device`` is the name of that which ``settings`` choose."""
    rows = []
    for kind, value in ((kind, value) for kind, values in points.items() for value in values):
        for arm in scaling_ranks.arms(value, short=short) if kind == "ranks" else [""]:
            print(f"{kind} {value} {arm}".rstrip(), file=sys.stderr)
            found = {"threads": torch.get_num_threads(), "device": CPU if kind in ON_HOST else device}
            if arm:
                found |= scaling_ranks.launch(settings, arm, value, repeats)
            else:
                found |= alone(kind, value, settings, folder, repeats)
            rows.append({"kind": kind, "value": value, **found, **provenance()})
    return rows


def alone(kind: str, value: int, settings: list[str], folder: Path, repeats: int) -> dict[str, Any]:
    """One point in a process of its own; where a store has to be made first, in another one."""
    job = json.dumps([kind, value, settings, str(folder), repeats])
    command = [sys.executable, __file__, "--worker", job, "--threads", str(torch.get_num_threads())]
    answers = [subprocess.run(command, capture_output=True, text=True) for _ in range(2 if kind == "records" else 1)]
    if any(answer.returncode for answer in answers):
        raise UserError(f"the point {kind} {value} failed", "scaling", answers[-1].stderr.strip()[-300:])
    return json.loads(answers[-1].stdout)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=POINTS, default=list(POINTS), metavar="KIND")
    parser.add_argument("--ranks", nargs="+", type=int, default=POINTS["ranks"], help="processes of the points 'ranks'")
    parser.add_argument("--short", action="store_true", help="the few points of the short form, 3 repeats, no CSV")
    parser.add_argument("--repeats", type=int, default=5)
    add_device(parser)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="run nothing: table and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the table into benchmarks/README.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, report."""
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.worker:
            kind, value, settings, folder, repeats = json.loads(options.worker)
            print(json.dumps(point(kind, value, settings, Path(folder), repeats)))
            return
        rows: list[dict[str, Any]] = [] if options.short else list(read_csv(options.out))
        if not options.report:
            points = SHORT if options.short else POINTS | {"ranks": tuple(options.ranks)}
            points = {kind: values for kind, values in points.items() if kind in options.only}
            with tempfile.TemporaryDirectory() as folder:
                device, repeats = name_of(open_device(options)), 3 if options.short else options.repeats
                settings = open_world("emoji", Path(folder), [f"device={options.device}"])
                found = measure(points, settings, Path(folder), repeats, short=options.short, device=device)
            again = {(row["kind"], device_of(row)) for row in found}
            rows = [*(row for row in rows if (row["kind"], device_of(row)) not in again), *found]
        if not rows:
            raise UserError("no rows to report", str(options.out), "run the benchmark first")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if not options.short:
        publish(options.out, rows, "Growth", table(rows), plot, TABLES if options.readme else None)
    print(table(rows))


if __name__ == "__main__":
    main()
