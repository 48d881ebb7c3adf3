"""Objectives: values worked out by hand, signs, gradients against autograd in float64, and what a safeguard may do."""

from __future__ import annotations

import math

import pytest
import torch

from fastpref.config import load_config
from fastpref.objectives import Objective, PairRewards, build_objective
from fastpref.objectives.rpo import combine_embeddings

F64 = torch.float64


def make(*overrides: str) -> Objective:
    return build_objective(load_config("", ["batch_size=4", *overrides]))


def random_rewards(n: int, seed: int = 0) -> PairRewards:
    g = torch.Generator().manual_seed(seed)
    reward_w, reward_l = (1e-3 * torch.randn(n, generator=g, dtype=F64) for _ in range(2))
    error_w, error_l = (0.1 + 0.1 * torch.rand(n, generator=g, dtype=F64) for _ in range(2))
    return PairRewards(reward_w, reward_l, error_w, error_l, 0.1 * torch.randn(n, generator=g, dtype=F64))


def random_embeddings(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    rows = torch.nn.functional.normalize(torch.randn(2 * n, 8, generator=g, dtype=F64), dim=-1)
    return rows[:n], rows[n:]


def test_sft_is_the_mean_winner_error() -> None:
    rewards = PairRewards(torch.zeros(2), None, torch.tensor([0.1, 0.3]), None)
    solution = make("method=sft").solve(rewards)
    assert solution.loss.item() == pytest.approx(0.2)
    assert solution.grad_w.tolist() == [-0.5, -0.5] and solution.grad_l is None


def test_dpo_by_hand() -> None:
    # beta/2 * (0.002 - 0.001) = 1; -log sigma(1) = log(1 + 1/e); its slope is -sigma(-1) * beta/2
    rewards = PairRewards(*(torch.tensor([v], dtype=F64) for v in (0.002, 0.001, 0.1, 0.1)))
    solution = make("method=dpo", "beta=2000").solve(rewards)
    assert solution.loss.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-9)
    slope = 1000 / (1 + math.e)
    assert solution.grad_w.item() == pytest.approx(-slope, rel=1e-9)
    assert solution.grad_l is not None and solution.grad_l.item() == pytest.approx(slope, rel=1e-9)


def test_rpo_by_hand() -> None:
    # two pairs, orthogonal embeddings: cos is 1 on the diagonal and 0 off it; tau = 1/ln 3 makes omega 3/4 and 1/4
    eye = torch.eye(2, dtype=F64)
    rewards = PairRewards(*(torch.tensor(v, dtype=F64) for v in ([0.0, 1.0], [0.0, 0.0], [0.1, 0.1], [0.1, 0.1])))
    objective = make("method=rpo", "batch_size=2", "beta=2", f"temperature={1 / math.log(3)}")
    solution = objective.solve(rewards, (eye, eye))
    row_0, row_1 = math.log(2), math.log(1 + math.exp(-1))
    assert solution.loss.item() == pytest.approx((row_0 + row_1) / 2, rel=1e-9)
    sigma_1 = 1 / (1 + math.e)
    assert solution.grad_w.tolist() == pytest.approx([-0.25, -sigma_1 / 2], rel=1e-9)
    assert solution.grad_l is not None
    # loser 0: 3/4 of row 0's slope and 1/4 of row 1's
    assert solution.grad_l.tolist() == pytest.approx(
        [(0.75 * 0.5 + 0.25 * sigma_1) / 2, (0.25 * 0.5 + 0.75 * sigma_1) / 2], rel=1e-9
    )
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert solution.effective_contrasts is not None
    assert solution.effective_contrasts.item() == pytest.approx(math.exp(entropy), rel=1e-9)


METHODS = [
    ["method=dpo"],
    ["method=dpo", "label_smoothing=0.2"],
    ["method=rpo", "weight=outside"],
    ["method=rpo", "weight=inside"],
    ["method=rpo", "weight=uniform"],
    ["method=rpo", "group_size=2"],
    ["method=dpo", "sft_weight=3.0"],
]


@pytest.mark.parametrize("overrides", [m for m in METHODS if "label_smoothing=0.2" not in m], ids=" ".join)
def test_raising_a_winner_lowers_the_loss_and_raising_a_loser_raises_it(overrides: list[str]) -> None:
    objective, rewards, embeddings = make(*overrides), random_rewards(4), random_embeddings(4)
    solution = objective.solve(rewards, embeddings)
    assert solution.grad_l is not None
    assert bool((solution.grad_w < 0).all()) and bool((solution.grad_l > 0).all())
    step = 1e-5
    up = objective.solve(rewards._replace(reward_w=rewards.reward_w + step), embeddings)
    assert up.loss < solution.loss
    assert rewards.reward_l is not None
    down = objective.solve(rewards._replace(reward_l=rewards.reward_l + step), embeddings)
    assert down.loss > solution.loss


@pytest.mark.parametrize("overrides", METHODS[:-1], ids=" ".join)
def test_gradient_is_the_slope_of_the_loss(overrides: list[str]) -> None:
    objective, rewards, embeddings = make(*overrides, "beta=100"), random_rewards(4), random_embeddings(4)
    solution = objective.solve(rewards, embeddings)
    assert solution.grad_l is not None and rewards.reward_l is not None
    for field, gradient in (("reward_w", solution.grad_w), ("reward_l", solution.grad_l)):
        for i in range(4):
            bump = torch.zeros(4, dtype=F64)
            bump[i] = 1e-6
            plus = objective.solve(rewards._replace(**{field: getattr(rewards, field) + bump}), embeddings).loss
            minus = objective.solve(rewards._replace(**{field: getattr(rewards, field) - bump}), embeddings).loss
            assert gradient[i].item() == pytest.approx(((plus - minus) / 2e-6).item(), rel=1e-6)


def test_a_tie_of_one_half_pulls_the_margin_to_zero() -> None:
    """With label 1/2 the loss is -(log σ(u) + log σ(-u))/2, whose slope is tanh(u/2)/2, zero at u = 0."""
    rewards = random_rewards(4)._replace(label=torch.tensor([1.0, 0.5, 1.0, 0.5], dtype=F64))
    solution = make("method=dpo", "beta=1000").solve(rewards)
    assert rewards.reward_l is not None
    u = 500 * (rewards.reward_w - rewards.reward_l)
    log_sigmoid = torch.nn.functional.logsigmoid
    both = torch.where(rewards.label == 1, -log_sigmoid(u), -(log_sigmoid(u) + log_sigmoid(-u)) / 2)
    assert solution.loss.item() == pytest.approx(both.mean().item(), rel=1e-12)
    slope = torch.where(rewards.label == 1, -torch.sigmoid(-u), torch.tanh(u / 2) / 2) * 500 / 4
    assert torch.allclose(solution.grad_w, slope, rtol=1e-9)


def test_rpo_with_groups_of_one_is_dpo() -> None:
    rewards, embeddings = random_rewards(4), random_embeddings(4)
    rpo = make("method=rpo", "group_size=1").solve(rewards, embeddings)
    dpo = make("method=dpo").solve(rewards)
    assert rpo.loss == dpo.loss and torch.equal(rpo.grad_w, dpo.grad_w)


def test_sft_term_adds_its_value_and_slope() -> None:
    rewards = random_rewards(4)
    plain, with_sft = make("method=dpo").solve(rewards), make("method=dpo", "sft_weight=7").solve(rewards)
    assert with_sft.loss.item() == pytest.approx((plain.loss + 7 * rewards.error_w.mean()).item(), rel=1e-12)
    assert torch.allclose(with_sft.grad_w, plain.grad_w - 7 / 4, rtol=1e-12)


def test_safeguard_keeps_the_winners_error_from_rising_to_first_order() -> None:
    """The step -∇ changes err_w by -(a‖δ_w‖² - b·δ_w·δ_l); with the safeguard that is never an increase."""
    rewards = random_rewards(4)._replace(cross=torch.tensor([0.5, -0.3, 1e-4, 0.0], dtype=F64))
    plain, safe = make("method=dpo").solve(rewards), make("method=dpo", "safeguard=0.9").solve(rewards)
    assert plain.grad_l is not None and safe.grad_l is not None and rewards.cross is not None
    assert torch.equal(safe.loss, plain.loss) and torch.equal(safe.grad_w, plain.grad_w)
    change = -(-safe.grad_w * rewards.error_w) + safe.grad_l * rewards.cross
    assert bool((change <= 0).all())
    scale = safe.grad_l / plain.grad_l
    # a = b in DPO: lambda = min(1, 0.1 * err_w / cross); untouched where winner and loser do not pull together
    assert scale[0].item() == pytest.approx(0.1 * rewards.error_w[0].item() / 0.5, rel=1e-9)
    assert scale[1:].tolist() == [1.0, 1.0, 1.0]


def test_text_and_image_embeddings_combine_to_the_mean_cosine() -> None:
    text, image = random_embeddings(4)
    both = combine_embeddings("text+image", text, image)
    cosine = both @ both.T
    assert torch.allclose(cosine, (text @ text.T + image @ image.T) / 2)
    assert torch.equal(combine_embeddings("text", text, None), torch.nn.functional.normalize(text, dim=-1))
