"""What the ops on DDIM transitions read and write: bytes per element, and addresses past 2^31 elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreter import only, traffic
from reference import ddim_pool_step as pool_oracle
from reference import keyed_noise as noise_oracle
from reference import transition_loss as oracle
from tolerances import assert_close
from transitions import ALPHAS_CUMPROD, TransitionBatch, keys_for, pool_batch, same_step

from fastpref_kernels import ddim_pool_step, transition_loss
from fastpref_kernels.common import dispatch
from fastpref_kernels.ddim_pool_step import triton as pool_kernels
from fastpref_kernels.transition_loss import triton as loss_launch


@pytest.mark.parametrize(("with_guidance", "k"), [(True, 4), (False, 1), (True, 0)])
def test_pool_bytes_per_element(with_guidance: bool, k: int) -> None:
    """As the docstring of the module says, in one launch each way."""
    x_t, cond, uncond = pool_batch((2, 512), torch.bfloat16)
    second, less = (uncond, 0) if with_guidance else (None, 2)
    leaves = [x.requires_grad_() for x in (x_t, cond, second) if x is not None]
    with dispatch.triton_on_cpu(), traffic() as launches:
        pool = ddim_pool_step(x_t, cond, second, keys_for(3, k), same_step(3), guidance_scale=5.0)
        (pool.x0.sum() + pool.candidates.sum()).backward()
    assert all(x.grad is not None for x in leaves)
    assert [launch.kernel for launch in launches] == ["_ddim_pool_fwd_kernel", "_ddim_pool_bwd_kernel"]
    for launch in launches:
        scalars = launch.read + launch.written - (8 + 2 * k - less) * x_t.numel()  # the coefficients, the keys
        assert 0 < scalars <= (20 + 8 * k) * launch.programs


def test_pool_offsets_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row so long that its last block, one large block in this test, lies past 2^31; the rest is never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(pool_kernels, "_BLOCK", 1 << 18)
    monkeypatch.setattr(pool_kernels, "_BACKWARD_BLOCK", 1 << 20)
    row = torch.from_numpy(np.zeros(2**31 + 100, np.int16)).view(torch.bfloat16)[None]
    row[:, -100:] = torch.randn(100)
    step = same_step(1), 1.0
    with dispatch.triton_on_cpu(), only(lambda program: program[0] == 2048):
        candidates, x0 = pool_kernels.launch_forward(row, row, None, torch.tensor([[5]]), *step)
        grads = pool_kernels.launch_backward(row[None], row, *step, [torch.float32, torch.bfloat16])
    tail = row[:, -100:].double().requires_grad_()
    pred = tail.detach().clone().requires_grad_()
    mean, sigma, exact = pool_oracle.ddim_step(
        tail, pred, ALPHAS_CUMPROD, torch.tensor([501]), torch.tensor([451]), 1.0
    )
    words = [noise_oracle.normal(5, 2**31 + i) for i in range(100)]
    assert_close(x0[:, -100:], exact.detach(), scale=10)
    assert_close(candidates[0, :, -100:], (mean + sigma * torch.tensor(words)).detach(), scale=10)
    (mean * row[:, -100:] + exact * row[:, -100:]).sum().backward()
    for grad, reference in zip(grads, (tail.grad, pred.grad), strict=True):
        assert reference is not None
        assert_close(grad[:, -100:], reference, scale=10)


def test_pool_rows_far_apart() -> None:
    """40 rows 2^26 elements apart: row times stride passes 2^31, either alone does not."""
    x_t, cond, _ = pool_batch((30,), torch.bfloat16, 40)
    keys = keys_for(40, 1)
    spread = torch.from_numpy(np.zeros(39 * 2**26 + 30, np.int16)).view(torch.bfloat16).as_strided((40, 30), (2**26, 1))
    with dispatch.triton_on_cpu(), only(lambda program: program[0] in (0, 31, 32, 39)):
        pools = [
            ddim_pool_step(*tensors, None, keys, same_step(40), guidance_scale=1.0)
            for tensors in [(x_t, cond), (spread.copy_(x_t), cond)]
        ]
    rows = [0, 31, 32, 39]
    assert pools[0].x0[rows].isfinite().all()
    assert torch.equal(pools[0].x0[rows], pools[1].x0[rows])
    assert torch.equal(pools[0].candidates[rows], pools[1].candidates[rows])


def far(tail: torch.Tensor) -> torch.Tensor:
    """A bf16 row of 2^31 + 100 zeros (never touched, so no memory) that ends in `tail`."""
    row = torch.from_numpy(np.zeros(2**31 + 100, np.int16)).view(torch.bfloat16)
    row[-tail.numel() :] = tail
    return row[None]


@pytest.mark.parametrize(
    ("stacked", "with_guidance", "forward", "backward"),
    [
        (False, True, 14, (8, 14, 4)),
        (False, False, 10, (6, 10, 2)),
        (True, True, 12, (12, 8, 4)),
        (True, False, 8, (8, 5, 2)),
    ],
)
def test_loss_bytes_per_element(stacked: bool, with_guidance: bool, forward: int, backward: tuple[int, ...]) -> None:
    """As the docstring of the module says; backward with no, with the winner's and with both ratios clipped."""
    batch = TransitionBatch((2, 512), torch.bfloat16, stacked=stacked, with_guidance=with_guidance)
    elements, rows = batch.x_t.numel(), batch.x_t.shape[0]
    latents, step = (batch.x_t, batch.x_w, batch.x_l), (same_step(batch.pairs), 5.0)
    with dispatch.triton_on_cpu(), traffic() as launches:
        loss_launch.launch_forward((*batch.policy, *batch.reference), latents, *step, 10.0, -0.1, 0.1)
        for slopes in ([-0.5, 0.5], [0.0, 0.5], [0.0, 0.0]):
            rows_of_slopes = torch.tensor(slopes).unsqueeze(1).expand(2, batch.pairs).contiguous()
            loss_launch.launch_backward(torch.tensor(1.0), rows_of_slopes, *batch.policy, latents, *step)
    assert [launch.kernel for launch in launches] == [
        "_transition_chunk_kernel",
        "_transition_pair_kernel",
        *["_transition_bwd_kernel"] * 3,
    ]
    launches.pop(1)
    for launch, per_element in zip(launches, (forward, *backward), strict=True):
        scalars = launch.read + launch.written - per_element * elements  # coefficients, slopes, partial sums
        assert 0 < scalars <= 44 * rows


def test_loss_offsets_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows so long that only the last block differs from 0, which one large block covers."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    for name, value in (("_BLOCK", 1 << 20), ("_MAX_CHUNKS", 4096), ("_PAIR_TILES", {4096: 1})):
        monkeypatch.setattr(loss_launch, name, value)
    monkeypatch.setattr(loss_launch.torch, "empty", torch.zeros)  # the sums of the chunks that do not run
    tails = [(scale * torch.randn(100)).bfloat16() for scale in (2000, 2000, 1, 2000)]
    cond, x_t, x_w, x_l = (far(tail) for tail in tails)
    step, latents = (same_step(1), 1.0), (x_t, x_w, x_l)
    settings = oracle.Settings(ALPHAS_CUMPROD, torch.tensor([501]), torch.tensor([451]))
    exact = tails[0].double()[None].requires_grad_()
    args = tails[1][None], exact, None, settings
    zero = tails[1][None], torch.zeros(1, 100), None, settings
    expected = [
        100 / (2**31 + 100) * (oracle.log_likelihood(x[None], *args) - oracle.log_likelihood(x[None], *zero))
        for x in tails[2:]
    ]
    with dispatch.triton_on_cpu(), only(lambda program: program in [(0, 0, 0), (0, 2048, 0), (2048, 0, 0)]):
        reference = far(torch.zeros(1).bfloat16())
        found = loss_launch.launch_forward((cond, None, reference, None), latents, *step, 10.0, -9.0, 9.0)
        (grad,) = loss_launch.launch_backward(
            torch.tensor(1.0), torch.tensor([[-2.0], [3.0]]), cond, None, latents, *step
        )
    assert found[1].item() == pytest.approx(expected[0].exp().item(), rel=1e-5) and abs(found[1].item() - 1) > 0.01
    assert found[2].item() == pytest.approx(expected[1].exp().item(), rel=1e-5) and abs(found[2].item() - 1) > 0.01
    (3 * expected[1] - 2 * expected[0]).backward()
    assert exact.grad is not None
    assert_close(grad[:, -100:], exact.grad, scale=float(exact.grad.abs().max()))


def test_loss_rows_far_apart() -> None:
    """40 rows of predictions 2^26 elements apart: row times stride passes 2^31, either alone does not."""
    batch = TransitionBatch((30,), torch.bfloat16, pairs=40, with_guidance=False)
    spread = torch.from_numpy(np.zeros(39 * 2**26 + 30, np.int16)).view(torch.bfloat16).as_strided((40, 30), (2**26, 1))
    with dispatch.triton_on_cpu(), only(lambda program: True):
        expected = transition_loss(*batch.arguments(), guidance_scale=5.0)
        for group in (batch.policy, batch.reference):
            packed, group[0] = group[0], spread.copy_(group[0])
            found = transition_loss(*batch.arguments(), guidance_scale=5.0)
            group[0] = packed
            assert torch.equal(found.ratio_w, expected.ratio_w) and torch.equal(found.ratio_l, expected.ratio_l)
