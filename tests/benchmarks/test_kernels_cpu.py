"""What pytest-benchmark timed becomes a table of ratios and rows of a CSV."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MILLISECONDS = {"fastpref fp32": 2.0, "eager fp32": 4.0, "fastpref bf16": 3.0, "eager bf16": 2.0}


def test_table_and_rows_in_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_kernels", BENCHMARKS / "kernels.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)

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
    monkeypatch.setattr(sys, "argv", ["kernels.py", "cpu", "--out", str(tmp_path / "new")])
    assert bench.main() == 0
    said = (tmp_path / "new" / "kernels_cpu.md").read_text()
    assert "| geglu | 8x4 | 2 | 4 | 3 | 2 | 0.50 (0.25–1.00) | 1.50 (0.75–3.00) |" in said
    with (tmp_path / "new" / "kernels.csv").open() as stream:
        rows = {row["form"]: float(row["ms"]) for row in csv.DictReader(stream)}
    assert rows == MILLISECONDS
