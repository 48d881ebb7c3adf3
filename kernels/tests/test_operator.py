"""The two forms of an op: eager code runs the function, whatever traces sees one op, and both give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import samples
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastpref_kernels.common.operator import REGISTERED


def outputs_of(op: Any, arguments: tuple) -> list[torch.Tensor]:
    """The tensors that an op returns, and those that its backward gives to the inputs."""
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x for x in arguments]
    found = op(*inputs)
    returned = [found] if torch.is_tensor(found) else list(found)
    leaves = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    roots = [x for x in returned if x.requires_grad]
    if roots:
        weights = [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view_as(x) for x in roots]
        returned += [x for x in torch.autograd.grad(roots, leaves, weights, allow_unused=True) if x is not None]
    return returned


def test_every_op_has_a_sample() -> None:
    assert {*REGISTERED} == {name.split("[")[0] for name in samples()}


@pytest.mark.parametrize("name", samples())
def test_both_forms_agree_bit_for_bit(path: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, arguments = REGISTERED[name.split("[")[0]], samples()[name]
    expected = outputs_of(op.registered, arguments)
    monkeypatch.setattr(op, "registered", None)  # eager code does not come by it
    found = outputs_of(op, arguments)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def test_whatever_traces_sees_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    op, seen = REGISTERED["geglu"], []
    of_torch = op.registered
    monkeypatch.setattr(op, "registered", lambda *x: (seen.append(len(x)), of_torch(*x))[1])
    monkeypatch.setattr(op, "plain", None)
    hidden = torch.randn(3, 8)
    with FlopCounterMode(display=False):
        op(hidden)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(hidden)
    assert op(fake).shape == (3, 4)
    assert len(seen) == 2
    assert torch.compile(op, backend="eager", fullgraph=True)(hidden).shape == (3, 4)
    torch._dynamo.reset()


def test_a_profiler_shows_the_op_by_its_name() -> None:
    hidden = torch.randn(3, 8, requires_grad=True)
    with torch.profiler.profile() as profiler:
        REGISTERED["geglu"](hidden).sum().backward()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["fastpref_kernels::geglu"] == counts["fastpref_kernels::geglu_backward"] == 1


def test_a_second_derivative_is_refused() -> None:
    hidden = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(REGISTERED["geglu"](hidden).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="geglu has no second derivative"):
        torch.autograd.grad(grad.sum(), hidden)


def test_an_op_without_a_gradient_says_so() -> None:
    grad, hidden = torch.randn(3, 4, requires_grad=True), torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="geglu_backward"):
        REGISTERED["geglu_backward"](grad, hidden).sum().backward()
