"""The training step on a GPU: one command, at most 8 minutes, the most decisive parts first.

    python benchmarks/gpu_bench.py [--parts rates,steps,…] [--minutes 8] [--reference-repo CHECKOUT] [--resume]
    python benchmarks/gpu_bench.py --device cpu --model emoji      # a rehearsal of every part, for its code only

parts, in this order: rates (matrix products, copy, operations of a row), steps (ours, by arm), public (diffusers'
script as it is and its UNet passes alone), full (full fine-tuning), spo (a round beside the literal order of work),
bare (the passes alone), attention (its backends), kernels (in short), deepspeed (ZeRO-2, offload), choices (fused_ops
and compile). Each has a time limit, at which it stops and the next begins. All arms share one UNet's weights, which
are drawn on the device. Every repeat is a row of results/gpu_bench.csv as soon as it is measured; table and plot lie
beside it. --resume goes on with the newest run of this device and commit. A rehearsal writes to runs/gpu_bench/.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()  # imports count

import gpu_bench_parts as parts  # noqa: E402
import gpu_bench_steps as steps  # noqa: E402
from common import RESULTS, ROOT, TABLES, fill, provenance, read_csv, write_csv  # noqa: E402
from devices import CPU, add_device, device_of, name_of, open_device  # noqa: E402
from gpu_bench_public import public  # noqa: E402
from gpu_bench_report import bars_table, plot, report  # noqa: E402
from gpu_bench_world import MODELS, OverLimit, World, limited, open_gpu_world  # noqa: E402
from reference_repo import find_script  # noqa: E402

from fastpref.atomic import write_bytes  # noqa: E402
from fastpref.errors import UserError  # noqa: E402

NAME = "gpu_bench.csv"
Row = dict[str, Any]
SPARE = 10.0  # seconds for table and plot


@dataclass(frozen=True)
class Part:
    """What is measured, and the most seconds that it may take."""

    measure: Callable[[World], Iterator[Row]]
    seconds: float


PARTS = {
    "rates": Part(parts.rates, 25),
    "steps": Part(steps.ours, 180),
    "public": Part(public, 100),
    "full": Part(steps.full, 45),
    "spo": Part(parts.spo, 70),
    "bare": Part(steps.bare, 40),
    "attention": Part(parts.attention, 20),
    "kernels": Part(parts.kernels, 25),
    "deepspeed": Part(steps.deepspeed, 60),
    "choices": Part(steps.choices, 90),
}


class Book:
    """The rows: those of earlier runs, and those of this one as they come, in the file after each."""

    def __init__(self, out: Path, about: Row, *, resume: bool) -> None:
        self.out, self.rows = out, [dict(row) for row in read_csv(out)]
        mine = [row for row in self.rows if all(str(row.get(name)) == str(about[name]) for name in about)]
        earlier = max((row["run"] for row in mine), default=None) if resume else None
        self.about = {"run": earlier or time.strftime("%Y-%m-%dT%H:%M:%S"), **about}
        known = {(row["part"], row["arm"]) for row in mine if row["run"] == earlier}
        self.whole = {key for key in known if self._whole(*key)}
        # an arm that was cut off is measured again
        self.rows = [row for row in self.rows if row["run"] != earlier or (row["part"], row["arm"]) in self.whole]

    def _whole(self, part: str, arm: str) -> bool:
        return any(row["last"] == "yes" for row in self.rows if (row["part"], row["arm"]) == (part, arm))

    def add(self, part: str, row: Row) -> None:
        """Write a row; an arm's row after it says that the arm is whole."""
        self.rows.append({**self.about, "part": part, "last": "", **row})
        write_csv(self.out, self.rows)

    def close(self, part: str, arm: str) -> None:
        """The arm has all its rows."""
        own = [row for row in self.rows if row["run"] == self.about["run"] and (row["part"], row["arm"]) == (part, arm)]
        if own:
            own[-1]["last"] = "yes"
            write_csv(self.out, self.rows)


def measure(world: World, book: Book, chosen: list[str], deadline: float) -> None:
    """The parts one after the other; ``deadline`` is a time of :func:`time.perf_counter`."""
    for name in chosen:
        left = min(PARTS[name].seconds, deadline - time.perf_counter())
        if left <= 1:
            print(f"{name}: no time is left", flush=True)
            continue
        began, arm = time.perf_counter(), None
        world.deadline = began + left
        try:
            with limited(left), closing(PARTS[name].measure(world)) as rows:  # type: ignore[type-var]
                for row in rows:
                    if arm not in (None, row["arm"]):
                        book.close(name, str(arm))
                    arm = row["arm"]
                    book.add(name, row)
                    print(_said(name, row), flush=True)
            if arm is not None:
                book.close(name, arm)
        except OverLimit as over:
            print(f"{name}: {over}", flush=True)
        world.free()
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def _said(part: str, row: Row) -> str:
    shown = ("ms", "tflop_s", "gb_s", "busy_ms", "quantity", "flops", "side", "rollout_ms", "training_ms", "note")
    return f"{part} {row['arm']}: " + ", ".join(f"{name} {row[name]}" for name in shown if row.get(name))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas; default: all")
    parser.add_argument("--model", choices=MODELS, default="sdxl")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together, from the start of Python")
    parser.add_argument("--repeats", type=int, default=3)
    add_device(parser)
    parser.add_argument("--reference-repo", type=Path, help="checkout of diffusers: time its script too")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs the checkout's script")
    parser.add_argument(
        "--folder", type=Path, help="for the inputs, a few MB, with --reference-repo 7 GB; default: temporary"
    )
    parser.add_argument("--out", type=Path, help=f"CSV; default: results/{NAME}, of a rehearsal runs/gpu_bench/{NAME}")
    parser.add_argument("--resume", action="store_true", help="go on with the newest run of this device and commit")
    parser.add_argument("--report", action="store_true", help="run nothing: table and plot from the CSV")
    parser.add_argument("--readme", action="store_true", help="also put the bars into benchmarks/README.md")
    return parser.parse_args(arguments)


def csv_of(options: argparse.Namespace) -> Path:
    """Where the rows are: those of a rehearsal not among a GPU's."""
    rehearsal = not options.report and open_device(options).type == CPU
    return options.out or (ROOT / "runs" / "gpu_bench" if rehearsal else RESULTS) / NAME


def run(options: argparse.Namespace, out: Path) -> None:
    """Measure, writing each row to the CSV ``out`` as it comes.

    Raises:
        UserError: an argument names nothing that is there.
    """
    chosen = [name for name in options.parts.split(",") if name]
    if unknown := [name for name in chosen if name not in PARTS]:
        raise UserError(f"there is no part '{unknown[0]}'", "--parts", f"parts are {', '.join(PARTS)}")
    device = open_device(options)
    if device.type == CPU and options.model == "sdxl":
        raise UserError("SDXL's step on a CPU takes minutes", "--device", "use a GPU, or --model emoji to rehearse")
    if options.reference_repo is not None:
        find_script(options.reference_repo)
    about = {"device": name_of(device), "model": options.model, **provenance()}
    book = Book(out, about, resume=options.resume)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with open_gpu_world(options.model, device, folder) as world:
            world.repeats, world.repo, world.python = options.repeats, options.reference_repo, options.python
            world.done = lambda part, arm: (part, arm) in book.whole
            print(f"ready after {time.perf_counter() - BEGAN:.0f} s", flush=True)
            measure(world, book, chosen, BEGAN + 60 * options.minutes - SPARE)


def publish(out: Path, *, readme: bool) -> None:
    """Table and plot beside the CSV."""
    rows = read_csv(out)
    text = report(rows)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out.with_suffix(".md"), f"# The training step on a GPU\n\n{text}\n".encode())
    if rows:
        plot(rows, out.with_suffix(".png"))
    if readme:
        fill(TABLES, "table: gpu_bench", bars_table([row for row in rows if device_of(row) != CPU]))


def main(arguments: list[str] | None = None) -> int:
    """Measure, report; what was measured before an interruption is reported too."""
    options, code = parse(arguments), 0
    try:
        out = csv_of(options)
        if not options.report:
            run(options, out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: --resume goes on from here", file=sys.stderr)
        code = 130
    publish(out, readme=options.readme)
    return code


if __name__ == "__main__":
    sys.exit(main())
