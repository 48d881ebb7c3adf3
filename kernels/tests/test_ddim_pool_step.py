from __future__ import annotations

import math

import pytest
import torch
from reference import ddim_pool_step as oracle
from tolerances import assert_close
from transitions import ALPHAS_CUMPROD, DTYPES, keys_for, pool_batch

from fastpref_kernels import ddim_pool_step, keyed_noise, predict_x0
from fastpref_kernels.common import dispatch
from fastpref_kernels.common.ddim import PER_ROW, Step
from fastpref_kernels.ddim_pool_step.triton import launch_forward

SHAPES = [(1,), (3, 7, 5), (2, 24, 25)]
T, T_PREV = torch.tensor([951, 1, 0]), torch.tensor([901, 0, -1])


def expected(
    x_t: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor | None,
    keys: torch.Tensor,
    guidance_scale: float,
    eta: float,
    t: torch.Tensor = T,
    t_prev: torch.Tensor = T_PREV,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    pred = oracle.guided(cond, uncond, guidance_scale)
    mean, sigma, x0 = oracle.ddim_step(x_t, pred, ALPHAS_CUMPROD, t, t_prev, eta, **options)
    z = keyed_noise(keys.flatten(), x_t.shape[1:], torch.float32).double().view(*keys.shape, *x_t.shape[1:])
    return mean.unsqueeze(1) + sigma.unsqueeze(1) * z, x0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("with_guidance", "eta"), [(True, 1.0), (False, 0.3)])
def test_matches_oracle(path: str, shape: tuple, dtype: torch.dtype, with_guidance: bool, eta: float) -> None:
    leaves = [x.requires_grad_() for x in pool_batch(shape, dtype)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    keys = keys_for(3, 2)
    second = (leaves[2], exact[2]) if with_guidance else (None, None)
    pool = ddim_pool_step(*leaves[:2], second[0], keys, ALPHAS_CUMPROD, T, T_PREV, guidance_scale=5.0, eta=eta)
    candidates, x0 = expected(*exact[:2], second[1], keys, 5.0, eta)
    assert pool.candidates.dtype == pool.x0.dtype == dtype
    assert_close(pool.candidates, candidates.detach(), scale=10)
    assert_close(pool.x0, x0.detach(), scale=float(x0.detach().abs().max()))
    weights = torch.randn(pool.candidates.shape, dtype=torch.float64), torch.randn(x0.shape, dtype=torch.float64)
    weights = tuple(w.to(dtype).double() for w in weights)
    torch.autograd.backward(pool, [w.to(dtype) for w in weights])
    torch.autograd.backward((candidates, x0), weights)
    for leaf, reference in list(zip(leaves, exact, strict=True))[: 3 if with_guidance else 2]:
        assert leaf.grad is not None and reference.grad is not None and leaf.grad.dtype == dtype
        assert_close(leaf.grad, reference.grad, scale=float(reference.grad.abs().max()))


def test_worked_by_hand(path: str) -> None:
    """abar 0.25 and 0.5: sigma^2 = (0.5/0.75)(1 - 0.5) = 1/3, x0 = 2 x - sqrt(3) eps, eps = 1 + 2 (2 - 1) = 3."""
    table = torch.tensor([0.5, 0.25], dtype=torch.float64)
    x_t, cond, uncond = (torch.full((1, 2), v, dtype=torch.float64) for v in (1.0, 2.0, 1.0))
    keys = torch.tensor([[7, 8]])
    pool = ddim_pool_step(x_t, cond, uncond, keys, table, 1, 0, guidance_scale=2.0, eta=1.0, k=2)
    x0 = 2 - 3 * math.sqrt(3)
    assert pool.x0.tolist() == [pytest.approx([x0, x0], abs=1e-14)]
    mean = math.sqrt(0.5) * x0 + math.sqrt(1 - 0.5 - 1 / 3) * 3
    z = (pool.candidates[0] - mean) * math.sqrt(3)
    torch.testing.assert_close(z, keyed_noise(keys[0], (2,), torch.float64), rtol=0, atol=1e-13)


def test_noise_is_that_of_the_keys(path: str) -> None:
    """From x_t = eps = 0 a candidate is sigma * keyed_noise(key), to one rounding."""
    zero, keys = torch.zeros(2, 4, 9, 11), keys_for(2, 3)
    pool = ddim_pool_step(zero, zero, None, keys, ALPHAS_CUMPROD, 501, 451, guidance_scale=1.0)
    noise = keyed_noise(keys.flatten(), (4, 9, 11), torch.float32).view(2, 3, 4, 9, 11)
    sigma = (pool.candidates / noise)[noise.abs() > 0.1]
    assert (sigma / sigma[0] - 1).abs().max() < 2.0**-22
    abar, abar_prev = ALPHAS_CUMPROD[501].double(), ALPHAS_CUMPROD[451].double()
    assert sigma[0].item() == pytest.approx(
        ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt().item(), rel=1e-6
    )


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("final", [None, 1.0])
def test_equals_diffusers(path: str, eta: float, final: float | None) -> None:
    """DDIMScheduler.step over a whole schedule, its noise given."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=final is not None,
        steps_offset=1,
    )
    scheduler.set_timesteps(5)
    x, keys = torch.randn(2, 4, 8, 8), keys_for(2, 1)
    noise = keyed_noise(keys.flatten(), (4, 8, 8), torch.float32)
    for t in scheduler.timesteps.tolist():
        eps = torch.randn_like(x)
        theirs = scheduler.step(eps, t, x, eta=eta, variance_noise=noise if eta else None)
        options = {"guidance_scale": 1.0, "eta": eta, "final_alpha_cumprod": final}
        pool = ddim_pool_step(x, eps, None, keys, scheduler.alphas_cumprod, t, t - 200, **options)
        torch.testing.assert_close(pool.candidates[:, 0], theirs.prev_sample, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(pool.x0, theirs.pred_original_sample, rtol=2e-6, atol=2e-6)
        x = theirs.prev_sample


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_v_prediction_matches_oracle(path: str, dtype: torch.dtype) -> None:
    x_t, cond, uncond = pool_batch((4, 9, 7), dtype)
    keys = keys_for(3, 1)
    options = {"prediction_type": "v_prediction"}
    pool = ddim_pool_step(x_t, cond, uncond, keys, ALPHAS_CUMPROD, T, T_PREV, guidance_scale=3.0, eta=0.7, **options)
    candidates, x0 = expected(x_t, cond, uncond, keys, 3.0, 0.7, **options)
    assert_close(pool.candidates, candidates, scale=10)
    assert_close(pool.x0, x0, scale=10)
    # the velocity that belongs to eps gives the same step as eps
    x, eps = x_t.double(), cond.double()
    abar = ALPHAS_CUMPROD.double()[501]
    v = (eps - (1 - abar).sqrt() * x) / abar.sqrt()
    by_eps = ddim_pool_step(x, eps, None, keys, ALPHAS_CUMPROD, 501, 451, guidance_scale=1.0)
    by_v = ddim_pool_step(x, v, None, keys, ALPHAS_CUMPROD, 501, 451, guidance_scale=1.0, **options)
    assert_close(by_v.candidates, by_eps.candidates.double(), scale=10)


def test_velocity_at_zero_signal(path: str) -> None:
    """abar_t = 0, where eps says nothing: x0 = -v and everything stays finite."""
    table = torch.tensor([0.5, 0.0])
    x_t, v = torch.randn(2, 2, 6)
    options = {"guidance_scale": 1.0, "prediction_type": "v_prediction"}
    pool = ddim_pool_step(x_t, v, None, keys_for(2, 1), table, 1, 0, eta=0.0, **options)
    assert torch.equal(pool.x0, -v)
    # eta = 0: sqrt(0.5) * x0 + sqrt(0.5) * eps, where eps = x_t
    torch.testing.assert_close(pool.candidates[:, 0], math.sqrt(0.5) * (x_t - v))


def test_last_step_without_noise_is_x0(path: str) -> None:
    x_t, cond, uncond = pool_batch((3, 7, 5), torch.float32)
    options = {"guidance_scale": 5.0, "final_alpha_cumprod": 1.0}
    pool = ddim_pool_step(x_t, cond, uncond, keys_for(3, 2), ALPHAS_CUMPROD, 1, -49, **options)
    torch.testing.assert_close(pool.candidates, pool.x0.unsqueeze(1).expand_as(pool.candidates), rtol=2e-6, atol=2e-6)


def test_eta_zero_gives_equal_candidates(path: str) -> None:
    pool = ddim_pool_step(
        *pool_batch((4, 5), torch.float32), keys_for(3, 3), ALPHAS_CUMPROD, T, T_PREV, guidance_scale=2.0, eta=0
    )
    assert torch.equal(pool.candidates, pool.candidates[:, :1].expand_as(pool.candidates))


def test_numbers_and_rows_of_timesteps_agree(path: str) -> None:
    inputs, keys = pool_batch((3, 7, 5), torch.float32), keys_for(3, 2)
    by_number = ddim_pool_step(*inputs, keys, ALPHAS_CUMPROD, 501, 451, guidance_scale=5.0)
    for t, t_prev in [
        (torch.tensor(501), torch.tensor(451)),
        (torch.full((3,), 501), 451),
        (501, torch.full((6,), 451)[::2]),
    ]:
        by_row = ddim_pool_step(*inputs, keys, ALPHAS_CUMPROD, t, t_prev, guidance_scale=5.0)
        assert torch.equal(by_row.candidates, by_number.candidates) and torch.equal(by_row.x0, by_number.x0)
    exact_table = ddim_pool_step(*inputs, keys, ALPHAS_CUMPROD.double(), 501, 451, guidance_scale=5.0)
    torch.testing.assert_close(exact_table, by_number, rtol=2e-6, atol=2e-6)


def test_predict_x0_is_the_step_without_candidates(path: str) -> None:
    inputs = pool_batch((4, 9, 7), torch.bfloat16)
    x0 = predict_x0(*inputs, ALPHAS_CUMPROD, T, guidance_scale=5.0)
    pool = ddim_pool_step(*inputs, keys_for(3, 0), ALPHAS_CUMPROD, T, T_PREV, guidance_scale=5.0)
    assert torch.equal(x0, pool.x0) and pool.candidates.shape == (3, 0, 4, 9, 7)
    leaf = inputs[1].requires_grad_()
    predict_x0(inputs[0], leaf, None, ALPHAS_CUMPROD, 501, guidance_scale=1.0).sum().backward()
    abar = ALPHAS_CUMPROD[501].double()
    assert leaf.grad is not None
    assert_close(leaf.grad, (-((1 - abar) / abar).sqrt()).expand_as(leaf))


def test_row_does_not_depend_on_the_batch(path: str) -> None:
    count = 40 if path == "cpu" else 5
    x_t, cond, uncond = pool_batch((4, 9, 31), torch.float32, count)
    t, keys = torch.arange(100, 100 + count), keys_for(count, 2)
    whole = ddim_pool_step(x_t, cond, uncond, keys, ALPHAS_CUMPROD, t, t - 50, guidance_scale=5.0)
    for rows in (slice(0, 1), slice(1, count), slice(count - 2, count - 1)):
        part = ddim_pool_step(
            x_t[rows], cond[rows], uncond[rows], keys[rows], ALPHAS_CUMPROD, t[rows], t[rows] - 50, guidance_scale=5.0
        )
        assert torch.equal(part.candidates, whole.candidates[rows]) and torch.equal(part.x0, whole.x0[rows])
    one = ddim_pool_step(x_t, cond, uncond, keys[:, 1:], ALPHAS_CUMPROD, t, t - 50, guidance_scale=5.0)
    assert torch.equal(one.candidates[:, 0], whole.candidates[:, 1])


def test_memory_order_does_not_matter(path: str) -> None:
    inputs, keys = pool_batch((4, 9, 11), torch.float32), keys_for(3, 2)
    plain = ddim_pool_step(*inputs, keys, ALPHAS_CUMPROD, T, T_PREV, guidance_scale=5.0)
    last = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    apart = [torch.empty(6, 4, 9, 11)[::2].copy_(x) for x in inputs]
    for x_t, cond, uncond in [last, (inputs[0], *last[1:]), (last[0], *inputs[1:]), apart, (last[0], *apart[1:])]:
        leaf = cond.detach().requires_grad_()
        pool = ddim_pool_step(x_t, leaf, uncond, keys, ALPHAS_CUMPROD, T, T_PREV, guidance_scale=5.0)
        assert torch.equal(pool.candidates, plain.candidates) and torch.equal(pool.x0, plain.x0)
        assert pool.candidates.is_contiguous() and pool.x0.is_contiguous()
        (pool.x0.sum() + pool.candidates.sum()).backward()
        assert leaf.grad is not None and torch.equal(leaf.grad, leaf.grad[:, :1, :1, :1].expand_as(leaf.grad))
    turned = inputs[1].transpose(2, 3).contiguous().transpose(2, 3)
    if path == "cpu":
        pool = ddim_pool_step(inputs[0], turned, inputs[2], keys, ALPHAS_CUMPROD, T, T_PREV, guidance_scale=5.0)
        assert torch.equal(pool.candidates, plain.candidates)
    else:
        with pytest.raises(ValueError, match=r"eps_cond.*contiguous\(\)") as error:
            ddim_pool_step(inputs[0], turned, inputs[2], keys, ALPHAS_CUMPROD, T, T_PREV, guidance_scale=5.0)
        assert "\n" not in str(error.value)


def test_mixed_dtypes(path: str) -> None:
    x_t, cond, uncond = torch.randn(3, 50), torch.randn(3, 50).bfloat16(), torch.randn(3, 50).half()
    keys = keys_for(3, 1)
    pool = ddim_pool_step(x_t, cond, uncond, keys, ALPHAS_CUMPROD, T, T_PREV, guidance_scale=5.0)
    candidates, x0 = expected(x_t, cond, uncond, keys, 5.0, 1.0)
    assert_close(pool.candidates, candidates, scale=10)
    assert_close(pool.x0, x0, scale=float(x0.abs().max()))


def test_extreme_and_nan_elements(path: str) -> None:
    x_t, cond, uncond = pool_batch((2, 30), torch.float32)
    x_t[0], cond[1, 0, 4] = x_t[0] * 1e4, torch.nan
    keys = keys_for(3, 2)
    pool = ddim_pool_step(x_t, cond, uncond, keys, ALPHAS_CUMPROD, T, T_PREV, guidance_scale=7.5)
    candidates, x0 = expected(x_t, cond, uncond, keys, 7.5, 1.0)
    assert torch.equal(pool.candidates.isnan(), candidates.isnan()) and torch.equal(pool.x0.isnan(), x0.isnan())
    assert pool.x0.isnan().sum() == 1 and pool.candidates.isnan().sum() == 2
    assert_close(pool.candidates.nan_to_num(), candidates.nan_to_num(), scale=1e4)
    assert_close(pool.x0.nan_to_num(), x0.nan_to_num(), scale=1e5)


def test_kernel_gives_nan_for_timesteps_out_of_range() -> None:
    """What a GPU shows, where a look at the timesteps would wait for it."""
    x_t, cond, uncond = pool_batch((40,), torch.float32, 5)
    t, t_prev = torch.tensor([-1, 1000, 50, 50, 50]), torch.tensor([-2, 999, 50, 51, 49])
    step = Step(t, t_prev, PER_ROW, 0, 5.0, 1.0, 1.0, False)
    with dispatch.triton_on_cpu():
        candidates, x0 = launch_forward(x_t, cond, uncond, keys_for(5, 1), ALPHAS_CUMPROD, step)
    assert candidates[:4].isnan().all() and x0[:4].isnan().all()
    assert candidates[4].isfinite().all() and x0[4].isfinite().all()


def test_paths_agree() -> None:
    inputs, keys = pool_batch((4, 32, 32), torch.float32, 2), keys_for(2, 2)
    on_cpu = ddim_pool_step(*inputs, keys, ALPHAS_CUMPROD, 501, 451, guidance_scale=5.0)
    with dispatch.triton_on_cpu():
        interpreted = ddim_pool_step(*inputs, keys, ALPHAS_CUMPROD, 501, 451, guidance_scale=5.0)
    for one, other in zip(on_cpu, interpreted, strict=True):
        assert (one - other).abs().max() < 2e-6 * other.abs().max()


def test_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in pool_batch((2, 5), torch.float64)]
    keys = keys_for(3, 2)

    def step(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ddim_pool_step(*inputs, keys, ALPHAS_CUMPROD, T, T_PREV, guidance_scale=3.0, eta=0.5)

    assert torch.autograd.gradcheck(step, leaves)


X, K = torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int64)
GOOD = {
    "x_t": X,
    "eps_cond": X,
    "eps_uncond": X,
    "keys": K,
    "alphas_cumprod": ALPHAS_CUMPROD,
    "t": 51,
    "t_prev": 1,
    "guidance_scale": 5.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_t": X[:0], "eps_cond": X[:0], "eps_uncond": X[:0], "keys": K[:0]}, "empty"),
        ({"x_t": X[0], "eps_cond": X[0], "eps_uncond": None}, r"\(N, \.\.\.\)"),
        ({"eps_cond": X[:, :2]}, "eps_cond has shape"),
        ({"eps_uncond": X[:1]}, "eps_uncond has shape"),
        ({"eps_cond": X.int()}, "floating"),
        ({"eps_uncond": X.to("meta")}, "on meta"),
        ({"keys": K[0]}, r"\(2, K\)"),
        ({"keys": K.int()}, "int64"),
        ({"k": 3}, "k is 3"),
        ({"alphas_cumprod": ALPHAS_CUMPROD.half()}, "fp32 or fp64"),
        ({"alphas_cumprod": ALPHAS_CUMPROD[:0]}, "empty"),
        ({"t": 1000}, r"\[0, 1000\)"),
        ({"t": -1, "t_prev": -2}, r"\[0, 1000\)"),
        ({"t_prev": 51}, "t_prev < t"),
        ({"t": torch.tensor([51, 1000])}, r"\[0, 1000\)"),
        ({"t_prev": torch.tensor([1, 51])}, "t_prev < t"),
        ({"t": torch.tensor([51])}, r"shape \(2,\)"),
        ({"t": torch.tensor([51, 51]).int()}, "int64"),
        ({"eta": 1.1}, r"eta must be in \[0, 1\]"),
        ({"eta": math.nan}, "eta"),
        ({"guidance_scale": math.inf}, "finite"),
        ({"final_alpha_cumprod": 0.0}, r"\(0, 1\]"),
        ({"prediction_type": "sample"}, "epsilon, v_prediction"),
    ],
)
def test_errors_are_one_line(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ddim_pool_step(**GOOD | change)
    assert "\n" not in str(error.value)
