"""Every op on the GPU: values and gradients against eager float64 there, no slower than a tenth of copying its bytes.

One command: `make gpu-acceptance`. Timings in full: `python benchmarks/op_bench.py`.
"""

from __future__ import annotations

import pytest
import torch

from fastpref_kernels.common import dispatch
from gpu.workloads import WORKLOADS, Workload, gradients, leaves

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
    pytest.mark.skipif(dispatch.INTERPRETED, reason="needs the compiled kernels: make gpu-acceptance"),
]
DTYPES = {torch.float32: (1e-4, 1e-5), torch.float16: (2e-3, 1e-3), torch.bfloat16: (1.6e-2, 8e-3)}
COPY_SHARE = 0.1  # of the copy bandwidth measured in the same test, at a size that fills the device


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "keyed_noise"])
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    w = WORKLOADS[name]
    inputs = w.make(w.shape, dtype, "cuda")
    ours, exact = leaves(inputs, w.wrt), leaves(inputs, w.wrt, torch.float64)
    outputs, expected = w.run(ours), w.eager(exact)
    relative, absolute = DTYPES[dtype]
    pairs = [*zip(outputs, expected, strict=True)]
    pairs += zip(gradients(outputs, ours, w.wrt), gradients(expected, exact, w.wrt), strict=True)
    for result, value in pairs:
        scale = value.abs().max().item()
        torch.testing.assert_close(result.double(), value, rtol=relative, atol=absolute * scale)


def test_noise_is_that_of_the_cpu() -> None:
    w = WORKLOADS["keyed_noise"]
    inputs = w.make((4, 4, 64, 64), torch.float32, "cuda")
    on_cpu = w.run({name: x.cpu() for name, x in inputs.items()})[0]
    torch.testing.assert_close(w.run(inputs)[0].cpu(), on_cpu, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WORKLOADS)
def test_results_repeat_bit_for_bit(name: str) -> None:
    w = WORKLOADS[name]
    inputs = leaves(w.make(w.shape, torch.bfloat16, "cuda"), w.wrt)
    runs = []
    for _ in range(3):
        outputs = w.run(inputs)
        runs.append([x.detach() for x in outputs] + list(gradients(outputs, inputs, w.wrt) if w.wrt else ()))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def seconds(run, repeats: int = 20) -> float:
    """Median of the device's time."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


@pytest.mark.parametrize("w", [w for w in WORKLOADS.values() if w.forward and w.op != "dpo_loss"], ids=lambda w: w.name)
def test_bandwidth(w: Workload) -> None:
    shape = (128, *w.shape[1:]) if w.op != "geglu" else (16384, 2560)
    inputs = w.make(shape, torch.bfloat16, "cuda")
    source = torch.empty(w.elements(shape) * int(w.forward) // 2, dtype=torch.uint8, device="cuda")
    copy = seconds(lambda: source.clone())
    assert seconds(lambda: w.run(inputs)) * COPY_SHARE < copy
