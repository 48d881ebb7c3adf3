from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference import lora_linear as oracle

from fastpref_kernels import lora_linear

SCALE = 0.7
# (leading dimensions, K, O, r): a vector, odd sizes, several tiles and steps of K and r
SHAPES = [((), 16, 8, 3), ((5,), 33, 19, 1), ((2, 3), 24, 70, 20), ((70,), 40, 65, 4)]
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def layer(k: int, o: int, r: int, dtype: torch.dtype, lora: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(weight, bias, lora_a, lora_b) whose products are of order one."""
    weight, a = torch.randn(o, k) / k**0.5, torch.randn(r, k) / k**0.5
    return weight.to(dtype), torch.randn(o).to(dtype), a.to(lora), (torch.randn(o, r) / r**0.5).to(lora)


def assert_rounded(result: torch.Tensor, exact: torch.Tensor, rounding: float, low: object, sums: object = 0.0) -> None:
    """Two roundings of the result, four of its low-rank part, and the accumulator's of everything.

    low, sums: the sizes of the low-rank part and of the whole, term by term in absolute value.
    """
    error = (result.double() - exact).abs()
    accumulator = min(rounding, 2.0**-24) * 64
    assert result.shape == exact.shape
    assert (error <= 2 * rounding * exact.abs() + 4 * rounding * low + accumulator * (low + sums)).all()


def assert_same_rows(result: torch.Tensor, expected: torch.Tensor) -> None:
    """To two roundings of values of order one: BLAS may sum rows of another stride in another order."""
    rounding = 2 * ROUNDING[result.dtype]
    torch.testing.assert_close(result, expected, rtol=rounding, atol=rounding)


def sizes(*inputs: torch.Tensor) -> list[torch.Tensor]:
    """The value and the gradients to x, A and B of the absolute values: grad, x, weight, bias, A, B."""
    grad, x, weight, bias, a, b = (t.detach().double().abs() for t in inputs)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    out = oracle.lora_linear(x, weight, bias, a, b, SCALE)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize(("dtype", "lora"), DTYPES, ids=str)
@pytest.mark.parametrize(("lead", "k", "o", "r"), SHAPES, ids=str)
def test_matches_oracle(
    path: str, lead: tuple[int, ...], k: int, o: int, r: int, dtype: torch.dtype, lora: torch.dtype
) -> None:
    x = torch.randn(*lead, k).to(dtype)
    weight, bias, a, b = layer(k, o, r, dtype, lora)
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    exact = [t.double().clone().requires_grad_() for t in (x, a, b)]
    out = lora_linear(leaves[0], weight, bias, leaves[1], leaves[2], SCALE)
    expected = oracle.lora_linear(exact[0], weight, bias, exact[1], exact[2], SCALE)
    assert out.dtype == dtype
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    low = sizes(grad, x, torch.zeros_like(weight), torch.zeros_like(bias), a, b)
    sums = sizes(grad, x, weight, bias, torch.zeros_like(a), torch.zeros_like(b))
    assert_rounded(out, expected, ROUNDING[dtype], low[0], sums[0])
    for leaf, truth, of_low, of_sums in zip(leaves, exact, low[1:], sums[1:], strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype and truth.grad is not None
        assert_rounded(leaf.grad, truth.grad, ROUNDING[dtype], of_low, of_sums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_not_worse_than_the_formula_in_torch(path: str, dtype: torch.dtype) -> None:
    """Root mean square distance from float64, against linear + scale * linear(linear) in the same dtype."""
    linear = torch.nn.functional.linear
    x, (weight, bias, a, b) = torch.randn(48, 64).to(dtype), layer(64, 80, 8, dtype, dtype)
    exact = oracle.lora_linear(x, weight, bias, a, b, SCALE)
    eager = linear(x, weight, bias) + linear(linear(x, a), b) * SCALE
    ours = lora_linear(x, weight, bias, a, b, SCALE)
    assert (ours.double() - exact).square().mean() <= (eager.double() - exact).square().mean()


def test_worked_by_hand(path: str) -> None:
    x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([10.0, 20.0])
    a, b = torch.tensor([[1.0, 1.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    out = lora_linear(x, weight, bias, a, b, 2.0)  # t = 2 * 3 = 6
    assert out.tolist() == [[17.0, 16.0]]
    out.backward(torch.tensor([[1.0, 0.0]]))
    assert a.grad is not None and b.grad is not None
    assert a.grad.tolist() == [[2.0, 4.0]] and b.grad.tolist() == [[6.0], [0.0]]


def test_without_bias_and_with_scale_zero(path: str) -> None:
    x, (weight, _, a, b) = torch.randn(4, 6).half(), layer(6, 5, 2, torch.float16, torch.float16)
    out = lora_linear(x, weight, None, a, b, 0.0)
    assert_rounded(out, x.double() @ weight.double().T, ROUNDING[torch.float16], 0.0, 1.0)


def test_rows_at_a_distance_and_gradients_of_any_strides(path: str) -> None:
    wide, (weight, bias, a, b) = torch.randn(6, 40).half(), layer(24, 9, 2, torch.float16, torch.float16)
    leaf = wide[:, 8:32].detach().requires_grad_()
    out = lora_linear(leaf, weight, bias, a, b, SCALE)
    dense = wide[:, 8:32].contiguous().requires_grad_()
    expected = lora_linear(dense, weight, bias, a, b, SCALE)
    assert_same_rows(out, expected)
    out.sum().backward()  # an expanded gradient
    expected.backward(torch.ones(6, 9).half())
    assert leaf.grad is not None and dense.grad is not None
    assert_same_rows(leaf.grad, dense.grad)


def test_only_what_needs_a_gradient_gets_one(path: str) -> None:
    x, (weight, bias, a, b) = torch.randn(3, 8), layer(8, 4, 2, torch.float32, torch.float32)
    out = lora_linear(x, weight, bias, a, b.requires_grad_(), SCALE)
    out.sum().backward()
    assert x.grad is None and a.grad is None and weight.grad is None
    assert b.grad is not None
    assert_rounded(b.grad, (SCALE * (x @ a.T)).double().sum(0).expand(4, -1), ROUNDING[torch.float32], 4.0)


def test_nan_stays_in_its_row(path: str) -> None:
    x, (weight, bias, a, b) = torch.randn(3, 8).half(), layer(8, 4, 2, torch.float16, torch.float16)
    x[1, 3] = torch.nan
    assert lora_linear(x, weight, bias, a, b, SCALE).isnan().all(1).tolist() == [False, True, False]


def test_addresses_past_two_to_the_31(path: str, tmp_path: Path) -> None:
    """Rows 2^31 + 64 elements apart, in a file that has a hole in between."""
    distance, (weight, bias, a, b) = 2**31 + 64, layer(8, 4, 2, torch.float16, torch.float16)
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=distance + 8, dtype=torch.float16)
    values = torch.randn(2, 8).half()
    x = memory.as_strided((2, 8), (distance, 1)).copy_(values)
    expected = lora_linear(values, weight, bias, a, b, SCALE)
    assert_same_rows(lora_linear(x, weight, bias, a, b, SCALE), expected)


def test_empty_batch(path: str) -> None:
    x, (weight, bias, a, b) = torch.zeros(0, 5, 8).half(), layer(8, 4, 2, torch.float16, torch.float16)
    out = lora_linear(x.requires_grad_(), weight, bias, a.requires_grad_(), b, SCALE)
    out.sum().backward()
    assert out.shape == (0, 5, 4) and a.grad is not None and a.grad.tolist() == torch.zeros(2, 8).tolist()


def test_autocast_casts_as_linear_does(path: str) -> None:
    x, (weight, bias, a, b) = torch.randn(4, 16), layer(16, 6, 2, torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_linear(x, weight, bias, a.requires_grad_(), b, SCALE)
    assert out.dtype == torch.bfloat16
    assert_rounded(out, oracle.lora_linear(x, weight, bias, a, b, SCALE), ROUNDING[torch.bfloat16], 1.0)
    out.float().sum().backward()
    assert a.grad is not None and a.grad.dtype == torch.float32


def test_gradcheck() -> None:
    weight, bias, a, b = layer(4, 3, 2, torch.float64, torch.float64)
    x = torch.randn(2, 4, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, SCALE), inputs)


X, W, A, B = torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.int(), W, None, A, B), "floating"),
        ((X, W.T, None, A, B), "weight must be"),
        ((X, W, torch.zeros(4), A, B), "bias must be"),
        ((X, W, None, A[:, :3], B), "lora_a must be"),
        ((X, W, None, A, B.T), "lora_b must be"),
        ((X, W, None, A[:0], B[:, :0]), "must be dense"),
        ((X, W.bfloat16(), None, A, B), "weight is"),
        ((X, W, None, A.half(), B), "lora_a is"),
        ((X, W.clone().requires_grad_(), None, A, B), "frozen"),
        ((X, W, None, A.to("meta"), B), "on meta"),
        ((torch.zeros(4, 2).T, W, None, A, B), "dense in its last"),
        ((torch.zeros(1, 2, 4).expand(3, 2, 4), W, None, A, B), "equally spaced"),
    ],
)
def test_errors_are_one_line(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        lora_linear(*arguments, SCALE)
    assert "\n" not in str(error.value)
