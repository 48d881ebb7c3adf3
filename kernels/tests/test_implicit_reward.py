from __future__ import annotations

import pytest
import torch
from interpreter import shuffled
from reference import implicit_reward as oracle
from tolerances import assert_close

from fastpref_kernels import implicit_reward, implicit_reward_parts
from fastpref_kernels.common.last import counters

SHAPES = [(1, 1), (2, 1, 1, 1), (3, 3, 7, 5), (2, 33, 31), (4, 4, 16, 16), (2, 4, 37, 61)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A prediction close to the reference's, as in training."""
    target, ref_pred = torch.randn(shape), torch.randn(shape)
    return (ref_pred + 0.1 * torch.randn(shape)).to(dtype), target.to(dtype), ref_pred.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reference", ["ref_pred", "ref_error", "none"])
def test_matches_oracle(path: str, shape: tuple[int, ...], dtype: torch.dtype, reference: str) -> None:
    pred, target, ref_pred = batch(shape, dtype)
    ref_error = torch.rand(shape[0]) if reference == "ref_error" else None
    ref = ref_pred if reference == "ref_pred" else None
    leaf = pred.clone().requires_grad_()
    exact = pred.double().clone().requires_grad_()
    reward = implicit_reward(leaf, target, ref_pred=ref, ref_error=ref_error)
    expected = oracle.implicit_reward(exact, target, ref, ref_error)
    assert reward.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(reward, expected)
    weights = torch.randn(shape[0], dtype=reward.dtype)
    reward.backward(weights)
    expected.backward(weights.double())
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert_close(leaf.grad, exact.grad)


def test_worked_by_hand(path: str) -> None:
    pred = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
    target = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    ref_pred = torch.tensor([[2.0, 2.0], [1.0, 3.0]])
    parts = implicit_reward_parts(pred, target, ref_pred=ref_pred, cross=True)
    # errors (1 + 4)/2 and (0 + 4)/2; the reference's (4 + 4)/2 and (1 + 0)/2; cross (1*0 + 2*-2)/2
    assert parts.error.tolist() == [2.5, 2.0]
    assert parts.reward.tolist() == [1.5, -1.5]
    assert parts.cross is not None and parts.cross.tolist() == [-2.0]
    parts.reward.backward(torch.tensor([1.0, 2.0]))
    assert pred.grad is not None and pred.grad.tolist() == [[-1.0, -2.0], [0.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parts_match_oracle(path: str, dtype: torch.dtype) -> None:
    pred, target, ref_pred = batch((6, 4, 19, 17), dtype)
    parts = implicit_reward_parts(pred, target, ref_pred=ref_pred, cross=True)
    assert_close(parts.error, oracle.error(pred, target))
    assert_close(parts.reward, oracle.implicit_reward(pred, target, ref_pred))
    assert parts.cross is not None
    assert_close(parts.cross, oracle.cross(pred, target))
    assert implicit_reward_parts(pred, target, ref_pred=ref_pred).cross is None


def test_only_reward_back_propagates_and_only_to_pred(path: str) -> None:
    pred, target, ref_pred = (x.requires_grad_() for x in batch((2, 8), torch.float32))
    parts = implicit_reward_parts(pred, target, ref_pred=ref_pred, cross=True)
    assert parts.cross is not None
    assert not parts.error.requires_grad and not parts.cross.requires_grad
    parts.reward.sum().backward()
    assert pred.grad is not None and target.grad is None and ref_pred.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_where_policy_equals_reference(path: str, dtype: torch.dtype) -> None:
    pred = (1e2 * torch.randn(3, 4, 33, 31)).to(dtype)
    target = torch.randn_like(pred)
    assert implicit_reward(pred, target, ref_pred=pred.clone()).tolist() == [0.0] * 3
    ledger = implicit_reward_parts(pred, target).error
    assert implicit_reward(pred, target, ref_error=ledger).tolist() == [0.0] * 3


def test_small_rewards_keep_their_digits(path: str) -> None:
    """Errors near one that differ by 1e-6: a difference of two fp32 means would keep one digit."""
    target = torch.randn(4, 4, 64, 64)
    ref_pred = target + torch.randn_like(target)
    pred = ref_pred + 1e-6 * torch.randn_like(target)
    expected = oracle.implicit_reward(pred, target, ref_pred)
    assert ((implicit_reward(pred, target, ref_pred=ref_pred).double() - expected).abs() < 1e-12).all()


def test_row_does_not_depend_on_the_batch(path: str) -> None:
    pred, target, ref_pred = batch((10, 4, 33, 31), torch.bfloat16)
    whole = implicit_reward_parts(pred, target, ref_pred=ref_pred)
    for rows in (slice(0, 1), slice(3, 10), slice(9, 10)):
        part = implicit_reward_parts(pred[rows], target[rows], ref_pred=ref_pred[rows])
        assert torch.equal(part.reward, whole.reward[rows]) and torch.equal(part.error, whole.error[rows])


def test_memory_order_does_not_matter(path: str) -> None:
    pred, target, ref_pred = batch((2, 4, 9, 11), torch.float32)
    expected = implicit_reward(pred, target, ref_pred=ref_pred)
    last = pred.to(memory_format=torch.channels_last).requires_grad_()
    strided = torch.empty(2, 4, 9, 22)[..., ::2].copy_(target)
    reward = implicit_reward(last, strided, ref_pred=ref_pred.transpose(1, 3).contiguous().transpose(1, 3))
    assert torch.equal(reward, expected)
    reward.sum().backward()
    assert last.grad is not None
    assert_close(last.grad, -2 / 396 * (pred.double() - target.double()))
    expanded = torch.randn(1, 4, 9, 11).expand(2, -1, -1, -1)
    assert_close(implicit_reward(pred, expanded), oracle.implicit_reward(pred, expanded))


def test_mixed_dtypes(path: str) -> None:
    pred, target, ref_pred = torch.randn(2, 40).bfloat16(), torch.randn(2, 40), torch.randn(2, 40).half()
    assert_close(implicit_reward(pred, target, ref_pred=ref_pred), oracle.implicit_reward(pred, target, ref_pred))


def test_extreme_and_nan_rows(path: str) -> None:
    pred, target, ref_pred = batch((3, 50), torch.float32)
    pred[0] *= 1e4
    pred[1, 7] = torch.nan
    reward = implicit_reward(pred, target, ref_pred=ref_pred)
    expected = oracle.implicit_reward(pred, target, ref_pred)
    assert reward[1].isnan()
    assert_close(reward[::2], expected[::2], scale=1e3)


def test_many_chunks_of_several_blocks(path: str) -> None:
    pred, target, ref_pred = batch((2, 256 * 1024 + 5), torch.float32)
    assert_close(implicit_reward(pred, target, ref_pred=ref_pred), oracle.implicit_reward(pred, target, ref_pred))


def test_better_prediction_has_higher_reward(path: str) -> None:
    target, ref_pred = torch.randn(2, 2, 30)
    reward = implicit_reward(torch.stack([target[0], -target[1]]), target, ref_pred=ref_pred)
    assert reward[0] > 0 > implicit_reward(target + 100, target, ref_pred=ref_pred).max()
    assert reward[1] < reward[0]


def test_gradcheck() -> None:
    pred, target, ref_pred = (torch.randn(3, 2, 5, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x: implicit_reward(x, target, ref_pred=ref_pred), pred.requires_grad_())


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pred": X[:0], "target": X[:0]}, "empty"),
        ({"pred": X[0], "target": X[0]}, r"\(N, \.\.\.\)"),
        ({"pred": X, "target": X[:, :2]}, "shape"),
        ({"pred": X, "target": X.int()}, "floating"),
        ({"pred": X.int(), "target": X}, "floating"),
        ({"pred": X, "target": X.to("meta")}, "on meta"),
        ({"pred": X, "target": X, "ref_pred": X[:1]}, "shape"),
        ({"pred": X, "target": X, "ref_error": X[0]}, "ref_error"),
        ({"pred": X, "target": X, "ref_pred": X, "ref_error": X[:, 0]}, "not both"),
        ({"pred": X[:1], "target": X[:1], "cross": True}, "even"),
    ],
)
def test_errors_are_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        implicit_reward_parts(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(3))
def test_triton_last_program_adds_up_in_any_order(triton_path: None, seed: int) -> None:
    """Which program of a row is last decides nothing, and every launch leaves its counters at 0."""
    pred, target, ref_pred = batch((4, 4, 19, 17), torch.float32)
    expected = implicit_reward_parts(pred, target, ref_pred=ref_pred, cross=True)
    with shuffled(seed):
        for _ in range(2):
            found = implicit_reward_parts(pred, target, ref_pred=ref_pred, cross=True)
            assert all(map(torch.equal, found, expected))
            assert not counters(pred.device, 1).any()
