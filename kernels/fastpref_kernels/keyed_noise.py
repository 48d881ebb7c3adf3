"""Noise as a pure function of a 64-bit key: Philox4x32-10, Box-Muller, forward diffusion.

    w_0 .. w_3 = Philox4x32-10(key = (low word, high word), counter = (e // 4, 0, 0, 0))      for element e of a row
    u(w)       = fp32(w) / 2^32 + 2^-32, in (0, 1]: normals reach 6.66 standard deviations
    z_0, z_1   = sqrt(-2 ln u(w_0)) * (cos, sin)(2 pi u(w_1)); z_2, z_3 likewise of w_2, w_3; element e is z_(e mod 4)
    x_t        = sqrt(abar_t) * x_0 + sqrt(1 - abar_t) * z

Shapes: keys (N,) int64 -> (N, *shape). The integers are the same on every device; normals are computed in fp32 (two
implementations of log, cos and sin agree to 1e-6) and cast. Row n depends on keys[n] only.
Bytes per element: keyed_noise 2 (a write at 16 bits); add_keyed_noise 4 (a read and a write), backward 4.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 4.3; DDPM, arXiv 2006.11239,
equation 4.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_device, check_floating
from ._dispatch import accumulation_dtype, jit, tl, use_triton
from .cpu import keyed_noise as torch_path

PURPOSES = {
    "noise": 0,
    "timestep": 1,
    "flip": 2,
    "posterior": 3,
    "caption": 4,
    "permutation": 5,
    "sample": 6,
    "init": 7,
}
_BLOCK = 256  # Philox blocks, of four elements each


@jit
def _philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 blocks."""
    for _ in range(10):
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        high0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        high1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit
def _box_muller(radius_word, angle_word):
    u = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 2.3283064365386963e-10
    angle = (angle_word.to(tl.float32) * 2.3283064365386963e-10 + 2.3283064365386963e-10) * 6.283185307179586
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * tl.cos(angle), radius * tl.sin(angle)


@jit
def _normals(key, first, BLOCK_SIZE: tl.constexpr):
    """4 * BLOCK_SIZE normals of the Philox blocks first .. first + BLOCK_SIZE, in element order."""
    counter = (first + tl.arange(0, BLOCK_SIZE)).to(tl.uint32)
    zero = tl.zeros((BLOCK_SIZE,), tl.uint32)
    low = zero + key.to(tl.uint32)
    high = zero + (key >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox4x32(counter, zero, zero, zero, low, high)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@jit
def _keyed_noise_kernel(keys_ptr, out_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * BLOCK_SIZE
    noise = _normals(tl.load(keys_ptr + row), first, BLOCK_SIZE)
    offset = first * 4 + tl.arange(0, 4 * BLOCK_SIZE)
    tl.store(out_ptr + row * n_elements + offset, noise.to(out_ptr.dtype.element_ty), mask=offset < n_elements)


@jit
def _add_keyed_noise_kernel(x0_ptr, keys_ptr, scale_ptr, sigma_ptr, out_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * BLOCK_SIZE
    offset = first * 4 + tl.arange(0, 4 * BLOCK_SIZE)
    mask = offset < n_elements
    x0 = tl.load(x0_ptr + row * n_elements + offset, mask=mask, other=0.0).to(tl.float32)
    noise = _normals(tl.load(keys_ptr + row), first, BLOCK_SIZE)
    x_t = tl.load(scale_ptr + row) * x0 + tl.load(sigma_ptr + row) * noise
    tl.store(out_ptr + row * n_elements + offset, x_t.to(out_ptr.dtype.element_ty), mask=mask)


def _grid(rows: int, n_elements: int) -> tuple[int, int]:
    return rows, -(-n_elements // (4 * _BLOCK))


def _launch_noise(keys: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    out = torch.empty(keys.shape[0], *shape, dtype=dtype, device=keys.device)
    n_elements = math.prod(shape)
    _keyed_noise_kernel[_grid(keys.shape[0], n_elements)](keys.contiguous(), out, n_elements, BLOCK_SIZE=_BLOCK)
    return out


def _launch_add(x0: Tensor, keys: Tensor, scale: Tensor, sigma: Tensor) -> Tensor:
    x0, keys = x0.contiguous(), keys.contiguous()
    out = torch.empty_like(x0)
    n_elements = x0[0].numel()
    _add_keyed_noise_kernel[_grid(x0.shape[0], n_elements)](x0, keys, scale, sigma, out, n_elements, BLOCK_SIZE=_BLOCK)
    return out


@torch.library.custom_op(
    "fastpref_kernels::keyed_noise", mutates_args=(), schema="(Tensor keys, SymInt[] shape, ScalarType dtype) -> Tensor"
)
def _keyed_noise(keys: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return (_launch_noise if use_triton(keys) else torch_path.keyed_noise)(keys, shape, dtype)


@_keyed_noise.register_fake
def _(keys, shape, dtype):
    return keys.new_empty((keys.shape[0], *shape), dtype=dtype)


def _scales(timesteps: Tensor, alphas_cumprod: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """sqrt(abar), sqrt(1 - abar) of each row (N,); refuses timesteps outside [0, T)."""
    in_range = ((timesteps >= 0) & (timesteps < alphas_cumprod.shape[0])).all()
    if timesteps.is_cuda:
        torch._assert_async(in_range, "add_keyed_noise: timesteps out of range")  # no synchronisation with the device
    elif not in_range:
        low, high = timesteps.min().item(), timesteps.max().item()
        raise ValueError(f"add_keyed_noise: timesteps must be in [0, {alphas_cumprod.shape[0]}), got {low} to {high}")
    abar = alphas_cumprod[timesteps].to(torch.promote_types(alphas_cumprod.dtype, dtype))
    return abar.sqrt().to(dtype), (1.0 - abar).sqrt().to(dtype)


@torch.library.custom_op(
    "fastpref_kernels::add_keyed_noise",
    mutates_args=(),
    schema="(Tensor x0, Tensor keys, Tensor timesteps, Tensor alphas_cumprod) -> Tensor",
)
def _add_keyed_noise(x0: Tensor, keys: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    scale, sigma = _scales(timesteps, alphas_cumprod, accumulation_dtype(x0.dtype))
    if use_triton(x0):
        return _launch_add(x0, keys, scale, sigma)
    if use_triton(keys):  # float64: the arithmetic in torch, the noise that every other dtype gets
        column = (-1, *[1] * (x0.dim() - 1))
        noise = _launch_noise(keys, x0.shape[1:], x0.dtype)
        return noise.mul_(sigma.view(column)).add_(x0 * scale.view(column))
    return torch_path.add_keyed_noise(x0, keys, scale, sigma)


@_add_keyed_noise.register_fake
def _(x0, keys, timesteps, alphas_cumprod):
    return torch.empty_like(x0, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.x0_dtype = inputs[0].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    timesteps, alphas_cumprod = ctx.saved_tensors
    dtype = accumulation_dtype(ctx.x0_dtype)
    abar = alphas_cumprod[timesteps].to(torch.promote_types(alphas_cumprod.dtype, dtype))
    scale = abar.sqrt().to(dtype).view(-1, *[1] * (grad.dim() - 1))
    return (grad.to(dtype) * scale).to(ctx.x0_dtype), None, None, None


_add_keyed_noise.register_autograd(_backward, setup_context=_setup_context)


def _check_keys(op: str, keys: Tensor) -> None:
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ValueError(f"{op}: keys must be an int64 vector, got {keys.dtype} of shape {tuple(keys.shape)}")
    if keys.numel() == 0:
        raise ValueError(f"{op}: keys are empty")


def _check_elements(op: str, elements: int) -> None:
    if not 0 < elements <= 1 << 34:
        raise ValueError(f"{op}: a row must have between 1 and 2^34 elements, got {elements}")


def keyed_noise(keys: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard normals (N, *shape): element e of row n is a function of (keys[n], e) only.

    keys: (N,) int64 Philox keys (`derive_keys`); the result is on their device.
    shape: dimensions of a row.
    dtype: floating; the normals are computed in fp32 and cast.

    Raises ValueError for keys that are not an int64 vector, an empty batch or shape, and a dtype that is not floating.
    """
    _check_keys("keyed_noise", keys)
    _check_elements("keyed_noise", math.prod(shape))
    if not dtype.is_floating_point:
        raise ValueError(f"keyed_noise: dtype must be floating point, got {dtype}")
    return _keyed_noise(keys, list(shape), dtype)


def add_keyed_noise(x0: Tensor, keys: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Forward diffusion with noise that is never stored: sqrt(abar) * x0 + sqrt(1 - abar) * keyed_noise(keys).

    x0: (N, ...) clean latents, floating. On a GPU it is copied first if it is not contiguous.
    keys, timesteps: (N,) int64; timesteps in [0, T).
    alphas_cumprod: (T,) floating, abar by timestep.

    Returns x_t of x0's shape and dtype, contiguous, computed in fp32 (fp64 for fp64 x0). The gradient goes to x0 only.
    Raises ValueError for shapes, dtypes or devices that do not fit, an empty batch, and timesteps out of range (on a
    GPU the last is a device-side assertion).
    Source: DDPM, arXiv 2006.11239, equation 4.
    """
    op = "add_keyed_noise"
    check_floating(op, "x0", x0)
    _check_keys(op, keys)
    if x0.dim() < 2 or x0.shape[0] != keys.shape[0]:
        raise ValueError(f"{op}: x0 must be ({keys.shape[0]}, ...), one row per key, got {tuple(x0.shape)}")
    _check_elements(op, x0.numel() // x0.shape[0])
    if timesteps.dtype != torch.int64 or timesteps.shape != keys.shape:
        raise ValueError(
            f"{op}: timesteps must be int64 of shape ({keys.shape[0]},), got {timesteps.dtype} {tuple(timesteps.shape)}"
        )
    check_floating(op, "alphas_cumprod", alphas_cumprod)
    if alphas_cumprod.dim() != 1:
        raise ValueError(f"{op}: alphas_cumprod must be a vector, got shape {tuple(alphas_cumprod.shape)}")
    for name, x in (("keys", keys), ("timesteps", timesteps), ("alphas_cumprod", alphas_cumprod)):
        check_device(op, name, x, "x0", x0)
    return _add_keyed_noise(x0, keys, timesteps, alphas_cumprod)


def _check_word(name: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise ValueError(f"derive_keys: {name} must be in [0, 2^{bits}), got {value}")


def derive_keys(seed: int, epoch: int | Tensor, ids: Tensor, draw: int, purpose: str | int) -> Tensor:
    """64-bit Philox keys of (seed, epoch, id, draw, purpose), from which all randomness of a run follows.

    seed: 64 bits.
    epoch: in [0, 2^32), one number or an int64 tensor that broadcasts with ids.
    ids: int64 (N,), of samples or groups.
    draw: in [0, 2^24).
    purpose: a name in `PURPOSES` or a number in [0, 256).

    Returns (N,) int64 on ids' device: the first two words of Philox4x32-10 with the seed as key and (id low, id high,
    epoch, draw << 8 | purpose) as counter. Plain torch, exact on every device.
    Raises ValueError for a value out of range.
    """
    if isinstance(purpose, str):
        if purpose not in PURPOSES:
            raise ValueError(f"derive_keys: purpose must be one of {', '.join(PURPOSES)}, got {purpose!r}")
        purpose = PURPOSES[purpose]
    if ids.dtype != torch.int64:
        raise ValueError(f"derive_keys: ids must be int64, got {ids.dtype}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"derive_keys: seed must fit 64 bits, got {seed}")
    _check_word("draw", draw, 24)
    _check_word("purpose", purpose, 8)
    if isinstance(epoch, Tensor):
        if epoch.dtype != torch.int64:
            raise ValueError(f"derive_keys: epoch must be int64, got {epoch.dtype}")
        if epoch.numel():
            _check_word("epoch", int(epoch.min()), 32)
            _check_word("epoch", int(epoch.max()), 32)
        epoch_word = epoch.to(ids.device)
    else:
        _check_word("epoch", epoch, 32)
        epoch_word = torch.full((), epoch, dtype=torch.int64, device=ids.device)
    low, high = torch_path.key_words(ids)
    last = torch.full((), draw << 8 | purpose, dtype=torch.int64, device=ids.device)
    seed_words = [
        torch.full((), seed >> shift & torch_path.MASK, dtype=torch.int64, device=ids.device) for shift in (0, 32)
    ]
    w0, w1, _, _ = torch_path.philox4x32((low, high, epoch_word, last), (seed_words[0], seed_words[1]))
    return w0 | w1 << 32


def keyed_uniform_u32(keys: Tensor) -> Tensor:
    """(N,) int64 in [0, 2^32): the first word of each key's stream, for timesteps, flips and caption dropout.

    Plain torch, exact on every device. Raises ValueError for keys that are not an int64 vector.
    """
    _check_keys("keyed_uniform_u32", keys)
    zero = torch.zeros((), dtype=torch.int64, device=keys.device)
    return torch_path.philox4x32((zero, zero, zero, zero), torch_path.key_words(keys))[0]
