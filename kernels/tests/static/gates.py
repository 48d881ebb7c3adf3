"""The gates on every kernel in every configuration that its launcher can choose, compiled ahead of time.

    python kernels/tests/static/gates.py [--write] [--op OP]

Compiles for sm_80, sm_90, sm_100 and gfx942 (no GPU needed) and fails if a kernel spills, uses local memory, takes
more shared memory or threads than a block has, falls below its occupancy, or reads or writes by less than 16 bytes
where the layout allows 16; and if the table in kernels/README.md is not what this command would write. --write writes
it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("FASTPREF_KERNELS_TRITON", "1")
    sys.path[0] = str(Path(__file__).parents[1])

import readme
import triton
from cases import KernelCase, all_cases

from static.targets import TARGETS

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "fastpref_kernels"
WIDE = 16  # bytes
MAX_THREADS = 1024  # of a block, on every target


class Job(NamedTuple):
    module: str
    case: KernelCase
    target: str


class Result(NamedTuple):
    job: Job
    found: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.job.case.name} for {self.job.target}"


def jobs(op: str | None = None, targets: Iterable[str] = TARGETS) -> list[Job]:
    """Every case of one op or of all, for every target."""
    return [Job(f"cases.{o}", case, t) for o, found in all_cases(op).items() for case in found for t in targets]


def compile_jobs(todo: list[Job], workers: int = 2) -> list[Result]:
    """Compile in processes without the interpreter; results in the order of `todo`.

    Raises RuntimeError if a worker dies.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["FASTPREF_KERNELS_TRITON"] = "1"
    command = [sys.executable, str(HERE / "compile_cases.py")]
    running = []
    # targets differ in cost: each worker takes all of a case
    shares: list[list[Job]] = [[] for _ in range(workers)]
    for number, job in enumerate(todo):
        shares[number // len(TARGETS) % workers].append(job)
    for share in filter(None, shares):
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([[job.module, job.case.name, job.target] for job in share]))
        worker.stdin.close()
        worker.stdin = None
        running.append(worker)
    found = {}
    for worker in running:
        lines, complaint = worker.communicate()
        if worker.returncode:
            raise RuntimeError(f"the compiling process failed: {complaint.strip()[-2000:]}")
        for line in lines.splitlines():
            module, name, target, result = json.loads(line)
            found[module, name, target] = result
    return [Result(job, found[job.module, job.case.name, job.target]) for job in todo]


def broken_gates(result: Result) -> list[str]:
    """What is wrong with a compiled kernel, a line each."""
    case, target, found = result.job.case, TARGETS[result.job.target], result.found
    if "error" in found:
        return [f"{result.name}: does not compile: {found['error']}"]
    wrong = []
    if found.get("spills"):
        wrong.append(f"{found['spills']} spills")
    if found["local"]:
        wrong.append(f"{found['local']} bytes of local memory")
    if found["shared"] > target.max_shared_block:
        wrong.append(f"{found['shared']} bytes of shared memory, a block may have {target.max_shared_block}")
    threads = case.num_warps * target.warp_size
    if threads > MAX_THREADS:
        wrong.append(f"{threads} threads, a block may have {MAX_THREADS}")
    if found["occupancy"] < case.min_occupancy:
        wrong.append(f"occupancy {found['occupancy']:.0%} with {found['registers']} registers, below its minimum")
    for pointer in case.wide if "widths" in found else ():
        widths = found["widths"][pointer]
        if not widths or min(widths) < WIDE:
            wrong.append(f"{pointer} is accessed by {widths} bytes")
    if found.get("scalars", 0) > case.scalars_in_lanes:
        wrong.append(f"{found['scalars']} scalar registers spilled, may be {case.scalars_in_lanes}")
    if case.tensor_cores and not found["matrix"]:
        wrong.append("no matrix instruction")
    if case.wide and found.get("wide") == 0:
        wrong.append("no access of 16 bytes in the machine code")
    return [f"{result.name}: {what}" for what in wrong]


def _code(path: Path) -> list[str]:
    """What the compiler sees of a module: its kernels without docstrings and positions, and its constants."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "jit" for d in node.decorator_list):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            found.append(ast.dump(node))
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.Call | ast.Tuple):
            found.append(ast.dump(node))
    return found


def source_hash() -> str:
    """Of the kernels, their cases and triton's version: what the table depends on."""
    parts = [triton.__version__, *(line for path in sorted(PACKAGE.rglob("*.py")) for line in _code(path))]
    for op, cases in all_cases().items():
        for c in cases:
            kernel = c.kernel.__name__
            parts.append(
                repr(
                    (
                        op,
                        c.name,
                        kernel,
                        c.signature,
                        c.constexprs,
                        c.aligned,
                        c.num_warps,
                        c.num_stages,
                        c.max_registers,
                    )
                )
            )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def kernel_name(case: KernelCase) -> str:
    """The part of a case's name before its configuration."""
    return case.name.split("[")[0]


def _range(values: list[float], unit: str = "") -> str:
    low, high = (f"{value:.3g}" for value in (min(values), max(values)))
    return (low if low == high else f"{low}–{high}") + unit


def _cell(found: list[dict[str, Any]]) -> str:
    """Registers, lowest occupancy and largest shared memory of a kernel's configurations."""
    shared = max(f["shared"] for f in found)
    text = f"{_range([f['registers'] for f in found])} · {min(f['occupancy'] for f in found):.0%}"
    return f"{text} · {shared / 1024:.3g} KB" if shared else text


def table_rows(results: list[Result]) -> list[str]:
    """A line of Markdown for each kernel, over all its configurations."""
    kernels: dict[str, list[Result]] = {}
    for result in results:
        kernels.setdefault(kernel_name(result.job.case), []).append(result)
    rows = []
    for name, found in kernels.items():
        cases = {result.job.case.name: result.job.case for result in found}
        wide = {pointer.removesuffix("_ptr"): None for case in cases.values() for pointer in case.wide}
        warps = _range([case.num_warps for case in cases.values()])
        cells = [_cell([result.found for result in found if result.job.target == target]) for target in TARGETS]
        rows.append("| " + " | ".join([f"`{name}`", str(len(cases)), warps, *cells, ", ".join(wide) or "none"]) + " |")
    return rows


def table(results: list[Result]) -> str:
    """What stands between the markers of the README."""
    heads = ["kernel", "configurations", "warps", *TARGETS, "by 16 bytes"]
    lines = [
        f"<!-- python kernels/tests/static/gates.py --write; sources {source_hash()} -->",
        f"Every configuration that a launcher can choose, compiled with triton {triton.__version__} and not run:",
        "registers a thread, lowest theoretical occupancy, largest shared memory of a block. None spills or uses local",
        "memory; the pointers in the last column move 16 bytes an access where sizes and strides are multiples of 16",
        "(NVIDIA).",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *table_rows(results),
    ]
    return readme.marked("aot", lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into kernels/README.md")
    parser.add_argument("--op", help="only this op; prints its rows and leaves the README alone")
    options = parser.parse_args()
    results = compile_jobs(jobs(options.op))
    broken = [line for result in results for line in broken_gates(result)]
    print("\n".join(broken) or f"{len(results)} compiled kernels, every gate holds")
    if broken:
        return 1
    if options.op:
        print("\n".join(table_rows(results)))
    elif options.write:
        readme.write("aot", table(results))
    elif readme.written("aot") != table(results):
        print("the table in kernels/README.md is stale: python kernels/tests/static/gates.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
