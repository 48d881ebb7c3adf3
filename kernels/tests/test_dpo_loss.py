from __future__ import annotations

import math

import pytest
import torch
from reference import dpo_loss as oracle
from tolerances import assert_close

from fastpref_kernels import dpo_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", [1, 33, 700])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_matches_oracle(path: str, pairs: int, dtype: torch.dtype, label_smoothing: float) -> None:
    rewards = [torch.randn(pairs).to(dtype) for _ in range(2)]
    leaves = [x.clone().requires_grad_() for x in rewards]
    exact = [x.double().clone().requires_grad_() for x in rewards]
    result = dpo_loss(*leaves, beta=3.0, label_smoothing=label_smoothing)
    loss, accuracy = oracle.dpo_loss(*exact, 3.0, label_smoothing)
    assert result.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(result.loss, loss)
    assert_close(result.accuracy, accuracy)
    assert result.effective_contrasts == 1
    (2 * result.loss).backward()
    (2 * loss).backward()
    for leaf, expected in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        assert_close(leaf.grad, expected.grad)


def test_worked_by_hand(path: str) -> None:
    reward_w = torch.tensor([math.log(3.0), 0.0], requires_grad=True)
    result = dpo_loss(reward_w, torch.zeros(2), beta=2.0)
    # sigmoid(log 3) = 3/4 and sigmoid(0) = 1/2: loss (log 4/3 + log 2)/2; derivatives -(1/4)/2 and -(1/2)/2
    torch.testing.assert_close(result.loss.item(), math.log(8 / 3) / 2)
    assert result.accuracy == 0.75, "a pair that is won and a tie"
    result.loss.backward()
    torch.testing.assert_close(reward_w.grad, torch.tensor([-0.125, -0.25]))


def test_ties_count_a_half_and_nan_counts_nothing(path: str) -> None:
    reward_w = torch.tensor([2.0, 1.0, 0.0, math.nan, 1.0, math.nan, 3.0, 0.0])
    reward_l = torch.tensor([1.0, 1.0, 1.0, 1.0, math.nan, math.nan, 3.0, 9.0])
    assert dpo_loss(reward_w, reward_l, beta=1.0).accuracy.item() == (1 + 2 / 2) / 8


def test_extreme_rewards_stay_finite(path: str) -> None:
    reward_w = torch.tensor([1e4, -1e4, 1e4], requires_grad=True)
    reward_l = torch.tensor([-1e4, 1e4, 1e4])
    result = dpo_loss(reward_w, reward_l, beta=5000.0)
    result.loss.backward()
    torch.testing.assert_close(result.loss.item(), (5e7 + math.log(2)) / 3, rtol=1e-6, atol=0)
    torch.testing.assert_close(reward_w.grad, torch.tensor([0.0, -2500 / 3, -1250 / 3]))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_raising_a_winner_lowers_the_loss(path: str, label_smoothing: float) -> None:
    reward_w, reward_l = torch.zeros(4), torch.zeros(4)
    before = dpo_loss(reward_w, reward_l, beta=2.0, label_smoothing=label_smoothing).loss
    assert dpo_loss(reward_w + 0.1, reward_l, beta=2.0, label_smoothing=label_smoothing).loss < before
    assert dpo_loss(reward_w, reward_l + 0.1, beta=2.0, label_smoothing=label_smoothing).loss > before


def test_nan_reward_gives_nan_loss(path: str) -> None:
    assert dpo_loss(torch.tensor([torch.nan, 1.0]), torch.zeros(2), beta=1.0).loss.isnan()


def test_strided_rewards(path: str) -> None:
    rewards = torch.randn(20)
    result = dpo_loss(rewards[::2], rewards[1::2], beta=1.0)
    assert_close(result.loss, oracle.dpo_loss(rewards[::2], rewards[1::2], 1.0)[0])


def test_gradcheck() -> None:
    rewards = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda w, v: dpo_loss(w, v, beta=1.5, label_smoothing=0.1).loss, rewards)


R = torch.zeros(3)


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        ((R[:0], R[:0]), {"beta": 1.0}, "empty"),
        ((R, R[:2]), {"beta": 1.0}, "shape"),
        ((R[:, None], R), {"beta": 1.0}, "vector"),
        ((R.int(), R), {"beta": 1.0}, "floating"),
        ((R, R), {"beta": 0.0}, "beta"),
        ((R, R), {"beta": math.nan}, "beta"),
        ((R, R), {"beta": 1.0, "label_smoothing": 0.5}, "label_smoothing"),
        ((R, R), {"beta": 1.0, "label_smoothing": -0.1}, "label_smoothing"),
    ],
)
def test_errors_are_one_line(rewards: tuple, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        dpo_loss(*rewards, **settings)
    assert "\n" not in str(error.value)
