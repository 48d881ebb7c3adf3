"""`implicit_reward` against noise and velocity that it recomputes from keys, at any strides and offsets."""

from __future__ import annotations

import os

import pytest
import torch
from coefficients import noising
from interpreter import traffic
from reference import implicit_reward as oracle
from reference import keyed_noise as noise_oracle
from sparse import FAR, far_rows
from tolerances import assert_close

from fastpref_kernels import KeyedNoise, KeyedVelocity, implicit_reward, implicit_reward_parts, keyed_noise
from fastpref_kernels.common import dispatch
from fastpref_kernels.common.strides import layout_of
from fastpref_kernels.implicit_reward.triton import block, split

ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
KEYS = torch.tensor([7, -3, 0x299F31D0_A4093822, 11])
A, S = (x.float() for x in noising(ALPHAS_CUMPROD, torch.tensor([0, 20, 500, 999])))


def targets(kind: str, x0: torch.Tensor) -> tuple[KeyedNoise | KeyedVelocity, torch.Tensor]:
    """(keyed, the same as a float64 tensor)."""
    if kind == "noise":
        return KeyedNoise(KEYS), noise_oracle.noise(KEYS, x0.shape[1:])
    args = KEYS, x0, A, -S
    return KeyedVelocity(*args), noise_oracle.velocity(*args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7, 5)], ids=str)
@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_matches_oracle(path: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    target, exact_target = targets(kind, torch.randn(4, *shape).to(dtype))
    pred, ref_pred = torch.randn(2, 4, *shape).to(dtype)
    for reference in ({}, {"ref_pred": ref_pred}, {"ref_error": torch.rand(4)}):
        leaf, exact = (x.clone().requires_grad_() for x in (pred, pred.double()))
        parts = implicit_reward_parts(leaf, target, **reference, cross=True)
        expected = oracle.implicit_reward(exact, exact_target, **reference)
        # fp32 normals are good to 2e-6, which a squared error of order one carries on
        slack = 1 if dtype == torch.float32 else 1e7 if dtype == torch.float64 else 1
        assert_close(parts.reward, expected, 4 * slack)
        assert parts.cross is not None
        assert_close(parts.cross, oracle.cross(pred, exact_target), 4 * slack)
        assert_close(parts.error, oracle.error(pred, exact_target), 4 * slack)
        weights = torch.randn(4, dtype=parts.reward.dtype)
        parts.reward.backward(weights)
        expected.backward(weights.double())
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        assert_close(leaf.grad, exact.grad, 4 * slack)


def test_equals_the_tensor_it_stands_for(path: str) -> None:
    pred, ref_pred = torch.randn(2, 4, 3, 11, 13)
    noise = keyed_noise(KEYS, pred.shape[1:], torch.float32)
    for reference in ({"ref_pred": ref_pred}, {"ref_error": torch.rand(4)}):
        grads = []
        for target in (KeyedNoise(KEYS), noise):
            leaf = pred.clone().requires_grad_()
            reward = implicit_reward(leaf, target, **reference)
            reward.sum().backward()
            grads += [leaf.grad, reward.detach()]
        assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[3])


def test_row_does_not_depend_on_the_batch(path: str) -> None:
    pred = torch.randn(4, 1100).bfloat16()
    whole = implicit_reward(pred, KeyedNoise(KEYS))
    for n in range(4):
        assert torch.equal(implicit_reward(pred[n : n + 1], KeyedNoise(KEYS[n : n + 1])), whole[n : n + 1])


@pytest.mark.parametrize("kind", ["tensor", "noise", "velocity"])
def test_strides_are_read_in_place(path: str, kind: str) -> None:
    """channels_last, a slice of channels and a transpose give the bits of their contiguous copies.

    Compiled, the strided kernel is another program, which may fuse other products into its sums: a rounding apart.
    """
    rounding = 2**-22 if os.environ.get("KERNELS_ON") == "lanes" else 0.0
    shape = (4, 6, 5, 7)
    pred, ref_pred, x0 = torch.randn(3, *shape)
    odd = [
        pred.to(memory_format=torch.channels_last),
        torch.randn(4, 12, 5, 7)[:, ::2].copy_(ref_pred),
        torch.randn(4, 6, 7, 5).transpose(2, 3).copy_(x0),
    ]
    results = []
    for p, r, x in ((pred, ref_pred, x0), odd):
        target = x if kind == "tensor" else targets(kind, x)[0]
        leaf = p.detach().requires_grad_()
        parts = implicit_reward_parts(leaf, target, ref_pred=r, cross=True)
        parts.reward.backward(torch.arange(4.0))
        assert leaf.grad is not None and leaf.grad.stride() == p.stride()
        results.append((*parts, leaf.grad))
    for result, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(result, expected, rtol=rounding, atol=rounding)


def test_dense_rows_need_no_stride_arithmetic() -> None:
    x = torch.zeros(2, 8, 5, 7)
    assert layout_of("op", x, x[:1].expand(2, -1, -1, -1)).flat  # a shared target
    assert layout_of("op", x[:, :4], None, x[:, 4:]).strides == [(280, 0, 0, 1), (0, 0, 0, 0), (280, 0, 0, 1)]
    last = x.to(memory_format=torch.channels_last)
    assert layout_of("op", last) == (False, (8, 35), [(280, 0, 1, 8)])
    with pytest.raises(ValueError, match="more than three dimensions"):
        layout_of("op", torch.zeros(2, 3, 4, 5, 6).permute(0, 4, 3, 2, 1))


def test_two_rows_fill_the_gpu() -> None:
    """Real rows have at least 66 chunks, so two have a program for each of 132 multiprocessors, and none is lost."""
    latents = [4 * side**2 for side in (46, 64, 96, 104, 128, 160)] + [16 * 128**2, 16 * 21 * 60 * 104]
    for n_elements in [*latents, *range(8448, 70_000, 61), 10**6, 10**7 + 1, 1 << 31]:
        n_chunks, size = split(n_elements)
        assert 66 <= n_chunks <= 1024 and (n_chunks - 1) * size < n_elements <= n_chunks * size
        assert size % 16 == 0
    for n_elements in range(1, 8448, 7):
        n_chunks, size = split(n_elements)
        assert (n_chunks - 1) * size < n_elements <= n_chunks * size
    for strided in (False, True):
        for size in (128, 256, 272, 1024):
            chosen = block(size, strided)
            per_thread = chosen["BLOCK_SIZE"] // (32 * chosen["num_warps"])
            assert per_thread == (4 if strided else 8)


@pytest.mark.parametrize(
    ("kind", "reference", "forward", "backward"),
    [
        ("tensor", "ref_pred", 6, 6),
        ("noise", "ref_pred", 4, 4),
        ("noise", "ref_error", 2, 4),
        ("velocity", "ref_error", 4, 6),
    ],
)
def test_bytes_per_element(kind: str, reference: str, forward: int, backward: int) -> None:
    """The docstring's numbers at bf16; the rest of a launch is a few numbers per chunk of 128 elements or more."""
    shape = (4, 16, 32)
    x0 = torch.randn(shape).bfloat16()
    target = x0 if kind == "tensor" else KeyedNoise(KEYS)
    if kind == "velocity":
        target = KeyedVelocity(KEYS, x0, A, -S)
    pred = torch.randn(shape).bfloat16().requires_grad_()
    given = {"ref_pred": torch.randn(shape).bfloat16()} if reference == "ref_pred" else {"ref_error": torch.rand(4)}
    with dispatch.triton_on_cpu(), traffic() as launches:
        implicit_reward(pred, target, **given).sum().backward()
    assert [launch.kernel for launch in launches] == [
        "_implicit_reward_fwd_kernel",
        "_implicit_reward_bwd_kernel",
    ]
    for launch, expected in ((launches[0], forward), (launches[1], backward)):
        rest = launch.read + launch.written - expected * pred.numel()
        assert 0 <= rest <= 40 * launch.programs


def test_offsets_past_two_to_the_31(path: str) -> None:
    rows = [torch.randn(3, 40).bfloat16() for _ in range(3)]
    pred, target, ref_pred = (far_rows(x) for x in rows)
    assert 2 * pred.stride(0) > 1 << 31 > FAR
    leaf = pred.requires_grad_()
    reward = implicit_reward(leaf, target, ref_pred=ref_pred)
    assert_close(reward, oracle.implicit_reward(*rows))
    reward.sum().backward()
    assert leaf.grad is not None
    assert_close(leaf.grad, -2 / 40 * (rows[0].double() - rows[1].double()))


def test_strided_offsets_past_two_to_the_31(path: str) -> None:
    """Far apart inside a row."""
    rows = torch.randn(3, 40)
    pred = far_rows(rows).unsqueeze(0)
    target = torch.randn(1, 3, 40)
    assert_close(implicit_reward(pred, target), oracle.implicit_reward(rows.unsqueeze(0), target))


def test_compiles_as_one_graph(path: str) -> None:
    def loss(pred, keys, velocity):
        first = implicit_reward(pred, KeyedNoise(keys))
        return (first * implicit_reward(pred, velocity)).sum()

    velocity = targets("velocity", torch.randn(4, 3, 5))[0]
    pred = torch.randn(4, 3, 5)
    results = []
    torch._dynamo.reset()
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = pred.clone().requires_grad_()
        f(leaf, KEYS, velocity).backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (KeyedNoise(KEYS[:3]), "one a row"),
        (KeyedNoise(KEYS.int()), "int64"),
        (KeyedNoise(KEYS.to("meta")), "on meta"),
        (KeyedVelocity(KEYS, X[:, :5], A, S), "x0"),
        (KeyedVelocity(KEYS, X, A.half(), S), r"p must be .* in KeyedVelocity\(keys, x0, p, q\)"),
        (KeyedVelocity(KEYS, X, A, S[:3]), r"q must be .* of shape \(4,\)"),
        (KeyedVelocity(KEYS, X, A[:, None], S), "p must be"),
        (KeyedVelocity(KEYS, X, A, S.to("meta")), "q is on meta"),
        ("noise", "KeyedNoise"),
    ],
)
def test_errors_are_one_line(target: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        implicit_reward(X, target)
    assert "\n" not in str(raised.value)
