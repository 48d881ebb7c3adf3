"""``profile=true``: a trace of a few steps, and a table of what their time went into.

The parts of a step are marked with :func:`phase` where they are called; without a profiler a mark costs a microsecond.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from fastpref.atomic import make_directory, write_bytes

FOLDER, TRACE, TABLE = "profile", "trace.json.gz", "phases.csv"
PHASES = (
    *("rollout", "data", "noise", "policy forward", "reference", "loss", "backward", "communication", "optimizer"),
    *("logging",),
)
IDLE = "idle"
SKIPPED_STEPS, MARKED_STEPS = 2, 8  # of warm-up, and looked at
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
        profiler.export_chrome_trace(str(run_dir / FOLDER / TRACE))
        rows = step_table(list(profiler.events()))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(run_dir / FOLDER / TABLE, text.getvalue().encode())
        self.console.print(_shown(rows))


def step_table(events: list[Any]) -> list[dict[str, Any]]:
    """Rows ``phase, ms, share``: host milliseconds a step by phase; ``idle`` is what no phase accounts for.

    Args:
        events: of ``torch.profiler``; on a GPU the column ``device_ms`` holds the kernels launched in a phase.
    """
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    steps = [event for event in on_host if event.name == _STEP]
    total = sum(event.time_range.elapsed_us() for event in steps)
    threads = {event.thread for event in steps}
    marks = [event for event in on_host if event.name.startswith(_PREFIX) and event.thread in threads]
    host: Counter[str] = Counter()
    device: Counter[str] = Counter()
    around: list[Any] = []
    for event in sorted(marks, key=lambda event: (event.time_range.start, -event.time_range.end)):
        while around and around[-1].time_range.end <= event.time_range.start:
            around.pop()
        for mark, sign in ((event, 1), *((outer, -1) for outer in around[-1:])):
            host[mark.name.removeprefix(_PREFIX)] += sign * event.time_range.elapsed_us()
            device[mark.name.removeprefix(_PREFIX)] += sign * event.device_time_total
        around.append(event)
    host[IDLE] = total - sum(host[name] for name in PHASES)
    device[IDLE] = total - sum(device[name] for name in PHASES)
    count, on_device = max(len(steps), 1), any(device[name] for name in PHASES)
    rows = []
    for name in (*PHASES, IDLE):
        if host[name]:
            row: dict[str, Any] = {"phase": name, "ms": round(host[name] / count / 1e3, 3)}
            row["share"] = round(host[name] / total, 4) if total else 0.0
            rows.append(row | ({"device_ms": round(device[name] / count / 1e3, 3)} if on_device else {}))
    return rows


def _shown(rows: list[dict[str, Any]]) -> Table:
    table = Table(*rows[0], title="a step")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table
