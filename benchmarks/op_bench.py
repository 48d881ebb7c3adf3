"""The kernels against eager torch: timed on a GPU, counted without one; RPO's CPU path against the matrix form.

    python benchmarks/op_bench.py [gpu|counts|cpu|host|launch|rpo …] [--sizes 1024 16384] [--repeats 5] [--plot]

    gpu     ms, GB/s, share of the copy bandwidth of the same run, peak memory: fastpref, eager fp32 and bf16, compiled;
            with --short every op at its middle size, fastpref and eager bf16: seconds, nothing is compiled
    counts  bytes per element, launches and peak memory of the interpreted kernels and of eager torch: counts, not times
    cpu     every op's CPU path beside eager fp32, eager bf16 and compiled bf16, by pytest-benchmark; also writes the
            table of ratios, op_bench_cpu.md
    host    microseconds of a call on tiny tensors, forward and backward: fastpref, the same through torch.library, as
            under torch.compile, and eager torch; also op_bench_host.md
    launch  the same on the kernels' path with the launch itself stubbed, beside eager torch; also op_bench_launch.md
    rpo     rpo_loss on the CPU with M = N, D = 256: median, least and most time, and peak memory beyond the inputs,
            each in its own process, in turn with the matrix form; fails above 64 MB or if slower at the largest size

Without a choice: gpu where there is one, else counts and rpo. Rows are kept in benchmarks/results/op_bench.csv, a run
replaces those of its kind; --plot draws op_bench_*.png beside it. --skip-without-gpu: where gpu is asked for and there
is none, say what is left out instead of failing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, markdown, provenance, read_csv, write_csv

from fastpref.atomic import write_bytes

HERE = Path(__file__).parent
LIMIT = 64 << 20  # bytes beyond the inputs that rpo_loss may take on the CPU
CPU_STATISTICS = {"ms": "median", "ms_q1": "q1", "ms_q3": "q3", "ms_min": "min", "ms_max": "max"}
Row = dict[str, Any]


def _child(script: str, *arguments: str, **environment: str) -> Any:
    """JSON that a script beside this one prints, from a process of its own."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def rpo(sizes: list[int], repeats: int) -> list[Row]:
    """Times of the repeats, which alternate between the two forms, and the most memory that one of them took."""
    rows = []
    for size in sizes:
        found: dict[str, list[Row]] = {"fastpref": [], "eager fp32": []}
        for _ in range(repeats):
            for form, results in found.items():
                results.append(_child("op_bench_rpo.py", form, str(size)))
        for form, results in found.items():
            times = sorted(1e3 * r["seconds"] for r in results)
            rows.append(
                {
                    "kind": "rpo",
                    "workload": "rpo_loss[outside]",
                    "shape": f"{size}x{size}x256",
                    "form": form,
                    "ms": round(statistics.median(times), 1),
                    "ms_min": round(times[0], 1),
                    "ms_max": round(times[-1], 1),
                    "peak_mb": round(max(r["peak_bytes"] for r in results) / (1 << 20), 1),
                    "repeats": repeats,
                    "threads": torch.get_num_threads(),
                }
            )
            row = rows[-1]
            spread = f"{row['ms']} ms ({row['ms_min']} to {row['ms_max']})"
            print(f"rpo {size}: {form}: {spread}, {row['peak_mb']} MB beyond the inputs", flush=True)
    return rows


def broken_claims(rows: list[Row]) -> list[str]:
    """What `rpo` promises and did not hold at the largest size."""
    ours, theirs = rows[-2:]
    broken = []
    if ours["peak_mb"] > LIMIT / (1 << 20):
        broken.append(f"{ours['shape']}: {ours['peak_mb']} MB beyond the inputs, promised {LIMIT >> 20}")
    if ours["ms"] > theirs["ms"]:
        broken.append(f"{ours['shape']}: {ours['ms']} ms, the matrix form takes {theirs['ms']}")
    return broken


def cpu(folder: Path) -> list[Row]:
    """Medians and quartiles of pytest-benchmark, and the table of their ratios in op_bench_cpu.md."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "-q", "-o", f"pythonpath={HERE}", str(HERE / "op_bench_cpu.py")]
        subprocess.run([*command, "--benchmark-only", f"--benchmark-json={out}"], cwd=ROOT, check=True)
        found = json.loads(out.read_text())["benchmarks"]
    rows = [
        {
            "kind": "cpu",
            **{key: entry["extra_info"][key] for key in ("workload", "shape", "form")},
            **{to: round(1e3 * entry["stats"][key], 3) for to, key in CPU_STATISTICS.items()},
            "repeats": entry["stats"]["rounds"],
            "threads": torch.get_num_threads(),
        }
        for entry in found
    ]
    _publish(cpu_table(rows), folder / "op_bench_cpu.md")
    return rows


def _publish(table: str, file: Path) -> None:
    """Show a table and write it, into a folder that may not be there yet."""
    print(table)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, f"{table}\n".encode())


def cpu_table(rows: list[Row]) -> str:
    """Milliseconds by form, and ours over eager's of the same dtype: of the medians, from quartile to quartile."""
    forms = list(dict.fromkeys(row["form"] for row in rows))
    by_workload: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_workload.setdefault((row["workload"], row["shape"]), {})[row["form"]] = row
    lines = []
    for names, found in by_workload.items():
        cells = [f"{found[form]['ms']:.3g}" if form in found else "" for form in forms]
        for dtype in ("fp32", "bf16"):
            ours, eager = found[f"fastpref {dtype}"], found[f"eager {dtype}"]
            ratio = [ours[a] / eager[b] for a, b in (("ms", "ms"), ("ms_q1", "ms_q3"), ("ms_q3", "ms_q1"))]
            cells.append("{:.2f} ({:.2f}–{:.2f})".format(*ratio))
        lines.append([*names, *cells])
    ratios = ["fastpref / eager, fp32", "fastpref / eager, bf16"]
    title = f"Milliseconds, forward and backward, on {rows[0]['threads']} CPU threads, torch {torch.__version__}."
    return f"{title}\n\n{markdown(['workload', 'shape', *forms, *ratios], lines)}"


def host(folder: Path) -> list[Row]:
    """What a call costs beside the work, and the table in op_bench_host.md."""
    rows: list[Row] = _child("op_bench_host.py")
    forms = list(dict.fromkeys(row["form"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["workload"] for row in rows):
        ms = {row["form"]: row["ms"] for row in rows if row["workload"] == name}
        lines.append([name, *(f"{1e3 * ms[form]:.0f}" for form in forms), f"{ms[forms[0]] / ms[forms[2]]:.2f}"])
    title = f"Microseconds of a call, forward and backward, on tiny tensors, one CPU thread, torch {torch.__version__}."
    _publish(f"{title}\n\n{markdown(['workload', *forms, 'fastpref / eager'], lines)}", folder / "op_bench_host.md")
    return rows


def launch(folder: Path) -> list[Row]:
    """What a call costs up to its launches, and the table in op_bench_launch.md."""
    rows: list[Row] = _child("op_bench_launch.py", FASTPREF_KERNELS_TRITON="1")
    lines = []
    for ours, eager in zip(rows[::2], rows[1::2], strict=True):
        ratio = f"{ours['ms'] / eager['ms']:.2f}"
        lines.append([ours["workload"], *(f"{1e3 * row['ms']:.0f}" for row in (ours, eager)), ratio])
    title = (
        f"Microseconds of a call, forward and backward, one CPU thread, torch {torch.__version__}: ours up to the "
        "launch, eager with its CPU kernels on tiny tensors. Where a workload draws noise (noise, velocity, "
        "keyed_noise, ddim_pool_step), drawing it is most of eager's time, so that ratio says nothing."
    )
    head = ["workload", *(row["form"] for row in rows[:2]), "fastpref / eager"]
    _publish(f"{title}\n\n{markdown(head, lines)}", folder / "op_bench_launch.md")
    return rows


def _without_gpu() -> str:
    """What `gpu` would have measured."""
    from op_bench_workloads import all_sizes, text

    lines = [f"skipped: {w.name} at {text(shape)}" for w, shape in all_sizes()]
    return "\n".join([*lines, f"{len(lines)} timings skipped: torch.cuda.is_available() is False"])


def measure(
    what: list[str], sizes: list[int], repeats: int, folder: Path, *, short: bool = False
) -> dict[str, list[Row]]:
    """Rows by kind."""
    measured: dict[str, list[Row]] = {}
    if "gpu" in what:
        measured["gpu"] = _child("op_bench_gpu.py", *(["--short"] if short else []))
    if "counts" in what:
        measured["counts"] = _child("op_bench_counts.py", TRITON_INTERPRET="1")
    if "cpu" in what:
        measured["cpu"] = cpu(folder)
    if "host" in what:
        measured["host"] = host(folder)
    if "launch" in what:
        measured["launch"] = launch(folder)
    if "rpo" in what:
        measured["rpo"] = rpo(sizes, repeats)
    return measured


def _kept(stored: list[dict[str, str]], measured: dict[str, list[Row]], *, short: bool) -> list[Row]:
    """Stored rows that the measured ones do not replace: those of other kinds, and in short of other cases."""
    case = ("kind", "workload", "shape", "form")
    again = {tuple(str(row[name]) for name in case) for rows in measured.values() for row in rows}
    partly = ("gpu",) if short else ()
    return [
        dict(row)
        for row in stored
        if row["kind"] not in measured or (row["kind"] in partly and tuple(row[name] for name in case) not in again)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", nargs="*", choices=[[], "gpu", "counts", "cpu", "host", "launch", "rpo"], help="default: see above"
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 256, 1024, 4096, 16384], help="M = N of rpo")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and the plots")
    parser.add_argument("--skip-without-gpu", action="store_true")
    parser.add_argument(
        "--short", action="store_true", help="gpu: one size of every op, two forms; the other rows stay"
    )
    options = parser.parse_args()
    what = options.what or (["gpu"] if torch.cuda.is_available() else ["counts", "rpo"])
    if "gpu" in what and not torch.cuda.is_available():
        if not options.skip_without_gpu:
            parser.error("gpu: torch.cuda.is_available() is False")
        print(_without_gpu())
        what = [kind for kind in what if kind != "gpu"]
    measured = measure(what, options.sizes, options.repeats, options.out, short=options.short)
    if not measured:
        return 0
    table = options.out / "op_bench.csv"
    kept = _kept(read_csv(table), measured, short=options.short)
    origin = provenance() | {"triton": version("triton")}
    write_csv(table, kept + [row | origin for rows in measured.values() for row in rows])
    if options.plot:
        from op_bench_plot import draw

        draw(read_csv(table), options.out)
    broken = broken_claims(measured["rpo"]) if "rpo" in measured else []
    print("\n".join(broken) or f"wrote {table}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
