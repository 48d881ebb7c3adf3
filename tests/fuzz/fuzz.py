"""Runs fuzz cases: in this process, thousands of them in forked workers, or through the command line.

    python tests/fuzz/fuzz.py [--cases 5000] [--commands 300] [--seed 0] [--workers 2] [--only N …]

A case is a function of (seed, number). The only allowed results are that the input is taken and everything about the
result is right, or that it is refused by a UserError of one line (exit code 2). The long form goes on after a crash or
a hang, which are faults like any other, and writes ``benchmarks/results/fuzz.csv`` and ``.md``; exit code 1 if there
was a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.path[0] = str(Path(__file__).parents[1])
    sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))

import torch

from fastpref.errors import UserError
from fuzz.targets import TARGETS, Attempt, enter, leftovers, tree
from fuzz.world import World

SECONDS = 60  # a case may take; the usual one takes a tenth of one
CHUNK, COMMANDS = 100, 10  # cases of a worker, in-process and through the command line; a pipe holds their results
MEMORY = 6 << 30  # bytes of address space a worker may take beyond what it starts with


@dataclass(frozen=True)
class Result:
    """What became of a case."""

    case: int
    target: str
    damage: str
    outcome: str  # taken, refused or fault
    says: str = ""

    @property
    def line(self) -> str:
        """For a report."""
        return f"case {self.case} ({self.target}, {self.damage}): {self.outcome}: {self.says}"


def attempt(world: World, seed: int, number: int, folder: Path) -> tuple[str, Attempt]:
    """The case's target and input, made in ``folder``."""
    rng = random.Random(f"{seed} {number}")
    names, weights = list(TARGETS), [weight for _, weight in TARGETS.values()]
    name = rng.choices(names, weights)[0]
    return name, TARGETS[name][0](world, rng, folder)


def run_case(world: World, seed: int, number: int, folder: Path) -> Result:
    """One case in this process. ``folder`` is empty and may be deleted afterwards."""
    enter(world, folder)
    name, made = attempt(world, seed, number, folder)
    before, text = tree(folder) if made.passive else None, io.StringIO()
    try:
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text), _time_limit(SECONDS):
            made.run()
        outcome, says = "taken", ""
    except UserError as error:
        says = str(error)
        outcome = "refused" if says and "\n" not in says else "fault"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome, says = "fault", f"{type(error).__name__}: {error} [{Path(where.filename).name}:{where.lineno}]"
    torch.set_num_threads(1)
    if before is not None and tree(folder) != before:
        outcome, says = "fault", f"files changed; {says}"
    if left := leftovers(folder):
        outcome, says = "fault", f"left behind {left}; {says}"
    return Result(number, name, made.what, outcome, says)


def run_command(world: World, seed: int, number: int, folder: Path) -> Result:
    """One case through the command line, in a process of its own."""
    enter(world, folder)
    name, made = attempt(world, seed, number, folder)
    before = tree(folder)
    environment = os.environ | {"PYTHONPATH": f"{world.root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "fastpref.cli", *made.command]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3 * SECONDS)
    except subprocess.TimeoutExpired:
        return Result(number, name, made.what, "fault", "hangs")
    last = done.stderr.strip().splitlines()[-1:] or [""]
    outcome = {0: "taken", 2: "refused"}.get(done.returncode, "fault")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if "Traceback" in done.stderr or (outcome == "refused") != (len(errors) == 1):
        outcome = "fault"
    if outcome != "fault" and made.passive and tree(folder) != before:
        outcome, last = "fault", ["files changed"]
    if left := leftovers(folder):
        outcome, last = "fault", [f"left behind {left}"]
    return Result(number, name, made.what, outcome, f"exit {done.returncode}: {last[0]}" if last[0] else "")


def run_many(
    root: Path, seed: int, numbers: Sequence[int], *, commands: bool = False, workers: int = 1
) -> Iterator[Result]:
    """Cases in forked workers: one that crashes or hangs is a fault, and the ones after it go on in another worker."""
    size = COMMANDS if commands else CHUNK
    todo = deque(numbers[start : start + size] for start in range(0, len(numbers), size))
    running: deque[tuple[Sequence[int], int, int]] = deque()
    while todo or running:
        while todo and len(running) < workers:
            running.append((todo[0], *_start(root, seed, todo.popleft(), commands)))
        chunk, child, reading = running.popleft()
        done = 0
        with os.fdopen(reading) as stream:
            for line in stream:
                if line.endswith("\n"):
                    yield Result(**json.loads(line))
                    done += 1
        os.waitpid(child, 0)
        if done < len(chunk):
            yield Result(chunk[done], "?", "see --only", "fault", "the process died or hung")
            if rest := chunk[done + 1 :]:
                todo.appendleft(rest)


def _start(root: Path, seed: int, numbers: Sequence[int], commands: bool) -> tuple[int, int]:
    """A forked process and what to read its results from, a JSON line each, as far as it comes."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        code = 1
        try:
            _limit_memory()
            with os.fdopen(writing, "w", buffering=1) as stream:
                _work(World(root), seed, numbers, commands, stream)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    return child, reading


def _work(world: World, seed: int, numbers: Sequence[int], commands: bool, stream: Any) -> None:
    for number in numbers:
        signal.alarm(4 * SECONDS)  # if nothing in Python can be reached: the worker dies
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=world.root.parent) as folder:
            result = (run_command if commands else run_case)(world, seed, number, Path(folder))
            os.chdir(world.root)
        stream.write(json.dumps(asdict(result)) + "\n")


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {seconds:.0f} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> int:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--commands", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--only", type=int, nargs="*", help="these cases, in this process, and their results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        if options.only:
            results = _only(World.make(place / "world"), options.seed, options.only, place)
            return int(any(result.outcome == "fault" for result in results))
        return _long_form(place, options.cases, options.commands, options.seed, options.workers)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _only(world: World, seed: int, numbers: Sequence[int], place: Path) -> list[Result]:
    results = []
    for number in numbers:
        folder = place / str(number)
        folder.mkdir()
        results.append(run_case(world, seed, number, folder))
        print(results[-1].line)
    return results


def _long_form(place: Path, cases: int, commands: int, seed: int, workers: int) -> int:
    from common import RESULTS, markdown, provenance, write_csv

    from fastpref.atomic import write_bytes

    if os.fork() == 0:  # made in a child, so that no library has started threads before the workers are forked
        World.make(place / "world")
        os._exit(0)
    if os.wait()[1]:
        raise SystemExit("the undamaged originals could not be made")
    rows: list[dict[str, Any]] = []
    for way, numbers in (("in-process", range(cases)), ("command line", range(cases, cases + commands))):
        began, counts = time.monotonic(), Counter[tuple[str, str]]()
        for result in run_many(place / "world", seed, numbers, commands=way == "command line", workers=workers):
            counts[result.target, result.outcome] += 1
            if result.outcome == "fault":
                print(result.line, flush=True)
        for name in sorted({target for target, _ in counts}):
            found = {outcome: counts[name, outcome] for outcome in ("taken", "refused", "fault")}
            rows.append({"way": way, "input": name, "cases": sum(found.values()), **found, "seed": seed})
        print(f"{way}: {counts.total()} cases in {time.monotonic() - began:.0f} s", flush=True)
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        sums = {key: sum(row[key] for row in mine) for key in ("cases", "taken", "refused", "fault")}
        rows.append({"way": way, "input": "all", **sums, "seed": seed})
    rows = [row | provenance() for row in rows]
    write_csv(RESULTS / "fuzz.csv", rows)
    head = ("way", "input", "cases", "taken", "refused", "fault")
    table = markdown(head, [[str(row[key]) for key in head] for row in rows])
    about = "Damaged inputs and what became of them; a fault is an exception, a hang or damage taken for good.\n\n"
    write_bytes(RESULTS / "fuzz.md", f"{about}{table}\n".encode())
    return int(any(row["fault"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
