"""Every workload on the GPU at real sizes, or at the middle one: prints JSON rows for `op_bench.py gpu [--short]`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from devices import forget_peak, name_of, peak_device_bytes, seconds
from op_bench_workloads import Workload, all_sizes, text

from gpu.workloads import leaves  # isort: skip  # on the path by op_bench_workloads

FORMS = ("fastpref", "eager fp32", "eager bf16", "compiled bf16")
SHORT = ("fastpref", "eager bf16")  # nothing that compiles for seconds
WARM, REPEATS = 5, 30
NAIVE_LIMIT = 8 << 30  # bytes of one contrast matrix beyond which eager RPO is left out


def milliseconds(run: Callable[[], Any], device: str = "cuda") -> float:
    """Median device time, with the L2 cache emptied before each run; on a CPU wall-clock time."""
    if device == "cpu":
        return 1e3 * statistics.median(seconds(run) for _ in range(3))
    for _ in range(WARM):
        run()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(device: str = "cuda") -> float:
    """GB/s of a copy of 1 GB (on a CPU 1 MB), reads and writes."""
    size = 1 << (30 if device == "cuda" else 20)
    source, out = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / milliseconds(lambda: out.copy_(source), device) / 1e6


def middle_sizes(small: bool = False) -> list[tuple[Workload, tuple[int, ...]]]:
    """Every workload at the middle one of its sizes; ``small``: at that of its test."""
    sizes: dict[str, list[tuple[int, ...]]] = {}
    found: dict[str, Workload] = {}
    for w, shape in all_sizes():
        found[w.name] = w
        sizes.setdefault(w.name, []).append(shape)
    return [(w, w.shape if small else sizes[name][len(sizes[name]) // 2]) for name, w in found.items()]


def step_of(w: Workload, form: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    """Forward and backward."""
    op = w.run if form == "fastpref" else torch.compile(w.eager) if form.startswith("compiled") else w.eager

    def step() -> Any:
        outputs = op(inputs)
        if w.wrt:
            return torch.autograd.grad(outputs, [inputs[n] for n in w.wrt], [torch.ones_like(x) for x in outputs])
        return outputs

    return step


def measure(w: Workload, shape: tuple[int, ...], form: str, copy: float, device: str = "cuda") -> dict[str, Any]:
    dtype, where = torch.float32 if form == "eager fp32" else torch.bfloat16, torch.device(device)
    inputs = leaves(w.make(shape, dtype, device), w.wrt)
    step = step_of(w, form, inputs)
    ms = milliseconds(step, device)
    forget_peak(where)
    before = peak_device_bytes(where)  # what is held now
    step()
    peak = peak_device_bytes(where)
    row: dict[str, Any] = {
        "kind": "gpu",
        "workload": w.name,
        "shape": text(shape),
        "form": form,
        "ms": round(ms, 4),
        "peak_mb": "" if isinstance(peak, str) else round((peak - int(before)) / (1 << 20), 2),
        "repeats": REPEATS,
        "device": name_of(where),
        "copy_gb_s": round(copy),
    }
    if w.forward is not None:  # of the bytes that the kernels move, whatever the form moved
        rate = (w.forward + (w.backward or 0)) * w.elements(shape) / ms / 1e6
        row |= {"gb_s": round(rate, 1), "share_of_copy": round(rate / copy, 3)}
    return row


def main() -> None:
    short, copy = "--short" in sys.argv[1:], copy_bandwidth()
    rows = []
    for w, shape in middle_sizes() if short else all_sizes():
        for form in SHORT if short else FORMS:
            if w.op == "rpo_loss" and form != "fastpref" and 4 * shape[0] ** 2 > NAIVE_LIMIT:
                continue
            rows.append(measure(w, shape, form, copy))
            print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
