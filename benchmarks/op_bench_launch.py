"""Host time of the kernels' path up to the launch, which does nothing; printed as JSON, run by `op_bench.py launch`.

Triton compiles for an H200 (kernels/tests/stub_driver.py) and tiny CPU tensors take the kernels' path, so that checks,
allocations and the choice of the compiled kernel are timed as on a GPU. Eager torch runs the same formula on the same
tensors: the work of its CPU kernels on a few elements stands where its launches would. Needs FASTPREF_KERNELS_TRITON=1.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from statistics import quantiles
from time import perf_counter

import op_bench_host
import torch
from op_bench_cpu import NAMES, step_of
from op_bench_workloads import WORKLOADS, text

import stub_driver  # isort: skip  # on the path by op_bench_workloads
from gpu.workloads import leaves  # isort: skip

from fastpref_kernels.common import dispatch

FORMS = {"fastpref, launch stubbed": "fastpref fp32", "eager": "eager fp32"}


def times(name: str) -> dict[str, list[float]]:
    """Microseconds of a forward with its backward in each form, which take turns."""
    w = WORKLOADS[name]
    torch.manual_seed(0)
    inputs = leaves(w.make(op_bench_host.SHAPES.get(w.op, op_bench_host.LATENTS), torch.float32, "cpu"), w.wrt)
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(op_bench_host.ROUNDS + op_bench_host.WARM_UP):
        for form, kind in FORMS.items():
            with dispatch.triton_on_cpu() if form.startswith("fastpref") else nullcontext():
                step = step_of(w, kind, inputs)
                began = perf_counter()
                for _ in range(op_bench_host.CALLS):
                    step()
                spent = 1e6 * (perf_counter() - began) / op_bench_host.CALLS
            if number >= op_bench_host.WARM_UP:
                found[form].append(spent)
    return found


def rows() -> list[dict[str, object]]:
    """Median and quartiles by workload and form."""
    torch.set_num_threads(1)
    made = []
    for name in NAMES:
        for form, found in times(name).items():
            low, middle, high = quantiles(found, n=4)
            shape = text(op_bench_host.SHAPES.get(WORKLOADS[name].op, op_bench_host.LATENTS))
            ms = {"ms": middle, "ms_q1": low, "ms_q3": high}
            about = {"kind": "launch", "workload": name, "shape": shape, "form": form}
            counts = {"repeats": op_bench_host.ROUNDS, "threads": 1}
            made.append(about | counts | {key: round(value / 1e3, 5) for key, value in ms.items()})
    return made


if __name__ == "__main__":
    stub_driver.install()
    dispatch.INTERPRETED = True  # for triton_on_cpu() alone
    print(json.dumps(rows()))
