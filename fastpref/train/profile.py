"""``profile=true``: a trace of a few steps, and a table of what their time went into.

The parts of a step are marked with :func:`phase` where they are called; without a profiler a mark costs a microsecond.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, record_function

from fastpref.atomic import make_directory, write_bytes

FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "phases.csv"
PHASES = (
    *("rollout", "data", "noise", "policy forward", "reference", "loss", "backward", "communication", "optimizer"),
    *("logging",),
)
IDLE = "idle"
SKIPPED_STEPS, MARKED_STEPS = 2, 5  # of warm-up, and looked at
_PREFIX, _STEP = "fastpref: ", "fastpref step"


def phase(name: str) -> AbstractContextManager[Any]:
    """Books the time inside under ``name``, one of :data:`PHASES`; the innermost mark counts."""
    assert name in PHASES
    return record_function(_PREFIX + name)


class StepProfiler:
    """Watches a few steps of a run and writes ``profile/`` in its directory; does nothing unless asked to."""

    def __init__(self, wanted: bool, device: torch.device, console: Console) -> None:
        self.cuda, self.console = device.type == "cuda", console
        self._seen, self._profiler = 0, None
        if wanted:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notes would tear the progress line
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
            self._profiler = torch.profiler.profile(activities=activities)

    def step(self) -> AbstractContextManager[Any]:
        """Around a step with its logging."""
        self._seen += 1
        if self._profiler is not None and self._seen == SKIPPED_STEPS + 1:
            self._profiler.start()
        return record_function(_STEP)

    def close(self, run_dir: Path, *, last: bool = False) -> None:
        """After a step: once enough have been seen, or at the ``last`` one, write trace and table."""
        if self._profiler is None or self._seen <= SKIPPED_STEPS:
            return
        if not last and self._seen < SKIPPED_STEPS + MARKED_STEPS:
            return
        profiler, self._profiler = self._profiler, None
        if self.cuda:
            torch.cuda.synchronize()
        profiler.stop()
        make_directory(run_dir / FOLDER)
        plain = run_dir / FOLDER / "trace.json.tmp"
        profiler.export_chrome_trace(str(plain))
        trace = plain.read_bytes()
        write_bytes(run_dir / FOLDER / TRACE, gzip.compress(trace, compresslevel=3))
        plain.unlink()
        rows = step_table(json.loads(trace)["traceEvents"])
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(run_dir / FOLDER / TABLE, text.getvalue().encode())
        self.console.print(_shown(rows))


def step_table(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows ``phase, ms, share``: host milliseconds a step by phase; ``idle`` is what no phase accounts for.

    Args:
        events: ``traceEvents`` of a Chrome trace. One of a GPU has the column ``device_ms`` too, from the first to the
            last kernel of a phase.
    """
    marks = [event for event in events if event.get("cat") == "user_annotation"]
    steps = [event for event in marks if event["name"] == _STEP]
    threads, total = {event["tid"] for event in steps}, sum(event["dur"] for event in steps)
    host: Counter[str] = Counter()
    around: list[dict[str, Any]] = []
    phases = [event for event in marks if event["name"].startswith(_PREFIX) and event["tid"] in threads]
    for event in sorted(phases, key=lambda event: (event["ts"], -event["dur"])):
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
            around.pop()
        host[event["name"].removeprefix(_PREFIX)] += event["dur"]
        if around:
            host[around[-1]["name"].removeprefix(_PREFIX)] -= event["dur"]
        around.append(event)
    host[IDLE] = total - sum(host[name] for name in PHASES)
    device: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "gpu_user_annotation":
            device[event["name"].removeprefix(_PREFIX)] += event["dur"]
    count, rows = max(len(steps), 1), []
    for name in (*PHASES, IDLE):
        if host[name]:
            row: dict[str, Any] = {"phase": name, "ms": round(host[name] / count / 1e3, 3)}
            row["share"] = round(host[name] / total, 4) if total else 0.0
            rows.append(row | ({"device_ms": round(device[name] / count / 1e3, 3)} if device else {}))
    return rows


def _shown(rows: list[dict[str, Any]]) -> Table:
    table = Table(*rows[0], title="a step")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table
