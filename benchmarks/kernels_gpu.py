"""Every workload on the GPU at real sizes: prints JSON rows for `kernels.py gpu`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from kernels_workloads import Workload, all_sizes, text

from gpu.workloads import leaves  # isort: skip  # on the path by kernels_workloads

FORMS = ("fastpref", "eager fp32", "eager bf16", "compiled bf16")
WARM, REPEATS = 5, 30
NAIVE_LIMIT = 8 << 30  # bytes of one contrast matrix beyond which eager RPO is left out


def milliseconds(run: Callable[[], Any]) -> float:
    """Median device time, with the L2 cache emptied before each run."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(WARM):
        run()
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


def copy_bandwidth() -> float:
    """GB/s of a copy of 1 GB, reads and writes."""
    source, out = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * (1 << 30) / milliseconds(lambda: out.copy_(source)) / 1e6


def step_of(w: Workload, form: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    """Forward and backward."""
    op = w.run if form == "fastpref" else torch.compile(w.eager) if form.startswith("compiled") else w.eager

    def step() -> Any:
        outputs = op(inputs)
        if w.wrt:
            return torch.autograd.grad(outputs, [inputs[n] for n in w.wrt], [torch.ones_like(x) for x in outputs])
        return outputs

    return step


def measure(w: Workload, shape: tuple[int, ...], form: str, copy: float) -> dict[str, Any]:
    dtype = torch.float32 if form == "eager fp32" else torch.bfloat16
    inputs = leaves(w.make(shape, dtype, "cuda"), w.wrt)
    step = step_of(w, form, inputs)
    ms = milliseconds(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    row: dict[str, Any] = {
        "kind": "gpu",
        "workload": w.name,
        "shape": text(shape),
        "form": form,
        "ms": round(ms, 4),
        "peak_mb": round(peak / (1 << 20), 2),
        "repeats": REPEATS,
        "device": torch.cuda.get_device_name(),
        "copy_gb_s": round(copy),
    }
    if w.forward is not None:  # of the bytes that the kernels move, whatever the form moved
        rate = (w.forward + (w.backward or 0)) * w.elements(shape) / ms / 1e6
        row |= {"gb_s": round(rate, 1), "share_of_copy": round(rate / copy, 3)}
    return row


def main() -> None:
    copy = copy_bandwidth()
    rows = []
    for w, shape in all_sizes():
        for form in FORMS:
            if w.op == "rpo_loss" and form != "fastpref" and 4 * shape[0] ** 2 > NAIVE_LIMIT:
                continue
            rows.append(measure(w, shape, form, copy))
            print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
