"""Counts, not times: bytes per element, launches and peak memory, of the interpreted kernels and of eager torch.

Prints JSON for `op_bench.py counts`; needs TRITON_INTERPRET=1. At the tests' sizes; a count per element depends little
on the size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from op_bench_workloads import WORKLOADS, Workload, text
from torch.profiler import ProfilerActivity, profile

import interpreter  # isort: skip  # on the path by op_bench_workloads
from eager import Eager  # isort: skip
from gpu.workloads import gradients, leaves

from fastpref_kernels.common import dispatch


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that was allocated at once while `run` ran, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    del kept
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def both(w: Workload, op: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    outputs = op(inputs)
    return gradients(outputs, inputs, w.wrt) if w.wrt else outputs


def count(w: Workload, form: str) -> dict[str, Any]:
    """Forward and backward together."""
    dtype = torch.float32 if form == "eager fp32" else torch.bfloat16
    inputs = leaves(w.make(w.shape, dtype, "cpu"), w.wrt)
    if form == "fastpref":
        with dispatch.triton_on_cpu():
            with interpreter.traffic() as launches:
                both(w, w.run, inputs)
            peak = peak_bytes(lambda: both(w, w.run, inputs))
        moved, number = sum(x.read + x.written for x in launches), len(launches)
    else:
        with Eager() as eager:
            both(w, w.eager, inputs)
        peak = peak_bytes(lambda: both(w, w.eager, inputs))
        moved, number = eager.moved, eager.launches
    elements = w.elements(w.shape)
    return {
        "kind": "counts",
        "workload": w.name,
        "shape": text(w.shape),
        "form": form,
        "bytes_per_element": round(moved / elements, 2),
        "launches": number,
        "peak_bytes_per_element": round(peak / elements, 2),
    }


def main() -> None:
    interpreter.install()
    forms = ("fastpref", "eager bf16", "eager fp32")
    print(json.dumps([count(w, form) for w in WORKLOADS.values() if w.op != "keyed_noise" for form in forms]))


if __name__ == "__main__":
    main()
