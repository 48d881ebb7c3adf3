"""One forward and backward of the RPO loss on the CPU: prints its seconds and its peak memory beyond the inputs.

python benchmarks/op_bench_rpo.py {fastpref,"eager fp32"} M
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from op_bench_workloads import WORKLOADS

from fastpref.memory import peak_rss_bytes, resident_bytes

DIM = 256


def measure(form: str, size: int) -> dict[str, float]:
    """Seconds and peak bytes of one call beyond what was there before it."""
    torch.manual_seed(0)
    w = WORKLOADS["rpo_loss[outside]"]
    inputs = w.make((size, DIM), torch.float32, "cpu")
    for name in w.wrt:
        inputs[name].requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, began = resident_bytes(), time.perf_counter()
    (loss,) = (w.run if form == "fastpref" else w.eager)(inputs)
    grad_w, grad_l = torch.autograd.grad(loss, [inputs[name] for name in w.wrt])
    seconds, peak = time.perf_counter() - began, peak_rss_bytes() - before
    return {"seconds": seconds, "peak_bytes": peak, "loss": loss.item(), "grad": (grad_w - grad_l).norm().item()}


def main() -> None:
    form, size = sys.argv[1], int(sys.argv[2])
    measure(form, 64)  # libraries loaded, threads started
    print(json.dumps(measure(form, size)))


if __name__ == "__main__":
    main()
