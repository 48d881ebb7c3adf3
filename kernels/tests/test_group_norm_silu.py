from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from reference import group_norm_silu as oracle
from tolerances import TOLERANCES, assert_close

from fastpref_kernels import group_norm_silu
from fastpref_kernels.group_norm_silu import plan
from fastpref_kernels.group_norm_silu import torch as torch_path

# (input, groups): one position, odd sizes, groups across blocks of channels, more than one tile
SHAPES = [((1, 2, 2), 1), ((3, 6, 7), 2), ((2, 9, 11, 7), 3), ((2, 70, 2, 3, 5), 7), ((1, 4, 19, 17), 4)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def loose(dtype: torch.dtype) -> float:
    """Absolute tolerance in units of the table's: half gradients are sums of products that were rounded once, fp32 ones
    lose what torch's E[x^2] - mean^2 for channels last loses."""
    return 20.0 if dtype == torch.float32 else 40.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_matches_oracle(path: str, shape: tuple[int, ...], groups: int, last: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(shape) + 0.5).to(dtype)
    x = channels_last(x) if last else x
    weight, bias = (torch.randn(shape[1]).to(dtype) for _ in range(2))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    exact = [t.double().clone().requires_grad_() for t in (x, weight, bias)]
    out = group_norm_silu(leaves[0], groups, leaves[1], leaves[2], 1e-5)
    expected = oracle.group_norm_silu(exact[0], groups, exact[1], exact[2], 1e-5)
    assert out.dtype == dtype and out.stride() == x.stride()
    grad = torch.randn(shape).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    assert_close(out, expected, scale=loose(dtype))
    size = expected.grad_fn is not None and float(max(e.grad.abs().max() for e in exact if e.grad is not None))
    for leaf, truth in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == dtype and leaf.grad.stride() == leaf.stride()
        assert_close(leaf.grad, truth.grad, scale=loose(dtype) * max(1.0, size))


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_the_same_values_as_torch(path: str, last: bool) -> None:
    x, weight, bias = torch.randn(2, 8, 9, 8), torch.randn(8), torch.randn(8)
    x = x.to(memory_format=torch.channels_last) if last else x
    functional = torch.nn.functional
    for w, b in product((weight, None), (bias, None)):
        expected = functional.silu(functional.group_norm(x, 4, w, b, 1e-6))
        torch.testing.assert_close(group_norm_silu(x, 4, w, b, 1e-6), expected, rtol=1e-5, atol=2e-6)


def test_worked_by_hand(path: str) -> None:
    x = torch.tensor([[[1.0, 3.0]]], requires_grad=True)  # mean 2, variance 1: xhat -1 and 1 without eps
    out = group_norm_silu(x, 1, torch.tensor([2.0]), torch.tensor([1.0]), 0.0)
    z = torch.tensor([[[-1.0, 3.0]]])
    assert_close(out, (z * z.sigmoid()).double())
    out.sum().backward()
    assert x.grad is not None and x.grad.abs().max() < 1e-6  # two elements are always at -1 and 1


# (input, groups, channels last, programs that fill the device, tile, tiles of a chunk, chunks): see plan.py
CUTS = [
    ((1, 4, 70, 70), 2, False, 132, "first_few", 1, 5),  # 2 channels of 20 segments; the last chunk is not full
    ((1, 4, 60, 70), 2, False, 1, "large", 1, 1),
    ((1, 2, 70, 300), 1, False, 1, "first", 1, 11),
    ((1, 130, 8, 8), 1, False, 132, "first_short", 1, 3),
    ((1, 2, 256, 260), 1, False, 132, "first_few", 2, 33),
    ((1, 10, 65, 65), 1, True, 132, "last", 5, 27),
    ((2, 100, 12, 12), 1, True, 132, "last", 1, 5),  # a group in two blocks of channels
    ((1, 132, 5, 5), 33, True, 132, "last_narrow", 1, 1),
    ((1, 90, 12, 3), 10, True, 132, "last_narrow", 1, 1),
    ((1, 150, 12, 3), 15, True, 132, "last", 1, 2),  # a block starts and ends within a group
]


@pytest.mark.parametrize(("shape", "groups", "last", "least", "tile", "tiles", "chunks"), CUTS, ids=str)
def test_split_groups_match_oracle(
    triton_path: None,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    groups: int,
    last: bool,
    least: int,
    tile: str,
    tiles: int,
    chunks: int,
) -> None:
    """Values and gradients where a group takes several programs, or one with the large tile."""
    monkeypatch.setattr(plan, "multiprocessors", lambda _: least)
    tile_of = plan.SPLIT | {"large": plan.LARGE}
    made = plan.cut(plan._numbers(shape, groups), last, plan.LARGE, least)
    assert (made.tile, made.tiles, made.n_chunks) == (tile_of[tile], tiles, chunks)
    x = torch.randn(shape) + 3.0
    leaves = [(channels_last(x) if last else x).requires_grad_(), *(torch.randn(shape[1]) for _ in range(2))]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = group_norm_silu(leaves[0], groups, leaves[1], leaves[2])
    expected = oracle.group_norm_silu(exact[0], groups, exact[1], exact[2], 1e-5)
    assert_close(out, expected, scale=5.0)
    grad = torch.randn(shape)
    found, truth = torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, exact, grad.double())
    assert_close(found[0], truth[0], scale=10.0)
    terms = math.prod(shape) // shape[1]
    for result, value in zip(found[1:], truth[1:], strict=True):  # sums over samples and positions
        assert_close(result, value, scale=10.0 * terms**0.5)


SDXL = [(320, 128), (640, 64), (1280, 32), (640, 128), (960, 128), (320, 64), (1920, 64), (2560, 32), (1920, 32)]


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("rows", [2, 4, 8, 16, 128])
@pytest.mark.parametrize(("channels", "side"), SDXL, ids=str)
def test_programs_fill_an_h200_at_the_sizes_of_sdxl(channels: int, side: int, rows: int, last: bool) -> None:
    """At least one for each of 132 multiprocessors, in at most two launches, which move a tensor twice at most."""
    x = torch.empty(rows, channels, side, side, dtype=torch.bfloat16, device="meta")
    x = x.to(memory_format=torch.channels_last) if last else x
    key = x.shape, x.stride(), x.dtype, x.dtype, 32
    for made in (plan.forward_plan(*key, 1e-5, 132), plan.backward_plan(*key, False, 132)):
        assert len(made.launches) <= 2
        assert all(launch.programs >= 132 for launch in made.launches)
        assert made.strides == x.stride()
        assert 4 * math.prod(made.partial) <= 0.02 * 2 * x.numel()  # entries of groups beside the tensor


@pytest.mark.parametrize(("channels", "side"), [(1280, 8), (1280, 16)], ids=str)
def test_groups_that_fit_are_read_once(channels: int, side: int) -> None:
    """SD1.5's smaller activations: one launch each way, where the groups are as many as the multiprocessors."""
    x = torch.empty(8, channels, side, side, dtype=torch.bfloat16, device="meta")
    key = x.shape, x.stride(), x.dtype, x.dtype, 32
    assert len(plan.forward_plan(*key, 1e-5, 132).launches) == 1
    assert len(plan.backward_plan(*key, False, 132).launches) == 1


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("chunk", [1, 80, 250, 700])
def test_cpu_path_takes_half_types_in_chunks(chunk: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of a sample (40 elements each), samples (240) or several at a time: the same to the last bit but for sums
    over samples."""
    x, weight, bias, grad = torch.randn(5, 12, 4, 5), torch.randn(12), torch.randn(12), torch.randn(5, 12, 4, 5)
    results = []
    for size in (chunk, 1 << 18):
        monkeypatch.setattr(torch_path, "_CHUNK", size)
        leaves = [t.bfloat16().requires_grad_() for t in (channels_last(x) if last else x, weight, bias)]
        out = group_norm_silu(leaves[0], 6, *leaves[1:])
        results.append((out, *torch.autograd.grad(out, leaves, grad.bfloat16())))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    for chunked, whole in zip(results[0][2:], results[1][2:], strict=True):
        torch.testing.assert_close(chunked, whole, rtol=2.0**-7, atol=1e-5)


def test_a_large_mean_keeps_its_variance(path: str) -> None:
    """E[x^2] - mean^2 in fp32 would be off by a fifth at a mean of a thousand standard deviations."""
    x = torch.randn(1, 4, 8, 8) + 1000
    difference = (group_norm_silu(x, 2).double() - oracle.group_norm_silu(x, 2, None, None, 1e-5)).abs().max()
    assert difference < 1e-3


def test_half_input_with_fp32_weights(path: str) -> None:
    x = torch.randn(2, 6, 5, 7).bfloat16()
    weight, bias = (torch.randn(6, requires_grad=True) for _ in range(2))
    out = group_norm_silu(x, 3, weight, bias)
    assert out.dtype == torch.bfloat16
    assert_close(out, oracle.group_norm_silu(x, 3, weight, bias, 1e-5), scale=4.0)
    out.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    exact = weight.detach().double().requires_grad_()
    oracle.group_norm_silu(x, 3, exact, bias.detach(), 1e-5).sum().backward()
    assert_close(weight.grad, exact.grad, scale=20.0)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_a_part_of_a_larger_tensor_is_read_in_place(path: str, last: bool) -> None:
    whole = torch.randn(3, 12, 5, 6)
    whole = whole.to(memory_format=torch.channels_last) if last else whole
    part = whole[1:, 4:10]
    out = group_norm_silu(part, 2)
    assert torch.equal(out, group_norm_silu(part.clone(memory_format=torch.preserve_format), 2))
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    leaf = part.detach().requires_grad_()
    group_norm_silu(leaf, 2).sum().backward()  # an expanded gradient
    exact = part.double().clone().requires_grad_()
    oracle.group_norm_silu(exact, 2, None, None, 1e-5).sum().backward()
    assert leaf.grad is not None
    assert_close(leaf.grad, exact.grad, scale=10.0)


def test_a_sample_does_not_depend_on_the_batch(path: str) -> None:
    x = torch.randn(4, 6, 9, 9)
    whole = group_norm_silu(x, 3)
    assert torch.equal(group_norm_silu(x[2:3], 3), whole[2:3])


def test_addresses_past_two_to_the_31(path: str, tmp_path: Path) -> None:
    """Samples 2^31 + 64 elements apart, in a file that has a hole in between."""
    distance = 2**31 + 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=distance + 32, dtype=torch.bfloat16)
    x = memory.as_strided((2, 4, 8), (distance, 8, 1))
    values = torch.randn(2, 4, 8).bfloat16()
    x.copy_(values)
    leaf = x.requires_grad_()
    out = group_norm_silu(leaf, 2)
    assert torch.equal(out, group_norm_silu(values, 2))
    out.float().square().sum().backward()
    dense = values.requires_grad_()
    group_norm_silu(dense, 2).float().square().sum().backward()
    assert leaf.grad is not None and dense.grad is not None and torch.equal(leaf.grad, dense.grad)


def test_nan_stays_in_its_group(path: str) -> None:
    x = torch.randn(2, 4, 3, 3)
    x[0, 1, 2, 2] = torch.nan
    out = group_norm_silu(x, 2)
    assert out[0, :2].isnan().all() and not out[0, 2:].isnan().any() and not out[1].isnan().any()


def test_empty_batch(path: str) -> None:
    x = torch.zeros(0, 4, 3, 3, requires_grad=True)
    weight, bias = (torch.ones(4, requires_grad=True) for _ in range(2))
    out = group_norm_silu(x, 2, weight, bias)
    out.sum().backward()
    assert out.shape == x.shape and weight.grad is not None and weight.grad.tolist() == [0.0] * 4


def test_frozen_weights_get_no_gradient(path: str) -> None:
    x = torch.randn(2, 4, 6, requires_grad=True)
    weight, bias = torch.randn(4), torch.randn(4, requires_grad=True)
    group_norm_silu(x, 2, weight, bias).sum().backward()
    assert weight.grad is None and x.grad is not None and bias.grad is not None
    exact = bias.detach().double().requires_grad_()
    oracle.group_norm_silu(x.detach(), 2, weight, exact, 1e-5).sum().backward()
    assert_close(bias.grad, exact.grad, scale=10.0)


def test_gradcheck() -> None:
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 3), 4, 4)]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm_silu(x, 2, w, b), inputs)


def test_half_types_are_rounded_once(path: str) -> None:
    """No element is further from the truth than the table's tolerance for one rounding, tails of SiLU included."""
    x = 4 * torch.randn(2, 4, 8, 8).half()
    exact = oracle.group_norm_silu(x, 1, None, None, 1e-5)
    absolute, relative = TOLERANCES[torch.float16]
    assert ((group_norm_silu(x, 1).double() - exact).abs() <= 4 * absolute + relative * exact.abs()).all()


X = torch.zeros(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0, 0], 1), "must be"),
        ((X[:, :0], 1), "must be"),
        ((X.int(), 1), "floating"),
        ((X, 3), "num_groups"),
        ((X, 0), "num_groups"),
        ((X, 2, torch.ones(3)), "weight"),
        ((X, 2, torch.ones(4), torch.ones(4).double()), "bias is"),
        ((X, 2, torch.ones(4).half(), torch.ones(4).half()), "weight is"),
        ((X, 2, torch.ones(4, device="meta"), torch.ones(4)), "on meta"),
        ((X[..., ::2], 2), "strides"),
        ((X.transpose(2, 3)[:, ::2], 2), "strides"),
    ],
)
def test_errors_are_one_line(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        group_norm_silu(*arguments)
    assert "\n" not in str(error.value)
