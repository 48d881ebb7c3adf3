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

from torch import Tensor, contiguous_format, empty_like, int64
from torch import dtype as DType

from ..common.checks import check_device, check_elements, check_floating, check_timesteps
from ..common.dispatch import use_triton
from ..common.keys import check_keys
from ..common.operator import operator
from . import torch as torch_path
from .triton import launch_add, launch_noise


@operator("keyed_noise", "(Tensor keys, SymInt[] shape, ScalarType dtype) -> Tensor")
def _keyed_noise(keys: Tensor, shape: Sequence[int], dtype: DType) -> Tensor:
    return (launch_noise if use_triton(keys) else torch_path.keyed_noise)(keys, shape, dtype)


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
        return launch_add(x0, keys, timesteps, alphas_cumprod, backward=False)
    scale, sigma = torch_path.schedule(timesteps, alphas_cumprod, x0)
    if use_triton(keys):  # float64: the arithmetic in torch, the noise that every other dtype gets
        return launch_noise(keys, x0.shape[1:], x0.dtype).mul_(sigma).add_(x0 * scale)
    return torch_path.add_keyed_noise(x0, keys, scale, sigma)


@_add_keyed_noise.register_fake
def _(x0, keys, timesteps, alphas_cumprod):
    return empty_like(x0, memory_format=contiguous_format)


@operator(
    "add_keyed_noise_backward",
    "(Tensor grad, Tensor keys, Tensor timesteps, Tensor alphas_cumprod) -> Tensor",
)
def _add_keyed_noise_backward(grad: Tensor, keys: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    if use_triton(grad):
        return launch_add(grad, keys, timesteps, alphas_cumprod, backward=True)
    scale, _ = torch_path.schedule(timesteps, alphas_cumprod, grad)
    return (grad * scale).to(grad.dtype).contiguous()


@_add_keyed_noise_backward.register_fake
def _(grad, keys, timesteps, alphas_cumprod):
    return empty_like(grad, memory_format=contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _add_keyed_noise_backward(grad, *ctx.saved_tensors), None, None, None


_add_keyed_noise.register_autograd(_backward, setup_context=_setup_context)


def keyed_noise(keys: Tensor, shape: Sequence[int], dtype: DType) -> Tensor:
    """Standard normals (N, *shape): element e of row n is a function of (keys[n], e) only.

    keys: (N,) int64 Philox keys (`derive_keys`); the result is on their device.
    shape: dimensions of a row.
    dtype: floating; the normals are computed in fp32 and cast.

    Raises ValueError for keys that are not an int64 vector, an empty batch or shape, and a dtype that is not floating.
    """
    check_keys("keyed_noise", keys)
    check_elements("keyed_noise", math.prod(shape))
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
    check_elements(op, x0.numel() // x0.shape[0])
    if timesteps.dtype != int64 or timesteps.shape != keys.shape:
        raise ValueError(
            f"{op}: timesteps must be int64 of shape ({keys.shape[0]},), got {timesteps.dtype} {tuple(timesteps.shape)}"
        )
    check_floating(op, "alphas_cumprod", alphas_cumprod)
    if alphas_cumprod.dim() != 1:
        raise ValueError(f"{op}: alphas_cumprod must be a vector, got shape {tuple(alphas_cumprod.shape)}")
    for name, x in (("keys", keys), ("timesteps", timesteps), ("alphas_cumprod", alphas_cumprod)):
        check_device(op, name, x, "x0", x0)
    return _add_keyed_noise(x0, keys, timesteps, alphas_cumprod)
