"""Every op at one size against eager float64, on this machine's paths; the bytes that its docstring states."""

from __future__ import annotations

import re
from importlib import import_module

import interpreter
import pytest
import readme
import torch
from cases import rows
from eager import Eager
from gpu.plain import CANDIDATES
from gpu.workloads import WORKLOADS, Workload, gradients, leaves

import fastpref_kernels as fp
from fastpref_kernels.lora_linear import torch as lora_linear

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
    """Bytes per element that the interpreted kernels move, forward and backward; of latents, one row."""
    shape = (1, *w.shape[1:]) if w.shape[1:2] == (4,) else w.shape
    inputs = leaves(w.make(shape, torch.bfloat16, "cpu"), w.wrt)
    with interpreter.traffic() as forward:
        outputs = w.run(inputs)
    with interpreter.traffic() as backward:
        if w.wrt:
            gradients(outputs, inputs, w.wrt)
    return tuple(sum(x.read + x.written for x in side) / w.elements(shape) for side in (forward, backward))


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_are_those_of_the_docstring(triton_path: None, name: str) -> None:
    """Sums and row scalars may add 3 %."""
    w = WORKLOADS[name]
    assert states(w.op, re.sub(r"\s+", " ", w.stated))
    forward, backward = counted(w)
    assert w.forward is not None and w.forward <= forward < 1.03 * w.forward
    if w.backward is not None:
        assert w.backward <= backward < 1.03 * w.backward


def test_a_group_that_fits_is_read_once(triton_path: None) -> None:
    assert states("group_norm_silu", "takes one launch: forward 4 bytes per element at 16 bits, backward 6.")
    w = WORKLOADS["group_norm_silu"]
    forward, backward = counted(Workload(**{**vars(w), "shape": (2, 64, 32, 32)}))
    assert 4 <= forward < 1.05 * 4 and 6 <= backward < 1.03 * 6


def test_the_readme_has_the_bytes_of_the_workloads() -> None:
    cells = {op: [r for r in rows() if r.op.startswith(f"`{op}(")] for op in {WORKLOADS[name].op for name in COUNTED}}
    cells["implicit_reward"] += [row for row in rows() if row.op.startswith("the same with")]
    for w in map(WORKLOADS.__getitem__, COUNTED):
        for moved, column in ((w.forward, "forward"), (w.backward, "backward")):
            said = " ".join(getattr(row, column) for row in cells[w.op])
            said = re.sub(r"(\d+) \+ 2K", lambda m: str(int(m[1]) + 2 * CANDIDATES), said)
            assert moved is None or f"{moved:g}" in re.findall(r"\d+", said), (w.name, column)


def test_the_readme_s_table_of_ops_is_current() -> None:
    assert readme.written("ops") == readme.ops_table(), "python kernels/tests/readme.py"


def test_bytes_of_the_paired_loss(triton_path: None) -> None:
    """Both launches walk the predictions; the forward has 40 bytes a chunk of 240 elements besides, at most 5 %."""
    assert states("paired_preference_loss", "Bytes per element as in `implicit_reward`")
    pred, ref_pred = torch.randn(2, 2, 4, 64, 64).bfloat16().unbind()
    with interpreter.traffic() as launches:
        fp.paired_preference_loss(
            pred.requires_grad_(), fp.KeyedNoise(torch.arange(2)), ref_pred=ref_pred, beta=1.0
        ).loss.backward()
    for launch in (launches[0], launches[-1]):
        assert 4 <= (launch.read + launch.written) / pred.numel() < 1.05 * 4


def states(op: str, text: str) -> bool:
    """The docstring of an op's module has this text, line breaks apart."""
    module = import_module(getattr(fp, op).__module__)
    return text in re.sub(r"\s+", " ", module.__doc__ or "")


@pytest.mark.parametrize("name", ["dpo_loss", "rpo_loss[outside]"])
def test_bytes_of_a_loss_s_backward(name: str) -> None:
    """A product of each stored gradient with the scalar that comes in: 4 bytes read and 4 written a reward."""
    w = WORKLOADS[name]
    assert states(w.op, "forward 16 (two reads; both derivatives written), backward 16.") or states(
        w.op, "the backward multiplies the stored gradients, 8 bytes per reward."
    )
    inputs = leaves(w.make((64, 8), torch.float32, "cpu"), w.wrt)
    (loss,) = w.run(inputs)
    with Eager() as eager:
        torch.autograd.grad(loss, [inputs[x] for x in w.wrt])
    assert 8 * 2 * 64 <= eager.moved <= 8 * 2 * 64 + 16


@pytest.mark.parametrize(
    ("weight", "columns", "walks"), [("outside", 140, 2), ("inside", 140, 2), ("inside", 40, 1), ("uniform", 40, 0)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_of_the_embeddings_of_rpo(
    triton_path: None, weight: str, columns: int, walks: int, dtype: torch.dtype
) -> None:
    """140 columns are tiles of 16 x 16 and two walks; 40 fit one of 16 x 128. An embedding is read twice, for its norm
    and for its parts, and 65 of 96 elements are padded to 128."""
    assert states("rpo_loss", "(BLOCK_M + BLOCK_N) * D * parts fp16 elements per tile and walk")
    rows, dim, padded, parts = 65, 96, 128, 1 if dtype == torch.bfloat16 else 2
    block_n, tiles = (128, 5) if columns == 40 else (16, 5 * 9)
    emb_w, emb_l = torch.randn(rows, dim).to(dtype), torch.randn(columns, dim).to(dtype)
    with interpreter.traffic() as launches:
        fp.rpo_loss(torch.randn(rows), torch.randn(columns), emb_w, emb_l, beta=1.0, temperature=0.5, weight=weight)
    assert len(launches) == 2 + walks
    prepared = (rows + columns) * (2 * dim * dtype.itemsize + padded * parts * 2) if walks else 0
    stated = walks * tiles * (16 + block_n) * padded * parts * 2 + prepared
    moved = sum(x.read + x.written for x in launches)
    numbers = 4 * 32 * tiles * (16 + block_n) * max(walks, 1)  # of the tiles' rows and columns: rewards, scales, sums
    assert stated <= moved <= stated + numbers


def test_kernels_and_bytes_of_the_low_rank_layer() -> None:
    """Three products forward and five backward, six bytes an element of y; step by step it is 14."""
    assert states("lora_linear", "besides the operands, which every way reads: 6, against 14 of the five steps")
    assert states("lora_linear", "Three products forward, five backward")
    rows, _, columns, rank = WORKLOADS["lora_linear"].shape
    inputs = WORKLOADS["lora_linear"].make(WORKLOADS["lora_linear"].shape, torch.bfloat16, "cpu")
    x, weight, a, b = (inputs[name] for name in ("x", "weight", "lora_a", "lora_b"))
    low = 2 * rows * rank
    operands = 2 * sum(x.numel() for x in inputs.values()) + 2 * x.numel() + 2 * low
    with Eager() as forward:  # what the op does inside, which the mode would see as one operator
        y, t = lora_linear.forward(x, weight, None, a, b, 0.5)
    unread = 2  # the scalar of addmm, whose beta is 0
    assert (forward.launches, forward.moved - operands - unread) == (3, 6 * rows * columns)
    with Eager() as backward:
        lora_linear.backward(torch.ones_like(y), x, weight, a, b, t, 0.5, True, True)
    assert backward.launches == 5 + 1  # and the ones
    linear = torch.nn.functional.linear
    with Eager() as eager:
        linear(x, weight) + linear(linear(x, a), b) * 0.5
    assert eager.moved - operands == 14 * rows * columns


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
            pred, fp.KeyedNoise(torch.arange(8)), ref_pred=ref_pred, beta=2.0, kind=kind, **emb
        ).loss.backward()
    assert len(launches) == (4 if kind == "rpo" else 2)


def test_a_backward_launches_nothing_but_its_own(triton_path: None) -> None:
    """No zeros are written for the outputs that are not differentiated."""
    pred, ref_pred = torch.randn(8, 40, requires_grad=True), torch.randn(8, 40)
    loss = fp.paired_preference_loss(pred, fp.KeyedNoise(torch.arange(8)), ref_pred=ref_pred, beta=2.0).loss
    one = torch.ones(())
    with Eager() as eager:
        torch.autograd.grad(loss, pred, one)
    assert eager.launches == 1


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
