"""Noise as a pure function of a 64-bit key: Philox4x32-10, Box-Muller, forward diffusion.

    w_0 .. w_3 = Philox4x32-10(key = (low word, high word), counter = (e // 4, 0, 0, 0))      for element e of a row
    u(w)       = fp32(w) / 2^32 + 2^-32, in (0, 1]: normals reach 6.66 standard deviations
    z_0, z_1   = sqrt(-2 ln u(w_0)) * (cos, sin)(2 pi u(w_1)); z_2, z_3 likewise of w_2, w_3; element e is z_(e mod 4)
    x_t        = sqrt(abar_t) * x_0 + sqrt(1 - abar_t) * z

Shapes: keys (N,) int64 -> (N, *shape). The integers are the same on every device; normals are computed in fp32 (two
implementations of log, cos and sin agree to 1e-6) and cast. Row n depends on keys[n] only.
Bytes per element at 16 bits: keyed_noise 2 (a write), add_keyed_noise 4 (a read and a write), its backward 4. Any
strides are read in place.
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

from ._checks import check_device, check_floating, check_timesteps
from ._dispatch import jit, tl, use_triton
from ._keys import check_keys
from ._operator import operator
from ._philox import _normals
from ._strides import address, layout_of
from .cpu import keyed_noise as torch_path

_BLOCK = 256  # Philox blocks, of four elements each


@jit
def _keyed_noise_kernel(keys_ptr, out_ptr, n_elements, n_chunks, BLOCK_SIZE: tl.constexpr):
    """A program per row and chunk of 4 * BLOCK_SIZE elements."""
    row = tl.program_id(0).to(tl.int64) // n_chunks
    first = tl.program_id(0).to(tl.int64) % n_chunks * BLOCK_SIZE
    noise = _normals(tl.load(keys_ptr + row), first, BLOCK_SIZE)
    offset = first * 4 + tl.arange(0, 4 * BLOCK_SIZE)
    tl.store(out_ptr + row * n_elements + offset, noise.to(out_ptr.dtype.element_ty), mask=offset < n_elements)


@jit
def _schedule(timesteps_ptr, alphas_cumprod_ptr, row, n_timesteps):
    """(sqrt(abar), sqrt(1 - abar)) of a row, fp32; NaN where the timestep is outside [0, n_timesteps)."""
    t = tl.load(timesteps_ptr + row)
    abar = tl.load(alphas_cumprod_ptr + t, mask=(t >= 0) & (t < n_timesteps), other=float("nan")).to(tl.float64)
    return tl.sqrt_rn(abar.to(tl.float32)), tl.sqrt_rn((1.0 - abar).to(tl.float32))


@jit
def _add_keyed_noise_kernel(
    x0_ptr,
    keys_ptr,
    timesteps_ptr,
    alphas_cumprod_ptr,
    out_ptr,
    n_elements,
    n_chunks,
    n_timesteps,
    size_1,
    size_2,
    x0_row,
    x0_0,
    x0_1,
    x0_2,
    BACKWARD: tl.constexpr,
    STRIDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """scale * x0 + sigma * noise, a program per row and chunk; BACKWARD: scale * x0, where x0 is the gradient."""
    row = tl.program_id(0).to(tl.int64) // n_chunks
    first = tl.program_id(0).to(tl.int64) % n_chunks * BLOCK_SIZE
    offset = first * 4 + tl.arange(0, 4 * BLOCK_SIZE)
    mask = offset < n_elements
    place = address(offset, row, (size_1, size_2), (x0_row, x0_0, x0_1, x0_2), STRIDED)
    scale, sigma = _schedule(timesteps_ptr, alphas_cumprod_ptr, row, n_timesteps)
    x_t = scale * tl.load(x0_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if not BACKWARD:
        x_t += sigma * _normals(tl.load(keys_ptr + row), first, BLOCK_SIZE)
    tl.store(out_ptr + row * n_elements + offset, x_t.to(out_ptr.dtype.element_ty), mask=mask)


def _launch_noise(keys: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    out = torch.empty(keys.shape[0], *shape, dtype=dtype, device=keys.device)
    n_elements = math.prod(shape)
    n_chunks = -(-n_elements // (4 * _BLOCK))
    grid = (keys.shape[0] * n_chunks,)
    _keyed_noise_kernel[grid](keys.contiguous(), out, n_elements, n_chunks, BLOCK_SIZE=_BLOCK)
    return out


def _launch_add(x0: Tensor, keys: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, *, backward: bool) -> Tensor:
    out = torch.empty_like(x0, memory_format=torch.contiguous_format)
    n_elements = x0[0].numel()
    n_chunks = -(-n_elements // (4 * _BLOCK))
    layout = layout_of("add_keyed_noise", x0)
    _add_keyed_noise_kernel[(x0.shape[0] * n_chunks,)](
        x0,
        keys.contiguous(),
        timesteps.contiguous(),
        alphas_cumprod.contiguous(),
        out,
        n_elements,
        n_chunks,
        alphas_cumprod.shape[0],
        *layout.sizes,
        *layout.strides[0],
        BACKWARD=backward,
        STRIDED=not layout.flat,
        BLOCK_SIZE=_BLOCK,
    )
    return out


@operator("keyed_noise", "(Tensor keys, SymInt[] shape, ScalarType dtype) -> Tensor")
def _keyed_noise(keys: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return (_launch_noise if use_triton(keys) else torch_path.keyed_noise)(keys, shape, dtype)


@_keyed_noise.register_fake
def _(keys, shape, dtype):
    return keys.new_empty((keys.shape[0], *shape), dtype=dtype)


@operator(
    "add_keyed_noise",
    "(Tensor x0, Tensor keys, Tensor timesteps, Tensor alphas_cumprod) -> Tensor",
)
def _add_keyed_noise(x0: Tensor, keys: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    check_timesteps("add_keyed_noise", timesteps, alphas_cumprod)
    if use_triton(x0):
        return _launch_add(x0, keys, timesteps, alphas_cumprod, backward=False)
    scale, sigma = torch_path.schedule(timesteps, alphas_cumprod, x0)
    if use_triton(keys):  # float64: the arithmetic in torch, the noise that every other dtype gets
        return _launch_noise(keys, x0.shape[1:], x0.dtype).mul_(sigma).add_(x0 * scale)
    return torch_path.add_keyed_noise(x0, keys, scale, sigma)


@_add_keyed_noise.register_fake
def _(x0, keys, timesteps, alphas_cumprod):
    return torch.empty_like(x0, memory_format=torch.contiguous_format)


@operator(
    "add_keyed_noise_backward",
    "(Tensor grad, Tensor keys, Tensor timesteps, Tensor alphas_cumprod) -> Tensor",
)
def _add_keyed_noise_backward(grad: Tensor, keys: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    if use_triton(grad):
        return _launch_add(grad, keys, timesteps, alphas_cumprod, backward=True)
    scale, _ = torch_path.schedule(timesteps, alphas_cumprod, grad)
    return (grad * scale).to(grad.dtype).contiguous()


@_add_keyed_noise_backward.register_fake
def _(grad, keys, timesteps, alphas_cumprod):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _add_keyed_noise_backward(grad, *ctx.saved_tensors), None, None, None


_add_keyed_noise.register_autograd(_backward, setup_context=_setup_context)


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
    check_keys("keyed_noise", keys)
    _check_elements("keyed_noise", math.prod(shape))
    if not dtype.is_floating_point:
        raise ValueError(f"keyed_noise: dtype must be floating point, got {dtype}")
    return _keyed_noise(keys, list(shape), dtype)


def add_keyed_noise(x0: Tensor, keys: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Forward diffusion with noise that is never stored: sqrt(abar) * x0 + sqrt(1 - abar) * keyed_noise(keys).

    x0: (N, ...) clean latents, floating, of any strides that collapse to three dimensions.
    keys, timesteps: (N,) int64; timesteps in [0, T).
    alphas_cumprod: (T,) floating, abar by timestep.

    Returns x_t of x0's shape and dtype, contiguous, computed in fp32 (fp64 for fp64 x0). The gradient goes to x0 only.
    NaN in x0 stays where it is. Raises ValueError for shapes, dtypes or devices that do not fit, an empty batch, and
    timesteps out of range; on a GPU, where a look at them would wait for the device, their rows are NaN instead.
    Source: DDPM, arXiv 2006.11239, equation 4.
    """
    op = "add_keyed_noise"
    check_floating(op, "x0", x0)
    check_keys(op, keys)
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
