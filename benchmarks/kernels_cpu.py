"""The CPU path and eager torch at latent sizes: `pytest benchmarks/kernels_cpu.py`, or `kernels.py cpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels_workloads import WORKLOADS, text

NAMES = [
    "implicit_reward[tensor,ref_pred]",
    "add_keyed_noise",
    "transition_loss[shared x_t]",
    "group_norm_silu",
    "geglu",
]


@pytest.mark.parametrize("form", ["fastpref", "eager fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(benchmark: Any, name: str, form: str) -> None:
    w = WORKLOADS[name]
    shape = (8, 4, 64, 64) if len(w.shape) == 4 and w.op != "group_norm_silu" else w.shape
    inputs = w.make(shape, torch.float32, "cpu")
    for leaf in w.wrt:
        inputs[leaf].requires_grad_()
    op: Callable[..., tuple[torch.Tensor, ...]] = w.run if form == "fastpref" else w.eager

    def step() -> tuple[torch.Tensor, ...]:
        outputs = op(inputs)
        return torch.autograd.grad([x.sum() for x in outputs], [inputs[leaf] for leaf in w.wrt])

    benchmark.extra_info.update(workload=name, shape=text(shape), form=form)
    assert all(g.isfinite().all() for g in benchmark(step))
