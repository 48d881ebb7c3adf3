from __future__ import annotations

import math

import pytest
import torch
from reference import transition_loss as oracle
from reference.ddim_pool_step import ddim_step
from reference.dpo_loss import share_won
from tolerances import assert_close
from transitions import ALPHAS_CUMPROD, DTYPES, TransitionBatch, same_step

from fastpref_kernels import transition_loss
from fastpref_kernels.common import dispatch
from fastpref_kernels.transition_loss import triton as launches

SHAPES = [(1,), (3, 7, 5), (4, 16, 16), (2, 24, 25)]


def compare(batch: TransitionBatch, **settings: object) -> None:
    """Loss, ratios and both gradients equal the oracle's."""
    leaves = batch.require_grad()
    process = {key: settings[key] for key in ("eta", "prediction_type") if key in settings}
    rest = {"guidance_scale": 5.0} | {key: value for key, value in settings.items() if key not in process}
    result = transition_loss(*batch.arguments(**process), **rest)
    exact, (loss, ratio_w, ratio_l) = batch.exact(**settings)
    assert_close(result.loss, loss.detach(), scale=2)
    assert_close(result.ratio_w, ratio_w, scale=2)
    assert_close(result.ratio_l, ratio_l, scale=2)
    assert result.accuracy.item() == pytest.approx(share_won(ratio_w, ratio_l).item())
    clip = settings.get("clip", 0.1)
    # fp32 rounds a ratio by 1e-5 at most (the tolerance above): what is counted lies further apart, or is exactly equal
    gap = (ratio_w - ratio_l).abs()
    assert ((gap > 2e-5) | (batch.x_w == batch.x_l).flatten(1).all(1)).all()
    assert clip is None or ((torch.stack([ratio_w, ratio_l]) - 1).abs() - clip).abs().min() > 2e-5
    outside = 0.0 if clip is None else (torch.stack([ratio_w, ratio_l]) - 1).abs().gt(clip).double().mean().item()
    assert result.clipped.item() == pytest.approx(outside)
    result.loss.backward()
    loss.backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and reference.grad is not None and leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, reference.grad, scale=max(float(reference.grad.abs().max()), 1e-3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["shared", "stacked"])
def test_matches_oracle(path: str, shape: tuple[int, ...], dtype: torch.dtype, stacked: bool) -> None:
    compare(TransitionBatch(shape, dtype, stacked=stacked))


@pytest.mark.parametrize("stacked", [False, True], ids=["shared", "stacked"])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip": None},
        {"clip": 1.5},
        {"clip": 0.01},
        {"beta": 500.0},
        {"eta": 0.5, "clip": 0.3},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0, "clip": None},
        {"prediction_type": "v_prediction", "clip": None},
    ],
    ids=str,
)
def test_settings_match_oracle(path: str, settings: dict, stacked: bool) -> None:
    compare(TransitionBatch((4, 9, 7), torch.float32, stacked=stacked), **settings)
    compare(TransitionBatch((4, 9, 7), torch.bfloat16, stacked=stacked, with_guidance=False), **settings)


def test_every_kind_of_clipping_occurs(path: str) -> None:
    """Neither, the winner's, the loser's and both ratios outside the bounds: the four ways through the backward."""
    batch = TransitionBatch((2, 40), pairs=4)
    kinds = [(0.05, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, -1.0)]  # log-ratios: no pair is a tie that rounding decides
    mean, sigma, _ = ddim_step(
        batch.x_t, oracle.guided(*batch.reference, 5.0), ALPHAS_CUMPROD, batch.t, batch.t_prev, 1.0
    )
    theta, _, _ = ddim_step(batch.x_t, oracle.guided(*batch.policy, 5.0), ALPHAS_CUMPROD, batch.t, batch.t_prev, 1.0)
    for i, pushes in enumerate(kinds):
        gap = (theta - mean)[i]
        for x, push in zip((batch.x_w, batch.x_l), pushes, strict=True):
            # a draw in the plane between the means, as likely under both: ratio 1; then pushed towards the policy's
            z = torch.randn_like(gap)
            plane = (mean + theta)[i] / 2 + sigma[i] * (z - (z * gap).sum() / gap.square().sum() * gap)
            x[i] = plane + push * 80 * sigma[i] ** 2 / gap.square().sum() * gap
    _, (_, ratio_w, ratio_l) = batch.exact()
    outside = torch.stack([ratio_w, ratio_l]).sub(1).abs().gt(0.1).T.tolist()
    assert outside == [[False, False], [True, False], [False, True], [True, True]]
    leaves = batch.require_grad()
    compare(batch)
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad[:3].flatten(1).norm(dim=1).min() > 0 and not leaf.grad[3].any()


def test_worked_by_hand(path: str) -> None:
    """DDIM with abar 0.5 and 0.8, eta 1: std^2 = (0.2/0.5)(1 - 0.5/0.8) = 0.15, d = sqrt(1.6), c = -0.3/sqrt(0.2)."""
    a, c = math.sqrt(1.6), -0.3 / math.sqrt(0.2)
    step = torch.tensor([[math.nan, math.nan, a - 1, c, math.sqrt(0.15)]], dtype=torch.float64)

    def row(*values: float) -> torch.Tensor:
        return torch.tensor([values], dtype=torch.float64)

    policy, reference, x_t = row(0.1, 0.0).requires_grad_(), row(0.0, 0.0), row(0.0, 1.0)
    x_w, x_l = row(0.2, a), row(-0.1, a + 5)
    result = transition_loss(
        policy, None, reference, None, x_t, x_w, x_l, step, guidance_scale=9.0, beta=3.0, clip=None
    )
    # only the first element differs: d = [x^2 - (x - 0.1 c)^2] / (2 sigma^2) / 2 elements
    d_w, d_l = ((x**2 - (x - 0.1 * c) ** 2) / 0.3 / 2 for x in (0.2, -0.1))
    assert result.ratio_w.item() == pytest.approx(math.exp(d_w), rel=1e-13)
    assert result.ratio_l.item() == pytest.approx(math.exp(d_l), rel=1e-13)
    u = 3 * (d_w - d_l)
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(-u)), rel=1e-13)
    assert (result.clipped.item(), result.accuracy.item()) == (0.0, float(d_w > d_l))
    result.loss.backward()
    slope = -3 / (1 + math.exp(u))
    assert policy.grad is not None
    expected = slope * c / 0.15 / 2 * (0.2 - -0.1), slope * c / 0.15 / 2 * -5
    assert policy.grad[0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["shared", "stacked"])
def test_ratio_is_exactly_one_where_policy_equals_reference(path: str, dtype: torch.dtype, stacked: bool) -> None:
    batch = TransitionBatch((4, 33, 31), dtype, stacked=stacked, change=0.0)
    batch.x_w, batch.x_t = batch.x_w * 3, batch.x_t * 100  # whatever the states
    (cond, _) = batch.require_grad()
    result = transition_loss(*batch.arguments(), guidance_scale=7.3, clip=0.1)
    assert result.ratio_w.tolist() == result.ratio_l.tolist() == [1.0] * 3
    assert (result.clipped.item(), result.accuracy.item()) == (0.0, 0.5)
    assert result.loss.item() == pytest.approx(math.log(2), rel=1e-7)
    result.loss.backward()
    assert cond.grad is not None and cond.grad.isfinite().all() and cond.grad.any()


def test_shared_and_stacked_forms_agree(path: str) -> None:
    batch = TransitionBatch((4, 9, 7), pairs=3)
    shared = transition_loss(*batch.arguments(), guidance_scale=5.0)
    twice = TransitionBatch((4, 9, 7), pairs=3, stacked=True)
    twice.policy, twice.reference = ([torch.cat([x, x]) for x in g] for g in (batch.policy, batch.reference))
    twice.x_t, twice.x_w, twice.x_l = torch.cat([batch.x_t, batch.x_t]), batch.x_w, batch.x_l
    one, other = batch.require_grad(), twice.require_grad()
    stacked = transition_loss(*twice.arguments(), guidance_scale=5.0)
    assert all(torch.equal(a, b) for a, b in zip(shared, stacked, strict=True))
    transition_loss(*batch.arguments(), guidance_scale=5.0).loss.backward()
    stacked.loss.backward()
    for a, b in zip(one, other, strict=True):
        assert a.grad is not None and b.grad is not None
        assert_close(b.grad[:3] + b.grad[3:], a.grad.double(), scale=float(a.grad.abs().max()))


def test_pair_does_not_depend_on_the_batch(path: str) -> None:
    batch = TransitionBatch((4, 17, 19), torch.bfloat16, pairs=8)
    whole = transition_loss(*batch.arguments(), guidance_scale=5.0)
    for rows in (slice(0, 1), slice(3, 8), slice(7, 8)):
        tensors = [x[rows] for x in batch.arguments()]
        part = transition_loss(*tensors, guidance_scale=5.0)
        assert torch.equal(part.ratio_w, whole.ratio_w[rows]) and torch.equal(part.ratio_l, whole.ratio_l[rows])


def test_only_the_loss_back_propagates_and_only_to_the_policy(path: str) -> None:
    batch = TransitionBatch((3, 5))
    arguments = [x.clone().requires_grad_() for x in batch.arguments()]
    result = transition_loss(*arguments, guidance_scale=5.0)
    assert [x.requires_grad for x in result] == [True, False, False, False, False]
    result.loss.backward(torch.tensor(2.0))
    assert all(x.grad is not None for x in arguments[:2]) and all(x.grad is None for x in arguments[2:])
    half = [x.detach().clone().requires_grad_() for x in arguments[:2]]
    transition_loss(*half, *arguments[2:], guidance_scale=5.0).loss.backward()
    for one, other in zip(arguments, half, strict=False):
        assert torch.equal(one.grad, 2 * other.grad)


def test_guidance_splits_the_gradient(path: str) -> None:
    """d pred / d eps_cond = s and d pred / d eps_uncond = 1 - s."""
    batch = TransitionBatch((3, 5), torch.float64)
    cond, uncond = batch.require_grad()
    transition_loss(*batch.arguments(), guidance_scale=5.0).loss.backward()
    assert cond.grad is not None and uncond.grad is not None and cond.grad.any()
    torch.testing.assert_close(cond.grad * (1 - 5.0), uncond.grad * 5.0)


def test_descent_makes_the_winner_likelier(path: str) -> None:
    batch = TransitionBatch((4, 8, 8), change=0.0)
    (cond, uncond) = batch.require_grad()
    before = transition_loss(*batch.arguments(), guidance_scale=5.0)
    before.loss.backward()
    with torch.no_grad():
        for x in (cond, uncond):
            x -= 0.1 * x.grad
    after = transition_loss(*batch.arguments(), guidance_scale=5.0)
    assert after.loss < before.loss and after.accuracy == 1
    assert (after.ratio_w > 1).all() and (after.ratio_l < 1).all()


def test_memory_order_does_not_matter(path: str) -> None:
    batch = TransitionBatch((4, 9, 11))
    (cond, uncond) = batch.require_grad()
    plain = transition_loss(*batch.arguments(), guidance_scale=5.0)
    plain.loss.backward()

    def last(x: torch.Tensor) -> torch.Tensor:
        return x.detach().contiguous(memory_format=torch.channels_last)

    def apart(x: torch.Tensor) -> torch.Tensor:
        return torch.empty(6, 4, 9, 11)[1::2].copy_(x.detach())

    same = torch.Tensor.detach
    for of_predictions, of_latents in [(last, last), (last, same), (same, last), (apart, same), (same, apart)]:
        policy, reference = ([of_predictions(x) for x in g] for g in (batch.policy, batch.reference))
        latents = [of_latents(x) for x in (batch.x_t, batch.x_w, batch.x_l)]
        leaves = [x.requires_grad_() for x in policy]
        result = transition_loss(*policy, *reference, *latents, batch.arguments()[7], guidance_scale=5.0)
        torch.testing.assert_close(tuple(result), tuple(plain), rtol=2e-6, atol=1e-7)
        result.loss.backward()
        for leaf, grad in zip(leaves, (cond.grad, uncond.grad), strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, grad, rtol=2e-6, atol=1e-8)
            assert leaf.grad.is_contiguous(memory_format=torch.channels_last) == (of_predictions is last)


def test_layouts_that_differ_are_refused_or_handled(path: str) -> None:
    batch = TransitionBatch((4, 9, 11))
    expected = transition_loss(*batch.arguments(), guidance_scale=5.0)
    batch.reference[0] = batch.reference[0].contiguous(memory_format=torch.channels_last)
    if path == "cpu":
        assert torch.equal(transition_loss(*batch.arguments(), guidance_scale=5.0).loss, expected.loss)
    else:
        with pytest.raises(ValueError, match=r"ref_eps_cond.*contiguous\(\)") as error:
            transition_loss(*batch.arguments(), guidance_scale=5.0)
        assert "\n" not in str(error.value)


def test_mixed_dtypes(path: str) -> None:
    batch = TransitionBatch((2, 40))
    batch.policy = [x.bfloat16() for x in batch.policy]
    batch.reference, batch.x_w = [x.half() for x in batch.reference], batch.x_w.double()
    compare(batch, clip=None)


def test_coefficients_may_lie_anywhere(path: str) -> None:
    """One row for all, columns that are not dense: the same bits. In fp64 they are rounded to the same numbers."""
    batch, step = TransitionBatch((3, 7, 5)), same_step(3)
    tensors = batch.arguments()[:7]
    packed = transition_loss(*tensors, step, guidance_scale=5.0)
    for other in (step[:1].expand(3, 5), step.T.contiguous().T):
        found = transition_loss(*tensors, other, guidance_scale=5.0)
        assert all(torch.equal(a, b) for a, b in zip(found, packed, strict=True))
    # a kernel of its own, whose compiler may fuse other multiplications with additions
    exact = transition_loss(*tensors, same_step(3, torch.float64), guidance_scale=5.0)
    torch.testing.assert_close(tuple(exact), tuple(packed), rtol=2e-6, atol=2e-6)


def test_extreme_ratios(path: str) -> None:
    """exp of the log-ratio overflows and vanishes; clipped, the loss stays that of the bounds."""
    batch = TransitionBatch((50,), pairs=2)
    direction = torch.ones(2, 50)
    batch.policy, batch.reference = [50 * direction, 50 * direction], [-50 * direction, -50 * direction]
    batch.x_t = torch.zeros(2, 50)
    mean, _, _ = ddim_step(batch.x_t, batch.policy[0], ALPHAS_CUMPROD, batch.t, batch.t_prev, 1.0)
    batch.x_w, batch.x_l = mean.float(), -mean.float()
    (cond, _) = batch.require_grad()
    result = transition_loss(*batch.arguments(), guidance_scale=5.0, beta=10.0, clip=0.1)
    assert result.ratio_w.isinf().all() and result.ratio_l.eq(0).all()
    assert (result.clipped.item(), result.accuracy.item()) == (1.0, 1.0)
    assert result.loss.item() == pytest.approx(math.log1p((0.9 / 1.1) ** 10), rel=1e-6)
    result.loss.backward()
    assert cond.grad is not None and not cond.grad.any()
    unbounded = transition_loss(*batch.arguments(), guidance_scale=5.0, clip=None)
    assert unbounded.loss.item() == 0.0 and unbounded.clipped.item() == 0.0


def test_nan_stays_in_its_pair(path: str) -> None:
    batch = TransitionBatch((2, 30), change=0.01)
    batch.x_w[1, 0, 3] = torch.nan
    leaves = batch.require_grad()
    result = transition_loss(*batch.arguments(), guidance_scale=5.0)
    assert result.loss.isnan() and result.ratio_w.isnan().tolist() == [False, True, False]
    assert not result.ratio_l.isnan().any()
    result.loss.backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.flatten(1).isnan().any(1).tolist() == [False, True, False]


def test_nan_in_a_coefficient_stays_in_its_pair(path: str) -> None:
    batch, step = TransitionBatch((40,), pairs=5), same_step(5)
    step[0, 2] = step[2, 3] = step[3, 4] = step[4, 0] = step[4, 1] = torch.nan  # the last pair's u and w do not matter
    _, ratio_w, ratio_l, *_ = transition_loss(*batch.arguments()[:7], step, guidance_scale=5.0)
    for ratio in (ratio_w, ratio_l):
        assert ratio.isnan().tolist() == [True, False, True, True, False]


def test_many_chunks_of_several_blocks(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_MAX_CHUNKS", 4)
    compare(TransitionBatch((9 * 1024 + 5,), pairs=2), clip=None)


def test_more_pairs_than_a_tile_of_the_second_stage(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launches._PAIR_TILES, 16, 4)
    compare(TransitionBatch((2, 9), pairs=11))


def test_gradcheck() -> None:
    for stacked in (False, True):
        batch = TransitionBatch((2, 4), torch.float64, stacked=stacked)
        rest = batch.arguments()[2:]

        def loss(*policy: torch.Tensor, rest: tuple = rest) -> torch.Tensor:
            return transition_loss(*policy, *rest, guidance_scale=3.0, clip=None).loss

        assert torch.autograd.gradcheck(loss, batch.require_grad())


def test_paths_agree() -> None:
    batch = TransitionBatch((4, 32, 32))
    on_cpu = transition_loss(*batch.arguments(), guidance_scale=5.0)
    with dispatch.triton_on_cpu():
        interpreted = transition_loss(*batch.arguments(), guidance_scale=5.0)
    torch.testing.assert_close(tuple(on_cpu), tuple(interpreted), rtol=1e-6, atol=1e-7)


X = torch.zeros(2, 3)
NAMES = ("eps_cond", "eps_uncond", "ref_eps_cond", "ref_eps_uncond", "x_t", "x_w", "x_l")
STEP = torch.ones(2, 5)
GOOD = dict.fromkeys(NAMES, X) | {"coefficients": STEP, "guidance_scale": 5.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict.fromkeys(NAMES, X[:0]), "x_w is empty"),
        ({"x_w": X[0], "x_l": X[0]}, r"\(N, \.\.\.\)"),
        ({"x_l": X[:1]}, "x_l has shape"),
        ({"x_t": torch.zeros(6, 3)}, "twice its rows"),
        ({"x_t": torch.zeros(4, 3)}, "eps_cond has shape"),
        ({"ref_eps_cond": X[:, :2]}, "ref_eps_cond has shape"),
        ({"eps_uncond": None}, "both be None"),
        ({"ref_eps_uncond": X.int()}, "floating"),
        ({"x_l": X.to("meta")}, "on meta"),
        ({"coefficients": STEP.bfloat16()}, "fp32 or fp64"),
        ({"coefficients": STEP[:1]}, r"shape \(2, 5\) in transition_loss\(eps_cond, "),
        ({"coefficients": STEP.to("meta")}, "on meta"),
        ({"coefficients": STEP * torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])}, "no likelihood"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"clip": -0.1}, "clip must be positive"),
        ({"guidance_scale": math.nan}, "finite"),
    ],
)
def test_errors_are_one_line(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        transition_loss(**GOOD | change)
    assert "\n" not in str(error.value)
