"""Every op at one size against eager float64, on this machine's paths; the bytes that its docstring states."""

from __future__ import annotations

import re
from importlib import import_module

import interpreter
import pytest
import torch
from gpu.workloads import WORKLOADS, Workload, gradients, leaves

import fastpref_kernels as fp

COUNTED = [name for name, w in WORKLOADS.items() if w.forward is not None]


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 arithmetic: 1e-5 of the largest element."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(result.double(), expected.double(), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "keyed_noise"])
def test_cpu_path_equals_eager_float64(name: str) -> None:
    w = WORKLOADS[name]
    inputs = w.make(w.shape, torch.float32, "cpu")
    ours, exact = leaves(inputs, w.wrt), leaves(inputs, w.wrt, torch.float64)
    outputs, expected = w.run(ours), w.eager(exact)
    for result, value in zip(outputs, expected, strict=True):
        close(result, value)
    for result, value in zip(gradients(outputs, ours, w.wrt), gradients(expected, exact, w.wrt), strict=True):
        close(result, value)


def counted(w: Workload) -> tuple[float, float]:
    """Bytes per element that the interpreted kernels move, forward and backward."""
    inputs = leaves(w.make(w.shape, torch.bfloat16, "cpu"), w.wrt)
    with interpreter.traffic() as forward:
        outputs = w.run(inputs)
    with interpreter.traffic() as backward:
        if w.wrt:
            gradients(outputs, inputs, w.wrt)
    return tuple(sum(x.read + x.written for x in side) / w.elements(w.shape) for side in (forward, backward))


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_are_those_of_the_docstring(triton_path: None, name: str) -> None:
    """Sums and row scalars may add 3 %."""
    w = WORKLOADS[name]
    text = re.sub(r"\s+", " ", import_module(getattr(fp, w.op).__module__).__doc__ or "")
    assert re.sub(r"\s+", " ", w.stated) in text
    forward, backward = counted(w)
    assert w.forward is not None and w.forward <= forward < 1.03 * w.forward
    if w.backward is not None:
        assert w.backward <= backward < 1.03 * w.backward


def test_a_wrong_byte_count_is_caught(triton_path: None) -> None:
    """A reward that reads its target twice: 2 bytes more than stated."""
    honest = WORKLOADS["implicit_reward[tensor,ref_error]"]

    def twice(inputs: dict) -> tuple[torch.Tensor, ...]:
        honest.run(inputs)
        return honest.run(inputs)

    greedy = Workload(**{**vars(honest), "run": twice, "shape": (2, 4, 32, 32)})
    assert counted(greedy)[0] > 1.9 * honest.forward


@pytest.mark.parametrize("kind", ["dpo", "rpo"])
def test_at_most_four_launches_for_a_paired_loss(triton_path: None, kind: str) -> None:
    pred, ref_pred = torch.randn(8, 40, requires_grad=True), torch.randn(8, 40)
    emb = {"emb_w": torch.randn(4, 6), "emb_l": torch.randn(4, 6), "temperature": 0.5} if kind == "rpo" else {}
    with interpreter.traffic() as launches:
        fp.paired_preference_loss(
            pred, ref_pred, fp.KeyedNoise(torch.arange(8)), beta=2.0, kind=kind, **emb
        ).loss.backward()
    assert len(launches) == (4 if kind == "rpo" else 3)


LATENTS = ["add_keyed_noise", "paired_preference_loss[dpo,noise]"]
LATENTS += [f"implicit_reward[{target},ref_pred]" for target in ("noise", "velocity")]


@pytest.mark.parametrize("name", LATENTS)
def test_kernels_equal_eager_float64(triton_path: None, name: str) -> None:
    w = WORKLOADS[name]
    inputs = w.make((2, 4, 32, 20), torch.float32, "cpu")
    ours, exact = leaves(inputs, w.wrt), leaves(inputs, w.wrt, torch.float64)
    outputs, expected = w.run(ours), w.eager(exact)
    pairs = [*zip(outputs, expected, strict=True)]
    pairs += zip(gradients(outputs, ours, w.wrt), gradients(expected, exact, w.wrt), strict=True)
    for result, value in pairs:
        close(result, value)
