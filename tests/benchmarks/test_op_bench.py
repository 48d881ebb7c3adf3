"""What pytest-benchmark timed becomes a table of ratios and rows of a CSV."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MILLISECONDS = {"fastpref fp32": 2.0, "eager fp32": 4.0, "fastpref bf16": 3.0, "eager bf16": 2.0}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which has the name of a package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("op_bench", BENCHMARKS / "op_bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_host_times_become_microseconds(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ms = {"fastpref": 0.09, "fastpref, torch.library": 0.22, "eager": 0.06}
    rows = [
        {"kind": "host", "workload": "geglu", "shape": "2x8", "form": form, "ms": value} for form, value in ms.items()
    ]
    monkeypatch.setattr(bench, "_child", lambda script: rows if script == "op_bench_host.py" else [])
    monkeypatch.setattr(sys, "argv", ["op_bench.py", "host", "--out", str(tmp_path / "new")])
    assert bench.main() == 0
    said = (tmp_path / "new" / "op_bench_host.md").read_text()
    assert "| geglu | 90 | 220 | 60 | 1.50 |" in said and said in capsys.readouterr().out


def test_the_two_forms_that_are_timed_are_the_two_forms_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """One comes by torch.library, the other does not, and the switch is back afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import op_bench_host

    from fastpref_kernels.common import operator as _operator

    op, seen = _operator.REGISTERED["geglu"], []
    registered = op.registered
    monkeypatch.setattr(op, "registered", lambda *x: (seen.append(len(x)), registered(*x))[1])
    monkeypatch.setattr(op_bench_host, "ROUNDS", 2)
    found = op_bench_host.times("geglu")
    assert list(found) == list(op_bench_host.FORMS) and all(len(x) == 2 and min(x) > 0 for x in found.values())
    assert len(seen) == (2 + op_bench_host.WARM_UP) * op_bench_host.CALLS


def test_table_and_rows_in_a_folder_that_is_not_there_yet(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(command: list[str], **_: object) -> None:
        entries = [
            {
                "extra_info": {"workload": "geglu", "shape": "8x4", "form": form},
                "stats": {"median": ms / 1e3, "q1": ms / 1e3, "q3": 2 * ms / 1e3, "min": 0, "max": 1, "rounds": 7},
            }
            for form, ms in MILLISECONDS.items()
        ]
        Path(command[-1].partition("=")[2]).write_text(json.dumps({"benchmarks": entries}))

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=timed))
    monkeypatch.setattr(sys, "argv", ["op_bench.py", "cpu", "--out", str(tmp_path / "new")])
    assert bench.main() == 0
    said = (tmp_path / "new" / "op_bench_cpu.md").read_text()
    assert "| geglu | 8x4 | 2 | 4 | 3 | 2 | 0.50 (0.25–1.00) | 1.50 (0.75–3.00) |" in said
    with (tmp_path / "new" / "op_bench.csv").open() as stream:
        rows = {row["form"]: float(row["ms"]) for row in csv.DictReader(stream)}
    assert rows == MILLISECONDS


def test_kernels_in_short_replace_no_other_row(bench: ModuleType) -> None:
    def row(kind: str, shape: str, form: str = "fastpref") -> dict[str, str]:
        return {"kind": kind, "workload": "geglu", "shape": shape, "form": form}

    stored = [row("gpu", "8x8"), row("gpu", "9x9"), row("gpu", "8x8", "eager fp32"), row("cpu", "8x8")]
    measured: dict[str, list[dict[str, str]]] = {"gpu": [row("gpu", "8x8")]}
    assert bench._kept(stored, measured, short=True) == stored[1:]
    assert bench._kept(stored, measured, short=False) == stored[3:]
