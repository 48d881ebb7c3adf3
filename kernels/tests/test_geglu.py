from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference import geglu as oracle
from tolerances import assert_close

from fastpref_kernels import geglu

SHAPES = [(2,), (2, 3, 10), (1, 3, 2 * 129), (1, 2 * 1025)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    hidden = (2 * torch.randn(shape)).to(dtype)
    leaf, exact = hidden.clone().requires_grad_(), hidden.double().clone().requires_grad_()
    out, expected = geglu(leaf), oracle.geglu(exact)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, expected, scale=4.0)
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert_close(leaf.grad, exact.grad, scale=4.0)


def test_is_the_exact_gelu_of_torch_not_the_tanh_one(path: str) -> None:
    gate = torch.linspace(-4, 4, 401)
    out = geglu(torch.cat([torch.ones_like(gate), gate]).unsqueeze(0))[0]
    assert (out - torch.nn.functional.gelu(gate)).abs().max() < 1e-6
    assert (out - torch.nn.functional.gelu(gate, approximate="tanh")).abs().max() > 1e-4


def test_phi_is_as_good_as_the_docstring_says(path: str) -> None:
    """Through a value of 1 / gate: the kernel's Phi to 2e-7, and to 1e-6 of itself down to -5."""
    gate = torch.linspace(-5, 5, 4000)
    phi = geglu(torch.cat([1 / gate, gate]).unsqueeze(0))[0].double()
    exact = (1 / gate).double() * gate.double() * oracle.phi(gate)
    assert (phi - exact).abs().max() < 4e-7  # twice the rounding of Phi and two products
    if path == "triton":
        assert ((phi - exact) / exact).abs().max() < 1.3e-6


def test_extreme_and_nan_elements(path: str) -> None:
    nan = torch.nan
    hidden = torch.tensor([[1.0, 2.0, nan, 1.0, 1e4, -1e4, 1.0, nan]], requires_grad=True)
    out = geglu(hidden)
    assert out[0, :2].tolist() == [1e4, 0.0]
    assert out[0, 2:].isnan().all()
    out[0, :2].sum().backward()
    assert hidden.grad is not None and hidden.grad[0, [0, 1, 4, 5]].tolist() == [1e4, 0.0, 1.0, 0.0]


def test_rows_at_a_distance_and_gradients_of_any_strides(path: str) -> None:
    wide = torch.randn(4, 3, 30)
    expected = geglu(wide[..., :20].contiguous())
    assert torch.equal(geglu(wide[..., :20]), expected)
    leaf = wide[..., :20].contiguous().requires_grad_()
    geglu(leaf).sum().backward()  # an expanded gradient
    dense = leaf.detach().clone().requires_grad_()
    geglu(dense).backward(torch.ones(4, 3, 10))
    assert leaf.grad is not None and dense.grad is not None and torch.equal(leaf.grad, dense.grad)


def test_addresses_past_two_to_the_31(path: str, tmp_path: Path) -> None:
    """Rows 2^31 + 64 elements apart, in a file that has a hole in between."""
    distance = 2**31 + 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=distance + 32, dtype=torch.bfloat16)
    values = torch.randn(2, 32).bfloat16()
    hidden = memory.as_strided((2, 32), (distance, 1)).copy_(values).requires_grad_()
    out = geglu(hidden)
    assert torch.equal(out, geglu(values))
    out.backward(torch.ones_like(out))
    dense = values.requires_grad_()
    geglu(dense).backward(torch.ones_like(out))
    assert hidden.grad is not None and dense.grad is not None and torch.equal(hidden.grad, dense.grad)


def test_empty_batch(path: str) -> None:
    hidden = torch.zeros(0, 5, 8, requires_grad=True)
    out = geglu(hidden)
    out.sum().backward()
    assert out.shape == (0, 5, 4) and hidden.grad is not None and hidden.grad.shape == (0, 5, 8)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(geglu, torch.randn(3, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.zeros(()), "2C"),
        (torch.zeros(3, 5), "2C"),
        (torch.zeros(3, 0), "2C"),
        (torch.zeros(3, 4).int(), "floating"),
        (torch.zeros(4, 6).T, "dense in its last"),
        (torch.zeros(2, 3, 4).transpose(0, 1), "equally spaced"),
    ],
)
def test_errors_are_one_line(hidden: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        geglu(hidden)
    assert "\n" not in str(error.value)
