from __future__ import annotations

import math

import pytest
import torch
from reference import rpo_loss as oracle
from tolerances import assert_close, softmax_rounding, sum_rounding

from fastpref_kernels import PairwiseLoss, dpo_loss, rpo_loss
from fastpref_kernels.rpo_loss import torch as torch_path
from fastpref_kernels.rpo_loss import triton as kernels

WEIGHTS = ["outside", "inside", "uniform"]


def check(reward_w, reward_l, emb_w, emb_l, scale: float = 1.0, exact: bool = False, **settings) -> PairwiseLoss:
    """Values and every gradient against the oracle. exact: the embeddings' cosines are exact in any order."""
    leaves = [x.detach().clone().requires_grad_() for x in (reward_w, reward_l)]
    doubles = [x.detach().double().clone().requires_grad_() for x in (reward_w, reward_l)]
    result = rpo_loss(*leaves, emb_w, emb_l, **settings)
    loss, effective, accuracy = oracle.rpo_loss(*doubles, emb_w, emb_l, **settings)
    # Weights off by a factor 1 + r: so is "outside", whose terms have one sign. In "inside" a term's logarithm and
    # slope change by at most r (1 + |u|). The entropy changes by at most r (1 + its largest value).
    weights = 0.0 if exact else weights_rounding(emb_w.shape[1], settings, result.loss.dtype)
    terms = weights
    if settings.get("weight") == "inside":
        terms *= 1 + 0.5 * settings["beta"] * float((reward_w.double()[:, None] - reward_l.double()).abs().max())
    entropy = weights * (1 + math.log(len(reward_l)))
    assert_close(result.loss, loss, scale, terms)
    assert_close(result.effective_contrasts, effective, scale * len(reward_l), math.expm1(entropy))
    assert_close(result.accuracy, accuracy)
    (3 * result.loss).backward()
    (3 * loss).backward()
    for leaf, expected in zip(leaves, doubles, strict=True):
        assert leaf.grad is not None
        assert_close(leaf.grad, expected.grad, scale, terms)
    return result


def weights_rounding(dim: int, settings: dict, dtype: torch.dtype) -> float:
    if settings.get("weight") == "uniform":
        return 0.0
    return softmax_rounding(dim, settings["temperature"], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("m", "n", "dim"), [(1, 1, 1), (33, 31, 7), (5, 70, 100), (64, 64, 48)])
def test_matches_oracle(path: str, m: int, n: int, dim: int, weight: str, dtype: torch.dtype) -> None:
    rewards = torch.randn(m).to(dtype), torch.randn(n).to(dtype)
    embeddings = (5 * torch.randn(m, dim)).to(dtype), (0.1 * torch.randn(n, dim)).to(dtype)
    check(*rewards, *embeddings, beta=3.0, temperature=0.5, weight=weight)


def test_wide_embeddings_and_many_columns(path: str) -> None:
    """More than one block of the norms, and tiles that end inside the group."""
    check(torch.randn(3), torch.randn(5), torch.randn(3, 1100), torch.randn(5, 1100), beta=3.0, temperature=0.5)
    check(torch.randn(2), torch.randn(300), torch.randn(2, 4), torch.randn(300, 4), beta=3.0, temperature=0.05)
    # ever more alike, so that each block of columns brings a higher maximum
    angle = torch.linspace(math.pi, 0.0, 300)
    losers = torch.stack([angle.cos(), angle.sin()], 1)
    winners = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    check(torch.randn(2), torch.randn(300), winners, losers, beta=3.0, temperature=0.5)


def test_many_rows(path: str) -> None:
    """More blocks of 16 rows than strips: a program adds to the columns' sums that it left."""
    check(torch.randn(530), torch.randn(3), torch.randn(530, 4), torch.randn(3, 4), beta=3.0, temperature=0.5)


@pytest.mark.parametrize("rows", [256, 384, 512, 1024, 4096, 16384])
@pytest.mark.parametrize("groups", [1, 4])
def test_programs_fill_the_card(rows: int, groups: int) -> None:
    """At least one of either walk for each of an H200's 132 multiprocessors; up to 128 rows one launch less instead."""
    found = kernels.plan(rows, rows, groups)
    assert found.softmax is not None and max(found.n_row_strips, found.n_column_strips) <= kernels.STRIPS
    assert groups * found.n_row_strips * found.n_column_strips >= 132
    assert groups * -(-rows // kernels.blocks(found.softmax, 2)["BLOCK_M"]) * found.n_column_strips >= 132
    assert found.column_strip % kernels.blocks(found.softmax, 2)["BLOCK_N"] == 0


def fp16_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `prepare_row`, without the scale: float64 values of the parts of unit rows."""
    x = torch.nn.functional.normalize(x.double()).float() * 2.0**14
    high = x.half()
    return high.double() / 2.0**14, (x - high.float()).half().double() / 2.0**14


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_two_fp16_parts_and_fp32_keep_the_same_bound(alike: float) -> None:
    """Sums of a tensor core that truncates after every 8 products, against one product at a time rounded to fp32; both
    within the bound that the tests of the op use."""
    dim, base = 512, torch.randn(512)
    w, l = (alike * base + (1 - alike**2) ** 0.5 * torch.randn(24, dim) for _ in range(2))  # noqa: E741
    exact = torch.nn.functional.normalize(w.double()) @ torch.nn.functional.normalize(l.double()).T
    (high_w, low_w), (high_l, low_l) = fp16_parts(w), fp16_parts(l)

    def product(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor, step: int) -> torch.Tensor:
        for k in range(0, dim, step):
            total = total.double() + a[:, k : k + step] @ b[:, k : k + step].T
            rounded = total.float()
            if step > 1:  # towards zero
                rounded = torch.where(rounded.abs() > total.abs(), torch.nextafter(rounded, 0 * rounded), rounded)
            total = rounded
        return total

    zero = torch.zeros(24, 24)
    small = product(low_w, high_l, product(high_w, low_l, zero, 8), 8)
    ours = (product(high_w, high_l, zero, 8) + small).double() - exact
    unit_w, unit_l = (torch.nn.functional.normalize(x).double() for x in (w, l))
    fp32 = product(unit_w, unit_l, zero, 1).double() - exact
    assert ours.abs().max() <= 2 * sum_rounding(dim) and fp32.abs().max() <= 2 * sum_rounding(dim)
    dropped = high_w @ low_l.T + low_w @ high_l.T + high_w @ high_l.T - exact
    assert dropped.abs().max() <= 10 * 2.0**-24, "of the parts alone: 8 u, and the rounding of either norm"


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("group_size", [1, 2, 12, 36, 72])
def test_contrast_groups(path: str, group_size: int, weight: str) -> None:
    inputs = torch.randn(72), torch.randn(72), torch.randn(72, 10), torch.randn(72, 10)
    result = check(*inputs, beta=3.0, temperature=0.3, weight=weight, group_size=group_size)
    # any weights have at most this entropy; exp and log of up to 4.3 round it by a few units in the last place
    assert 1 - 1e-6 <= result.effective_contrasts <= group_size * (1 + 3e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("tile", [1, 50, 1000])
def test_any_tile_gives_the_same(monkeypatch: pytest.MonkeyPatch, tile: int, weight: str) -> None:
    monkeypatch.setattr(torch_path, "_TILE", tile)
    inputs = [torch.randn(30, *shape, dtype=torch.float64) for shape in ((), (), (6,), (6,))]
    check(*inputs, beta=2.0, temperature=0.4, weight=weight)
    check(*inputs, beta=2.0, temperature=0.4, weight=weight, group_size=6)


def test_worked_by_hand(path: str) -> None:
    """Winner 0 is aligned with loser 0 and orthogonal to loser 1: weights 3/4 and 1/4 at temperature 1/log 3."""
    reward_w = torch.tensor([math.log(3.0)], requires_grad=True)
    reward_l = torch.tensor([0.0, math.log(3.0)], requires_grad=True)
    emb_w, emb_l = torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 0.1]])
    settings = {"beta": 2.0, "temperature": 1 / math.log(3.0)}
    result = rpo_loss(reward_w, reward_l, emb_w, emb_l, **settings)
    # u = (log 3, 0): -log sigmoid = (log 4/3, log 2); slopes sigmoid(-u) = (1/4, 1/2)
    expected = 0.75 * math.log(4 / 3) + 0.25 * math.log(2)
    torch.testing.assert_close(result.loss.item(), expected, rtol=1e-6, atol=0)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    torch.testing.assert_close(result.effective_contrasts.item(), math.exp(entropy), rtol=1e-6, atol=0)
    assert result.accuracy == 0.75, "a contrast that is won and a tie"
    result.loss.backward()
    torch.testing.assert_close(reward_w.grad, torch.tensor([-0.75 / 4 - 0.25 / 2]))
    torch.testing.assert_close(reward_l.grad, torch.tensor([0.75 / 4, 0.25 / 2]))
    inside = rpo_loss(reward_w, reward_l, emb_w, emb_l, **settings, weight="inside").loss.item()
    expected = (math.log(1 + 3**-0.75) + math.log(2)) / 2
    torch.testing.assert_close(inside, expected, rtol=1e-6, atol=0)
    uniform = rpo_loss(reward_w, reward_l, None, None, **settings, weight="uniform")
    torch.testing.assert_close(uniform.loss.item(), math.log(8 / 3) / 2, rtol=1e-6, atol=0)
    assert uniform.effective_contrasts == 2


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("losers", [4, 3])
def test_ties_count_a_half(path: str, weight: str, losers: int) -> None:
    """Of the four pairs; of all contrasts with one loser less. Whole numbers, so that most of them tie."""
    reward_w, reward_l = torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0, 0.0])[:losers]
    embeddings = torch.randn(4, 3), torch.randn(losers, 3)
    found = check(reward_w, reward_l, *embeddings, beta=1.0, temperature=0.5, weight=weight).accuracy
    # pairs: won, tie, lost, tie; contrasts with 1, 1, 2: 2 wins and a tie of 2, two ties of each 1, none of 0
    expected = (1 + 2 / 2) / 4 if losers == 4 else (2 + 1 / 2 + 2 * 2 / 2) / 12
    assert found.item() == pytest.approx(expected, rel=2**-22)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_groups_of_one_are_dpo(path: str, weight: str) -> None:
    rewards = [torch.randn(50) for _ in range(2)]
    embeddings = [torch.randn(50, 8) for _ in range(2)]
    first = [x.clone().requires_grad_() for x in rewards]
    second = [x.clone().requires_grad_() for x in rewards]
    rpo = rpo_loss(*first, *embeddings, beta=5.0, temperature=0.1, weight=weight, group_size=1)
    dpo = dpo_loss(*second, beta=5.0)
    rpo.loss.backward()
    dpo.loss.backward()
    # the one weight is exactly 1: two sums of the same positive terms, whose functions are good to two units each
    unit = 2.0**-24
    torch.testing.assert_close(rpo, dpo, rtol=2 * sum_rounding(50) + 8 * unit, atol=0)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=16 * unit, atol=1e-9)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_extreme_rewards_stay_finite(path: str, weight: str) -> None:
    reward_w = torch.tensor([1e4, -1e4, 0.0, 1e4])
    reward_l = torch.tensor([-1e4, 1e4, 1e4, 0.0])
    embeddings = torch.randn(4, 5), torch.randn(4, 5)
    check(reward_w, reward_l, *embeddings, scale=100.0, beta=2.0, temperature=0.5, weight=weight)


@pytest.mark.parametrize("weight", ["outside", "inside"])
def test_small_temperature_picks_the_nearest(path: str, weight: str) -> None:
    """At 1e-4 the softmax is an argmax: the loss is the nearest loser's alone."""
    emb_w, emb_l = torch.eye(6), torch.eye(6)[[3, 5, 0, 1, 4, 2]]
    rewards = torch.randn(6), torch.randn(6)
    result = check(*rewards, emb_w, emb_l, beta=2.0, temperature=1e-4, weight=weight, exact=True)
    assert result.effective_contrasts == 1
    nearest = dpo_loss(rewards[0], rewards[1][[2, 3, 5, 0, 4, 1]], beta=2.0).loss
    expected = nearest if weight == "outside" else (nearest + 5 * math.log(2)) / 6
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1e-4, 0.5])
@pytest.mark.parametrize("rows", ["zero", "powers of two", "random"])
def test_identical_embeddings_are_uniform(path: str, rows: str, temperature: float) -> None:
    """Equal cosines in exact arithmetic. A row of zeros or of +-2 gives equal ones in any order of the sum; those of
    random rows may differ by their rounding, which the temperature divides."""
    row = {"zero": torch.zeros(16), "powers of two": 2 * torch.randn(16).sign(), "random": torch.randn(16)}[rows]
    rewards = torch.randn(9), torch.randn(9)
    embedding = row.expand(9, -1)
    uniform = rpo_loss(*rewards, None, None, beta=2.0, temperature=1.0, weight="uniform")
    result = rpo_loss(*rewards, embedding, embedding, beta=2.0, temperature=temperature)
    rounding = softmax_rounding(16, temperature) if rows == "random" else 0.0
    assert_close(result.loss, uniform.loss.double(), 1.0, rounding)
    assert_close(result.effective_contrasts, torch.tensor(9.0), 9.0, math.expm1(rounding * (1 + math.log(9))))
    assert result.accuracy == uniform.accuracy


def test_some_zero_embeddings(path: str) -> None:
    rewards = torch.randn(9), torch.randn(9)
    check(*rewards, torch.zeros(9, 16), torch.randn(9, 16), beta=2.0, temperature=0.5, exact=True)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_raising_a_winner_lowers_the_loss(path: str, weight: str) -> None:
    reward_w, reward_l, emb_w, emb_l = torch.randn(6), torch.randn(6), torch.randn(6, 4), torch.randn(6, 4)

    def loss(w, v):
        return rpo_loss(w, v, emb_w, emb_l, beta=2.0, temperature=0.5, weight=weight).loss

    for i in range(6):
        step = torch.zeros(6).scatter(0, torch.tensor([i]), 0.5)
        assert loss(reward_w + step, reward_l) < loss(reward_w, reward_l) < loss(reward_w, reward_l + step)


def test_embeddings_get_no_gradient(path: str) -> None:
    reward_w, emb_w, emb_l = (
        torch.randn(4, requires_grad=True),
        torch.randn(4, 3, requires_grad=True),
        torch.randn(4, 3),
    )
    rpo_loss(reward_w, torch.zeros(4), emb_w, emb_l, beta=1.0, temperature=0.5).loss.backward()
    assert reward_w.grad is not None and emb_w.grad is None


def test_nan_reward_gives_nan_loss(path: str) -> None:
    rewards = torch.tensor([torch.nan, 1.0, 2.0])
    result = rpo_loss(rewards, torch.zeros(2), torch.randn(3, 2), torch.randn(2, 2), beta=1.0, temperature=0.5)
    assert result.loss.isnan()
    torch.testing.assert_close(result.accuracy, torch.tensor(2 / 3))


def test_strided_inputs(path: str) -> None:
    emb = torch.randn(8, 40)
    rewards = torch.randn(40)
    check(rewards[::2], rewards[1::2], emb.T[::2], emb.T[1::2], beta=2.0, temperature=0.5)


def test_gradcheck() -> None:
    rewards = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    embeddings = [torch.randn(6, 4, dtype=torch.float64) for _ in range(2)]
    for weight in WEIGHTS:
        settings = {"beta": 1.5, "temperature": 0.5, "weight": weight, "group_size": 3}
        assert torch.autograd.gradcheck(lambda w, v, s=settings: rpo_loss(w, v, *embeddings, **s).loss, rewards)


R, E = torch.zeros(4), torch.zeros(4, 2)
GOOD = {"beta": 1.0, "temperature": 1.0}


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        ((R[:0], R[:0], E[:0], E[:0]), {}, "empty"),
        ((R, R, E[:3], E), {}, "emb_w"),
        ((R, R, E, E[:, :1]), {}, "dimensions"),
        ((R, R, None, None), {}, "needs emb_w"),
        ((R, R, E.int(), E), {}, "floating"),
        ((R, R, E.to("meta"), E), {}, "on meta"),
        ((R, R, E, E), {"beta": -1.0}, "beta"),
        ((R, R, E, E), {"temperature": 0.0}, "temperature"),
        ((R, R, E, E), {"temperature": math.inf}, "temperature"),
        ((R, R, E, E), {"weight": "sideways"}, "weight"),
        ((R, R, E, E), {"group_size": 3}, "divide"),
        ((R, R, E, E), {"group_size": 0}, "divide"),
        ((R, R[:3], E, E[:3]), {"group_size": 1}, "as many"),
    ],
)
def test_errors_are_one_line(inputs: tuple, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        rpo_loss(*inputs, **GOOD | settings)
    assert "\n" not in str(error.value)
