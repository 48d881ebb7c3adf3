from __future__ import annotations

import math
import os

import pytest
import torch
from coefficients import noising
from interpreter import only
from reference import keyed_noise as oracle
from sparse import FAR, far_rows
from tolerances import TOLERANCES, assert_close

from fastpref_kernels import PURPOSES, add_keyed_noise, derive_keys, keyed_noise, keyed_uniform_u32
from fastpref_kernels.common import dispatch
from fastpref_kernels.common.philox import _box_muller, _normals, _philox4x32
from fastpref_kernels.common.philox_torch import philox4x32
from fastpref_kernels.keyed_noise.torch import _box_muller as cpu_box_muller
from fastpref_kernels.keyed_noise.torch import normals as cpu_normals
from fastpref_kernels.keyed_noise.triton import _BLOCK, _keyed_noise_kernel

triton, tl, jit = dispatch.triton, dispatch.tl, dispatch.jit

# Known-answer vectors of Random123 for philox4x32-10: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


@jit
def _philox_kernel(words_ptr, out_ptr, BLOCK_SIZE: tl.constexpr):
    i = tl.arange(0, BLOCK_SIZE)
    c0 = tl.load(words_ptr + i * 6).to(tl.uint32)
    c1 = tl.load(words_ptr + i * 6 + 1).to(tl.uint32)
    c2 = tl.load(words_ptr + i * 6 + 2).to(tl.uint32)
    c3 = tl.load(words_ptr + i * 6 + 3).to(tl.uint32)
    k0 = tl.load(words_ptr + i * 6 + 4).to(tl.uint32)
    k1 = tl.load(words_ptr + i * 6 + 5).to(tl.uint32)
    c0, c1, c2, c3 = _philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + i * 4, c0.to(tl.int64))
    tl.store(out_ptr + i * 4 + 1, c1.to(tl.int64))
    tl.store(out_ptr + i * 4 + 2, c2.to(tl.int64))
    tl.store(out_ptr + i * 4 + 3, c3.to(tl.int64))


@jit
def _box_muller_kernel(radius_ptr, angle_ptr, cosine_ptr, sine_ptr, BLOCK_SIZE: tl.constexpr):
    i = tl.arange(0, BLOCK_SIZE)
    radius = tl.load(radius_ptr + i).to(tl.uint32)
    angle = tl.load(angle_ptr + i).to(tl.uint32)
    cosine, sine = _box_muller(radius, angle)
    tl.store(cosine_ptr + i, cosine)
    tl.store(sine_ptr + i, sine)


@jit
def _normals_kernel(keys_ptr, out_ptr, first, BLOCK_SIZE: tl.constexpr):
    noise = _normals(tl.load(keys_ptr), first, BLOCK_SIZE)
    tl.store(out_ptr + tl.arange(0, 4 * BLOCK_SIZE), noise)


def test_philox_known_answers() -> None:
    for counter, key, expected in KNOWN:
        words = [torch.tensor(x) for x in (*counter, *key)]
        assert tuple(oracle.philox4x32(counter, key)) == expected
        assert tuple(int(w) for w in philox4x32(tuple(words[:4]), tuple(words[4:]))) == expected


def test_philox_kernel_known_answers() -> None:
    rows = [(*counter, *key) for counter, key, _ in KNOWN]
    random = torch.randint(0, 1 << 32, (61, 6)).tolist()
    words = torch.tensor(rows + random)
    out = torch.empty(64, 4, dtype=torch.int64)
    _philox_kernel[(1,)](words, out, BLOCK_SIZE=64)
    expected = [list(result) for _, _, result in KNOWN] + [oracle.philox4x32(w[:4], w[4:]) for w in random]
    assert out.tolist() == expected


def test_derive_keys_matches_oracle() -> None:
    ids = torch.tensor([0, 1, 2**31, 2**40 + 7, -1, 2**63 - 1])
    for seed, epoch, draw, purpose in [(0, 0, 0, 0), (2**64 - 1, 2**32 - 1, 2**24 - 1, 255), (-5, 3, 1, 2)]:
        expected = [oracle.derive_key(seed, epoch, i, draw, purpose) for i in ids.tolist()]
        assert derive_keys(seed, epoch, ids, draw, purpose).tolist() == expected
    epochs = torch.arange(6)
    expected = [oracle.derive_key(1, e, i, 0, 1) for e, i in enumerate(ids.tolist())]
    assert derive_keys(1, epochs, ids, 0, "timestep").tolist() == expected


def test_keys_of_everything_are_distinct() -> None:
    ids = torch.arange(20_000)
    keys = [derive_keys(s, e, ids, d, p) for s in (0, 1) for e in (0, 1) for d in (0, 1) for p in PURPOSES]
    keys = torch.cat(keys)
    assert keys.unique().numel() == keys.numel()
    assert len(set(PURPOSES.values())) == len(PURPOSES)


def test_uniform_words() -> None:
    keys = derive_keys(3, 0, torch.arange(100_000), 0, "timestep")
    words = keyed_uniform_u32(keys)
    streams = [oracle.philox4x32((0, 0, 0, 0), (k & oracle.MASK, k >> 32 & oracle.MASK)) for k in keys[:5].tolist()]
    assert words[:5].tolist() == [first for first, *_ in streams]
    assert words.min() >= 0 and words.max() < 2**32
    counts = torch.bincount(words >> 28, minlength=16).double()
    assert ((counts - 6250) ** 2 / 6250).sum() < 45  # chi-square with 15 degrees of freedom: p = 1e-4


@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (33, 31), (4, 16, 16)], ids=str)
def test_noise_matches_oracle(path: str, shape: tuple[int, ...]) -> None:
    keys = torch.tensor([0, -1, 0x299F31D0_A4093822])
    noise = keyed_noise(keys, shape, torch.float32)
    assert noise.shape == (3, *shape)
    expected = [[oracle.normal(k, e) for e in range(math.prod(shape))] for k in keys.tolist()]
    torch.testing.assert_close(noise.flatten(1).double(), torch.tensor(expected).double(), rtol=0, atol=2e-6)


def test_paths_agree() -> None:
    keys = derive_keys(1, 2, torch.arange(8), 0, "noise")
    on_cpu = keyed_noise(keys, (4, 64, 64), torch.float32)
    with dispatch.triton_on_cpu():
        interpreted = keyed_noise(keys, (4, 64, 64), torch.float32)
    assert (on_cpu - interpreted).abs().max() < 1e-6


@pytest.mark.skipif(
    os.environ.get("KERNELS_ON") == "lanes", reason="a program of 2^18 elements, unrolled, compiles for minutes"
)
def test_paths_agree_on_every_octant() -> None:
    """The kernel's polynomials against torch's sine and cosine, at 2^18 angles and at the ends of the octants."""
    edges = (torch.arange(9)[:, None] * 2**29 + torch.arange(-400, 401)).clamp(0, 2**32 - 1).flatten()
    angle = torch.cat([edges, torch.randint(0, 1 << 32, ((1 << 18) - edges.numel(),))])
    radius = torch.randint(0, 1 << 32, angle.shape) >> torch.randint(0, 33, angle.shape)
    expected = cpu_box_muller(radius, angle)
    result = torch.empty_like(expected[0]), torch.empty_like(expected[1])
    _box_muller_kernel[(1,)](radius, angle, *result, BLOCK_SIZE=1 << 18)
    for kernel, on_cpu in zip(result, expected, strict=True):
        assert (kernel - on_cpu).abs().max() < 1e-6


def test_elements_past_two_to_the_31() -> None:
    """The counter of a far element, and the address of a far row."""
    keys, first = torch.tensor([0x299F31D0_A4093822]), (1 << 29) + 5
    expected = cpu_normals(keys, first, 64)[0]
    assert expected[-1].item() == pytest.approx(oracle.normal(int(keys), 4 * first + 255), abs=2e-6)
    out = torch.empty(256)
    _normals_kernel[(1,)](keys, out, first, BLOCK_SIZE=64)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    rows, size = far_rows(torch.zeros(3, 4 * _BLOCK)), 4 * _BLOCK
    n_chunks = -(-FAR // size)
    with only(lambda program: program[0] == 2 * n_chunks):
        _keyed_noise_kernel[(3 * n_chunks,)](keys.repeat(3), rows, FAR, n_chunks, BLOCK_SIZE=_BLOCK)
    assert rows[:2].count_nonzero() == 0
    torch.testing.assert_close(rows[2], cpu_normals(keys, 0, _BLOCK)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_casts(path: str, dtype: torch.dtype) -> None:
    keys = torch.arange(3)
    assert torch.equal(keyed_noise(keys, (50,), dtype), keyed_noise(keys, (50,), torch.float32).to(dtype))


@pytest.mark.parametrize("shape", [(5,), (3, 7, 5), (4, 33, 31)], ids=str)
def test_row_does_not_depend_on_the_batch(path: str, shape: tuple[int, ...]) -> None:
    count = 70 if path == "cpu" else 5
    keys = derive_keys(0, 0, torch.arange(count), 0, "noise")
    whole = keyed_noise(keys, shape, torch.float32)
    for rows in (slice(0, 1), slice(1, count), slice(3, 4), slice(count - 3, count)):
        assert torch.equal(keyed_noise(keys[rows], shape, torch.float32), whole[rows])
    order = torch.randperm(count)
    assert torch.equal(keyed_noise(keys[order], shape, torch.float32), whole[order])


def test_long_row_begins_as_a_short_one() -> None:
    """Across the CPU path's tiles: element e does not depend on the length of the row."""
    keys = torch.tensor([5, 6])
    long = keyed_noise(keys, (300_001,), torch.float32)
    assert torch.equal(keyed_noise(keys, (140_003,), torch.float32), long[:, :140_003])
    assert long[1, -1].item() == pytest.approx(oracle.normal(6, 300_000), abs=2e-6)


def test_moments_and_tails() -> None:
    z = keyed_noise(derive_keys(0, 0, torch.arange(200), 0, "noise"), (50_000,), torch.float32).double()
    count = z.numel()
    assert count == 10**7
    # each within five standard errors of the normal distribution's moments
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(z.pow(power).mean() - moment) < 5 * math.sqrt(variance / count)
    for bound in (1, 2, 3, 4, 5):
        p = math.erfc(bound / math.sqrt(2))
        tail = (z.abs() > bound).sum().item()
        assert abs(tail - count * p) < 5 * math.sqrt(count * p) + 5
    assert 5 < z.abs().max() < 6.7
    neighbours = (z[:, 1:] * z[:, :-1]).mean().abs(), (z[1:] * z[:-1]).mean().abs()
    assert max(neighbours) < 5 / math.sqrt(count)


def test_extreme_words(path: str) -> None:
    """The words 0 and 2^32 - 1 give u = 2^-32 and 1: radii 6.66 and 0."""
    radius_words = torch.tensor([0, 0xFFFFFFFF, 0, 0x7FFFFFFF])
    angle_words = torch.tensor([0xFFFFFFFF, 0, 0x3FFFFFFF, 0])
    if path == "cpu":
        cosine, sine = cpu_box_muller(radius_words, angle_words)
    else:
        cosine, sine = torch.empty(4), torch.empty(4)
        _box_muller_kernel[(1,)](radius_words, angle_words, cosine, sine, BLOCK_SIZE=4)
    far, middle = math.sqrt(64 * math.log(2)), math.sqrt(2 * math.log(2))
    torch.testing.assert_close(cosine, torch.tensor([far, 0.0, 0.0, middle]), rtol=0, atol=3e-6)
    torch.testing.assert_close(sine, torch.tensor([0.0, 0.0, far, 0.0]), rtol=0, atol=3e-6)
    assert 6.66 < far < 6.67


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7, 5), (33, 31)], ids=str)
def test_add_matches_oracle(path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x0 = torch.randn(4, *shape).to(dtype)
    keys = derive_keys(0, 0, torch.arange(4), 0, "noise")
    coefficients = noising(ALPHAS_CUMPROD, torch.tensor([0, 10, 500, 999]))
    leaf = x0.clone().requires_grad_()
    x_t = add_keyed_noise(leaf, keys, *coefficients)
    a, s = (x.view(-1, *[1] * len(shape)) for x in coefficients)
    noise = keyed_noise(keys, shape, torch.float32).double()
    assert x_t.dtype == dtype
    assert_close(x_t, a * x0.double() + s * noise)
    x_t.backward(torch.ones_like(x_t))
    assert leaf.grad is not None
    assert_close(leaf.grad, a.expand_as(x0))


def test_add_at_the_ends_of_a_process(path: str) -> None:
    x0, keys = torch.randn(2, 4, 9, 11).to(memory_format=torch.channels_last), torch.arange(2)
    x_t = add_keyed_noise(x0, keys, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    assert torch.equal(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], keyed_noise(keys, (4, 9, 11), torch.float32)[1], rtol=0, atol=0)


def test_add_reads_strides_in_place_and_keeps_nan(path: str) -> None:
    x0, keys, a = torch.randn(3, 12, 5, 7), torch.arange(3), torch.tensor([0.99, 0.5, 0.1])
    x0[1, 2, 3, 4] = torch.nan
    expected = add_keyed_noise(x0[:, ::2].contiguous(), keys, a, 1 - a)
    for strided in (x0[:, ::2], x0[:, ::2].to(memory_format=torch.channels_last)):
        x_t = add_keyed_noise(strided, keys, a, 1 - a)
        torch.testing.assert_close(x_t, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().sum() == 1 and expected[1, 1, 3, 4].isnan()


def test_add_row_does_not_depend_on_the_batch(path: str) -> None:
    x0, keys, a = torch.randn(9, 4, 9, 7), torch.arange(9), torch.linspace(1, 0, 9)
    whole = add_keyed_noise(x0, keys, a, 1 - a)
    for n in range(9):
        row = slice(n, n + 1)
        assert torch.equal(add_keyed_noise(x0[row], keys[row], a[row], 1 - a[row])[0], whole[n])


def test_add_gradcheck() -> None:
    x0 = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    inputs = torch.arange(2), torch.tensor([0.9, 0.3]), torch.tensor([0.1, 0.7])
    assert torch.autograd.gradcheck(lambda x: add_keyed_noise(x, *inputs), x0)


K = torch.arange(2)
GOOD = {"x0": torch.zeros(2, 3), "keys": K, "a": torch.ones(2), "s": torch.ones(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": K}, r"a must be fp32 or fp64 of shape \(2,\) in add_keyed_noise\(x0, keys, a, s\), got torch.int64"),
        ({"a": torch.ones(2).half()}, "fp32 or fp64"),
        ({"s": torch.ones(1)}, r"s must be .* of shape \(2,\)"),
        ({"s": torch.ones(2, 1)}, r"s must be .* of shape \(2,\)"),
        ({"s": torch.ones(2, device="meta")}, "s is on meta"),
        ({"keys": K[:1]}, "one row per key"),
        ({"keys": K.int()}, "int64"),
        ({"x0": torch.zeros(0, 3), "keys": K[:0]}, "empty"),
        ({"x0": torch.zeros(2, 0)}, "elements"),
        ({"x0": torch.zeros(2, 3).int()}, "floating"),
        ({"x0": torch.zeros(2, 3).to("meta")}, "meta"),
    ],
)
def test_add_errors_are_one_line(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        add_keyed_noise(**GOOD | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keyed_noise(K[:0], (3,), torch.float32), "empty"),
        (lambda: keyed_noise(K, (3, 0), torch.float32), "elements"),
        (lambda: keyed_noise(K, (3,), torch.int32), "floating"),
        (lambda: keyed_noise(K.float(), (3,), torch.float32), "int64"),
        (lambda: keyed_uniform_u32(K.int()), "int64"),
        (lambda: derive_keys(0, 0, K, 0, "nosie"), "purpose"),
        (lambda: derive_keys(0, 0, K, 0, 256), "purpose"),
        (lambda: derive_keys(0, 0, K, 1 << 24, 0), "draw"),
        (lambda: derive_keys(0, -1, K, 0, 0), "epoch"),
        (lambda: derive_keys(0, torch.tensor(1 << 32), K, 0, 0), "epoch"),
        (lambda: derive_keys(1 << 64, 0, K, 0, 0), "seed"),
        (lambda: derive_keys(0, 0, K.int(), 0, 0), "int64"),
    ],
)
def test_key_errors_are_one_line(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
