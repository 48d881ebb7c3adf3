"""Every op's CPU path, forward and backward, beside eager and compiled torch; run by `op_bench.py cpu`.

The compiled form needs a C++ compiler and is skipped without one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pytest
import torch
from op_bench_workloads import WORKLOADS, Workload, text

from gpu.workloads import leaves  # isort: skip  # on the path by op_bench_workloads

FORMS = {
    "fastpref fp32": torch.float32,
    "eager fp32": torch.float32,
    "fastpref bf16": torch.bfloat16,
    "eager bf16": torch.bfloat16,
    "compiled bf16": torch.bfloat16,
}
SHAPES = {  # one sample of an SDXL activation, where a GPU gets a batch
    "rpo_loss": (1024, 256),
    "dpo_loss": (2048, 1),
    "group_norm_silu": (1, 320, 128, 128),
    "geglu": (1024, 10240),
    "lora_linear": (1024, 1280, 1280, 64),
}
LATENTS = (8, 4, 128, 128)
SECONDS = 1.0  # of each form of each workload
NAMES = [name for name in WORKLOADS if "ref_error" not in name]  # those do less of the same


def step_of(w: Workload, form: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    """Forward and, where there is something to differentiate, backward."""
    op = w.run if form.startswith("fastpref") else w.eager
    if form.startswith("compiled"):
        op = torch.compile(w.eager)
    if not w.wrt:
        return lambda: op(inputs)

    def step() -> Any:
        outputs = op(inputs)
        return torch.autograd.grad(outputs, [inputs[name] for name in w.wrt], [torch.ones_like(x) for x in outputs])

    return step


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(benchmark: Any, name: str, form: str) -> None:
    if form.startswith("compiled") and not shutil.which("g++"):
        pytest.skip("torch.compile on the CPU: no g++")
    torch.compiler.reset()
    torch.manual_seed(0)
    w = WORKLOADS[name]
    shape = SHAPES.get(w.op, LATENTS)
    step = step_of(w, form, leaves(w.make(shape, FORMS[form], "cpu"), w.wrt))
    benchmark.extra_info.update(workload=name, shape=text(shape), form=form)
    for result in step():  # also the compilation, before the clock runs
        assert result.isfinite().all()
    benchmark.pedantic(step, rounds=rounds(step), warmup_rounds=1)


def rounds(step: Callable[[], Any]) -> int:
    """As many as fit into SECONDS, at least 7."""
    began = perf_counter()
    step()
    return max(7, min(100, int(SECONDS / (perf_counter() - began))))
