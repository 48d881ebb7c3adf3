from __future__ import annotations

import math

import pytest
import torch
from reference import ddim_pool_step as oracle
from tolerances import assert_close
from transitions import ALPHAS_CUMPROD, DTYPES, keys_for, pool_batch, same_step, steps

from fastpref_kernels import ddim_pool_step, keyed_noise, predict_x0
from fastpref_kernels.common import dispatch

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
    pool = ddim_pool_step(*leaves[:2], second[0], keys, steps(T, T_PREV, dtype, eta=eta), guidance_scale=5.0)
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
    """x0 = 2 x - eps and mean = 1.25 x + 0.5 eps, with eps = 1 + 2 (2 - 1) = 3."""
    step = torch.tensor([[2.0, -1.0, 0.25, 0.5, 0.75]], dtype=torch.float64)
    x_t, cond, uncond = (torch.full((1, 2), v, dtype=torch.float64) for v in (4.0, 2.0, 1.0))
    keys = torch.tensor([[7, 8]])
    pool = ddim_pool_step(x_t, cond, uncond, keys, step, guidance_scale=2.0, k=2)
    assert pool.x0.tolist() == [[5.0, 5.0]]
    z = (pool.candidates[0] - 6.5) / 0.75
    torch.testing.assert_close(z, keyed_noise(keys[0], (2,), torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_process_that_is_linear(path: str, dtype: torch.dtype) -> None:
    """Coefficients that no DDIM step has, among them flow's x0 = x_t - sigma v with its Euler step."""
    x_t, cond, uncond = pool_batch((4, 9, 7), dtype)
    step = torch.tensor([[1.0, -0.75, 0.0, -0.125, 0.0], [0.5, 3.0, -0.25, 2.0, 1.5], [0.0, 0.0, -1.0, 0.0, 2.0]])
    keys = keys_for(3, 2)
    pool = ddim_pool_step(x_t, cond, uncond, keys, step, guidance_scale=3.0)
    u, w, drift, c, std = step.double().view(3, 5, 1, 1, 1).unbind(1)
    pred, z = oracle.guided(cond, uncond, 3.0), keyed_noise(keys.flatten(), (4, 9, 7), torch.float32)
    mean = (1 + drift) * x_t.double() + c * pred
    assert_close(pool.x0, u * x_t.double() + w * pred, scale=10)
    assert_close(pool.candidates, mean.unsqueeze(1) + std.unsqueeze(1) * z.double().view(3, 2, 4, 9, 7), scale=10)


def test_noise_is_that_of_the_keys(path: str) -> None:
    """From x_t = eps = 0 a candidate is sigma * keyed_noise(key), to one rounding."""
    zero, keys = torch.zeros(2, 4, 9, 11), keys_for(2, 3)
    pool = ddim_pool_step(zero, zero, None, keys, same_step(2), guidance_scale=1.0)
    noise = keyed_noise(keys.flatten(), (4, 9, 11), torch.float32).view(2, 3, 4, 9, 11)
    sigma = (pool.candidates / noise)[noise.abs() > 0.1]
    assert (sigma / sigma[0] - 1).abs().max() < 2.0**-22
    abar, abar_prev = ALPHAS_CUMPROD[501].double(), ALPHAS_CUMPROD[451].double()
    assert sigma[0].item() == pytest.approx(
        ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt().item(), rel=1e-6
    )


def test_without_noise_candidates_are_equal(path: str) -> None:
    pool = ddim_pool_step(
        *pool_batch((4, 5), torch.float32), keys_for(3, 3), steps(T, T_PREV, eta=0.0), guidance_scale=2.0
    )
    assert torch.equal(pool.candidates, pool.candidates[:, :1].expand_as(pool.candidates))


def test_coefficients_may_lie_anywhere(path: str) -> None:
    """One row for all, columns that are not dense: the same bits. In fp64 they are rounded to the same numbers."""
    inputs, keys, step = pool_batch((3, 7, 5), torch.float32), keys_for(3, 2), same_step(3)
    packed = ddim_pool_step(*inputs, keys, step, guidance_scale=5.0)
    for other in (
        step[:1].expand(3, 5),
        step.T.contiguous().T,
        torch.cat([step, step], dim=1)[:, 5:],
    ):
        pool = ddim_pool_step(*inputs, keys, other, guidance_scale=5.0)
        assert torch.equal(pool.candidates, packed.candidates) and torch.equal(pool.x0, packed.x0)
    # a kernel of its own, whose compiler may fuse other multiplications with additions
    exact = ddim_pool_step(*inputs, keys, same_step(3, torch.float64), guidance_scale=5.0)
    torch.testing.assert_close(exact, packed, rtol=2e-6, atol=2e-6)


def test_predict_x0_is_the_step_without_candidates(path: str) -> None:
    inputs = pool_batch((4, 9, 7), torch.bfloat16)
    x0 = predict_x0(*inputs, steps(T, T_PREV), guidance_scale=5.0)
    pool = ddim_pool_step(*inputs, keys_for(3, 0), steps(T, T_PREV), guidance_scale=5.0)
    assert torch.equal(x0, pool.x0) and pool.candidates.shape == (3, 0, 4, 9, 7)
    leaf = inputs[1].requires_grad_()
    predict_x0(inputs[0], leaf, None, same_step(3), guidance_scale=1.0).sum().backward()
    abar = ALPHAS_CUMPROD[501].double()
    assert leaf.grad is not None
    assert_close(leaf.grad, (-((1 - abar) / abar).sqrt()).expand_as(leaf))


def test_row_does_not_depend_on_the_batch(path: str) -> None:
    count = 40 if path == "cpu" else 5
    x_t, cond, uncond = pool_batch((4, 9, 31), torch.float32, count)
    t, keys = torch.arange(100, 100 + count), keys_for(count, 2)
    whole = ddim_pool_step(x_t, cond, uncond, keys, steps(t, t - 50), guidance_scale=5.0)
    for rows in (slice(0, 1), slice(1, count), slice(count - 2, count - 1)):
        part = ddim_pool_step(
            x_t[rows], cond[rows], uncond[rows], keys[rows], steps(t, t - 50)[rows], guidance_scale=5.0
        )
        assert torch.equal(part.candidates, whole.candidates[rows]) and torch.equal(part.x0, whole.x0[rows])
    one = ddim_pool_step(x_t, cond, uncond, keys[:, 1:], steps(t, t - 50), guidance_scale=5.0)
    assert torch.equal(one.candidates[:, 0], whole.candidates[:, 1])


def test_memory_order_does_not_matter(path: str) -> None:
    inputs, keys = pool_batch((4, 9, 11), torch.float32), keys_for(3, 2)
    plain = ddim_pool_step(*inputs, keys, steps(T, T_PREV), guidance_scale=5.0)
    last = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    apart = [torch.empty(6, 4, 9, 11)[::2].copy_(x) for x in inputs]
    for x_t, cond, uncond in [last, (inputs[0], *last[1:]), (last[0], *inputs[1:]), apart, (last[0], *apart[1:])]:
        leaf = cond.detach().requires_grad_()
        pool = ddim_pool_step(x_t, leaf, uncond, keys, steps(T, T_PREV), guidance_scale=5.0)
        assert torch.equal(pool.candidates, plain.candidates) and torch.equal(pool.x0, plain.x0)
        assert pool.candidates.is_contiguous() and pool.x0.is_contiguous()
        (pool.x0.sum() + pool.candidates.sum()).backward()
        assert leaf.grad is not None and torch.equal(leaf.grad, leaf.grad[:, :1, :1, :1].expand_as(leaf.grad))
    turned = inputs[1].transpose(2, 3).contiguous().transpose(2, 3)
    if path == "cpu":
        pool = ddim_pool_step(inputs[0], turned, inputs[2], keys, steps(T, T_PREV), guidance_scale=5.0)
        assert torch.equal(pool.candidates, plain.candidates)
    else:
        with pytest.raises(ValueError, match=r"eps_cond.*contiguous\(\)") as error:
            ddim_pool_step(inputs[0], turned, inputs[2], keys, steps(T, T_PREV), guidance_scale=5.0)
        assert "\n" not in str(error.value)


def test_mixed_dtypes(path: str) -> None:
    x_t, cond, uncond = torch.randn(3, 50), torch.randn(3, 50).bfloat16(), torch.randn(3, 50).half()
    keys = keys_for(3, 1)
    pool = ddim_pool_step(x_t, cond, uncond, keys, steps(T, T_PREV), guidance_scale=5.0)
    candidates, x0 = expected(x_t, cond, uncond, keys, 5.0, 1.0)
    assert_close(pool.candidates, candidates, scale=10)
    assert_close(pool.x0, x0, scale=float(x0.abs().max()))


def test_extreme_and_nan_elements(path: str) -> None:
    x_t, cond, uncond = pool_batch((2, 30), torch.float32)
    x_t[0], cond[1, 0, 4] = x_t[0] * 1e4, torch.nan
    keys = keys_for(3, 2)
    pool = ddim_pool_step(x_t, cond, uncond, keys, steps(T, T_PREV), guidance_scale=7.5)
    candidates, x0 = expected(x_t, cond, uncond, keys, 7.5, 1.0)
    assert torch.equal(pool.candidates.isnan(), candidates.isnan()) and torch.equal(pool.x0.isnan(), x0.isnan())
    assert pool.x0.isnan().sum() == 1 and pool.candidates.isnan().sum() == 2
    assert_close(pool.candidates.nan_to_num(), candidates.nan_to_num(), scale=1e4)
    assert_close(pool.x0.nan_to_num(), x0.nan_to_num(), scale=1e5)


@pytest.mark.parametrize("column", range(5))
def test_nan_in_a_coefficient_stays_in_its_row(path: str, column: int) -> None:
    """u and w are the prediction's, the others the candidates'."""
    inputs, step = pool_batch((40,), torch.float32), same_step(3)
    step[1, column] = torch.nan
    pool = ddim_pool_step(*inputs, keys_for(3, 1), step, guidance_scale=5.0)
    for x, columns in ((pool.x0, (0, 1)), (pool.candidates[:, 0], (2, 3, 4))):
        expected = torch.zeros(3, 40, dtype=torch.bool)
        expected[1] = column in columns
        assert torch.equal(x.isnan(), expected)


def test_paths_agree() -> None:
    inputs, keys = pool_batch((4, 32, 32), torch.float32, 2), keys_for(2, 2)
    on_cpu = ddim_pool_step(*inputs, keys, same_step(2), guidance_scale=5.0)
    with dispatch.triton_on_cpu():
        interpreted = ddim_pool_step(*inputs, keys, same_step(2), guidance_scale=5.0)
    for one, other in zip(on_cpu, interpreted, strict=True):
        assert (one - other).abs().max() < 2e-6 * other.abs().max()


def test_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in pool_batch((2, 5), torch.float64)]
    keys = keys_for(3, 2)

    def step(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ddim_pool_step(*inputs, keys, steps(T, T_PREV, torch.float64, eta=0.5), guidance_scale=3.0)

    assert torch.autograd.gradcheck(step, leaves)


X, K, STEP = torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 5)
GOOD = {
    "x_t": X,
    "eps_cond": X,
    "eps_uncond": X,
    "keys": K,
    "coefficients": STEP,
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
        ({"coefficients": STEP.half()}, "fp32 or fp64"),
        ({"coefficients": STEP[:1]}, r"shape \(2, 5\) in ddim_pool_step\(x_t, "),
        ({"coefficients": STEP[:, :4]}, r"shape \(2, 5\)"),
        ({"coefficients": STEP.to("meta")}, "on meta"),
        ({"guidance_scale": math.inf}, "finite"),
    ],
)
def test_errors_are_one_line(change: dict, message: str) -> None:
    for op in (ddim_pool_step, predict_x0):
        given = GOOD | change
        if op is predict_x0:
            if change.keys() & {"k", "keys"}:
                continue
            given.pop("keys")
            message = message.replace("ddim_pool_step", "predict_x0")
        with pytest.raises(ValueError, match=message) as error:
            op(**given)
        assert "\n" not in str(error.value)
