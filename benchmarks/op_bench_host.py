"""Host time of a call on tensors too small to take any: as eager code calls it, through torch.library, eager torch.

The first two differ in how the call reaches the op, which is the same for Triton kernels; the rest of it is the CPU
path's own. One thread, forms by turns. Printed as JSON; run by `op_bench.py host`.
"""

from __future__ import annotations

import json
from statistics import quantiles
from time import perf_counter
from unittest.mock import patch

import torch
from op_bench_cpu import NAMES, step_of
from op_bench_workloads import WORKLOADS, text

from fastpref_kernels.common import operator as _operator

from gpu.workloads import leaves  # isort: skip  # on the path by op_bench_workloads

FORMS = {"fastpref": "fastpref fp32", "fastpref, torch.library": "fastpref fp32", "eager": "eager fp32"}
SHAPES = {
    **{"rpo_loss": (2, 4), "dpo_loss": (2, 1), "group_norm_silu": (1, 32, 2, 2), "geglu": (2, 8)},
    "lora_linear": (2, 8, 8, 2),
}
LATENTS = (2, 1, 2, 2)
ROUNDS, WARM_UP, CALLS = 60, 5, 5


def times(name: str) -> dict[str, list[float]]:
    """Microseconds of a forward with its backward in each form, which take turns."""
    w = WORKLOADS[name]
    torch.manual_seed(0)
    inputs = leaves(w.make(SHAPES.get(w.op, LATENTS), torch.float32, "cpu"), w.wrt)
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(ROUNDS + WARM_UP):
        for form, kind in FORMS.items():
            traced = _operator._is_traced
            with patch.object(_operator, "_is_traced", (lambda: True) if "torch.library" in form else traced):
                step = step_of(w, kind, inputs)
                began = perf_counter()
                for _ in range(CALLS):
                    step()
                spent = 1e6 * (perf_counter() - began) / CALLS
            if number >= WARM_UP:
                found[form].append(spent)
    return found


def rows() -> list[dict[str, object]]:
    """Median and quartiles by workload and form."""
    torch.set_num_threads(1)
    made = []
    for name in NAMES:
        for form, found in times(name).items():
            low, middle, high = quantiles(found, n=4)
            shape = text(SHAPES.get(WORKLOADS[name].op, LATENTS))
            ms = {"ms": middle, "ms_q1": low, "ms_q3": high}
            about = {"kind": "host", "workload": name, "shape": shape, "form": form, "repeats": ROUNDS, "threads": 1}
            made.append(about | {key: round(value / 1e3, 5) for key, value in ms.items()})
    return made


if __name__ == "__main__":
    print(json.dumps(rows()))
