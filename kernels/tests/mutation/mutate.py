"""Plants the faults of the ops' cases one at a time in a copy of the package and runs the tests that must notice.

    python kernels/tests/mutation/mutate.py [--workers 2] [--only TEXT ...]

Exit code 1 if a fault survives, if a test fails without one, or if a fault's text is not in the package.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, NoReturn

if __name__ == "__main__":
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.dont_write_bytecode = True
    sys.path[0] = str(Path(__file__).parents[1])

import pytest
from cases import Fault

HERE = Path(__file__).parents[1]
KERNELS = HERE.parent
PASSED, FAILED, DIED = 0, 1, 99  # pytest's exit codes, and one that it does not use
LIMIT = 600  # seconds of one run


def all_faults() -> list[Fault]:
    """Read in a process of its own: the package must not be imported here, for the forks import copies of it."""
    code = "import json, cases; print(json.dumps(cases.faults()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True, check=True)
    return [Fault(*fields, tuple(tests)) for *fields, tests in json.loads(done.stdout)]


def misplaced(faults: Iterable[Fault]) -> list[str]:
    """Faults whose text does not occur exactly once in their file."""
    wrong = []
    for fault in faults:
        count = (KERNELS / "fastpref_kernels" / fault.file).read_text().count(fault.old)
        if count != 1:
            wrong.append(f"{fault.what}: {fault.file} has its text {count} times: {fault.old!r}")
    return wrong


class Run(NamedTuple):
    """A process that tests a copy of the package, with a fault or without one."""

    tests: tuple[str, ...]
    fault: Fault | None
    folder: tempfile.TemporaryDirectory[str]
    process: int

    def output(self) -> str:
        return (Path(self.folder.name) / "output").read_text()[-600:]


def start(tests: tuple[str, ...], fault: Fault | None) -> Run:
    """Copies the package, plants the fault, and forks: torch and triton are imported once for all runs."""
    folder = tempfile.TemporaryDirectory()
    copy = Path(folder.name) / "kernels"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "mutation", "static", "execution")
    shutil.copytree(KERNELS, copy, ignore=ignore)
    if fault is not None:
        place = copy / "fastpref_kernels" / fault.file
        place.write_text(place.read_text().replace(fault.old, fault.new))
    process = os.fork()
    if process == 0:
        _test(copy, tests)
    return Run(tests, fault, folder, process)


def _test(copy: Path, tests: tuple[str, ...]) -> NoReturn:
    """In the forked process: pytest on the copy; ends with pytest's exit code."""
    code = DIED
    try:
        output = os.open(copy.parent / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.alarm(LIMIT)
        sys.path.insert(0, str(copy))
        os.chdir(copy / "tests")
        options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "--import-mode=importlib"]
        code = int(pytest.main([*options, *tests]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def run_all(todo: list[tuple[tuple[str, ...], Fault | None]], workers: int) -> Iterator[tuple[Run, int, float]]:
    """Every run with pytest's exit code (DIED if it was killed) and its CPU seconds, as they end."""
    waiting, running = todo[::-1], {}
    while waiting or running:
        while waiting and len(running) < workers:
            run = start(*waiting.pop())
            running[run.process] = run
        process, status, used = os.wait3(0)
        run = running.pop(process)
        code = os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else DIED
        yield run, code, used.ru_utime + used.ru_stime
        run.folder.cleanup()


def selections(faults: Iterable[Fault]) -> list[tuple[str, ...]]:
    """All tests that the faults name, each once: arguments of a run for each module."""
    modules: dict[str, list[str]] = {}
    for module, *keywords in dict.fromkeys(fault.tests for fault in faults):
        modules.setdefault(module, []).extend(keywords[1:] or ["test"])  # every test has that in its name
    return [(module, "-k", " or ".join(f"({k})" for k in keywords)) for module, keywords in modules.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="faults whose description or file has one of these texts"
    )
    options = parser.parse_args()
    faults = [fault for fault in all_faults() if any(text in f"{fault.what} {fault.file}" for text in options.only)]
    wrong = misplaced(faults)
    if wrong:
        print("\n".join(wrong))
        return 1
    for module in ("torch._dynamo", "torch.testing", "numpy", "triton.language", "triton.runtime.interpreter"):
        import_module(module)  # once for all forks; the first call of a custom op imports torch._dynamo
    gc.freeze()
    for run, code, _ in run_all([(tests, None) for tests in selections(faults)], options.workers):
        if code != PASSED:
            wrong.append(f"without a fault: {' '.join(run.tests)}: exit code {code}\n{run.output()}")
    if wrong:
        print("\n".join(wrong))
        return 1
    survivors = 0
    for number, (run, code, seconds) in enumerate(run_all([(f.tests, f) for f in faults], options.workers), 1):
        assert run.fault is not None
        verdict = {PASSED: "SURVIVED", FAILED: "caught"}.get(code, f"NOT RUN ({code})")
        survivors += code != FAILED
        print(f"{number:3} {verdict:9} {seconds:5.1f} s {run.fault.file:30} {run.fault.what}", flush=True)
    print(f"{len(faults) - survivors} of {len(faults)} faults caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
