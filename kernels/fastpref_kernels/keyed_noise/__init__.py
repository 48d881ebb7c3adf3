"""Noise as a pure function of a 64-bit key: Philox4x32-10, Box-Muller, forward diffusion.

    w_0 .. w_3 = Philox4x32-10(key = (low word, high word), counter = (e // 4, 0, 0, 0))      for element e of a row
    u(w)       = fp32(w) / 2^32 + 2^-32, in (0, 1]: normals reach 6.66 standard deviations
    z_0, z_1   = sqrt(-2 ln u(w_0)) * (cos, sin)(2 pi u(w_1)); z_2, z_3 likewise of w_2, w_3; element e is z_(e mod 4)
    x_t        = a * x_0 + s * z                            a, s: coefficients of a row, whatever the process

Shapes: keys (N,) int64 -> (N, *shape). The integers are the same on every device; normals are computed in fp32 (two
implementations of log, cos and sin agree to 1e-6) and cast. Row n depends on keys[n] only.
Bytes per element at 16 bits: keyed_noise 2 (a write), add_keyed_noise 4 (a read and a write), its backward 4. Any
strides are read in place.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 4.3; DDPM, arXiv 2006.11239,
equation 4: a = sqrt(abar_t), s = sqrt(1 - abar_t); rectified flow, arXiv 2209.03003: a = 1 - sigma, s = sigma.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, contiguous_format, empty_like
from torch import dtype as DType

from ..common.checks import check_coefficients, check_device, check_elements, check_floating, renewed
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


@operator("add_keyed_noise", "(Tensor x0, Tensor keys, Tensor a, Tensor s) -> Tensor")
def _add_keyed_noise(x0: Tensor, keys: Tensor, a: Tensor, s: Tensor) -> Tensor:
    if use_triton(x0):
        return launch_add(x0, keys, a, s, backward=False)
    if use_triton(keys):  # float64: the arithmetic in torch, the noise that every other dtype gets
        scale, sigma = torch_path.rows(a, x0), torch_path.rows(s, x0)
        return launch_noise(keys, x0.shape[1:], x0.dtype).mul_(sigma).add_(x0 * scale)
    return torch_path.add_keyed_noise(x0, keys, a, s)


@_add_keyed_noise.register_fake
def _(x0, keys, a, s):
    return empty_like(x0, memory_format=contiguous_format)


@operator("add_keyed_noise_backward", "(Tensor grad, Tensor a) -> Tensor")
def _add_keyed_noise_backward(grad: Tensor, a: Tensor) -> Tensor:
    if use_triton(grad):
        return launch_add(grad, a, a, a, backward=True)
    return (grad * torch_path.rows(a, grad)).to(grad.dtype).contiguous()


@_add_keyed_noise_backward.register_fake
def _(grad, a):
    return empty_like(grad, memory_format=contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


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
    if not isinstance(dtype, DType) or not dtype.is_floating_point:
        raise ValueError(f"keyed_noise: dtype must be a floating point torch.dtype, got {dtype!r}")
    return _keyed_noise(keys, list(shape), dtype)


_CALL = "add_keyed_noise(x0, keys, a, s)"


@renewed(_CALL, 4, "timesteps", "alphas_cumprod")
def add_keyed_noise(x0: Tensor, keys: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Forward diffusion with noise that is never stored: a * x0 + s * keyed_noise(keys).

    x0: (N, ...) clean latents, floating, of any strides that collapse to three dimensions.
    keys: (N,) int64.
    a, s: (N,) fp32 or fp64, what is left of the latents and the noise that is added. DDPM: sqrt(abar) and
        sqrt(1 - abar) at the row's timestep; rectified flow: 1 - sigma and sigma.

    Returns x_t of x0's shape and dtype, contiguous, computed in fp32 (fp64 for fp64 x0). The gradient goes to x0 only.
    NaN in x0 stays where it is, one in a coefficient makes its row NaN. Raises ValueError for shapes, dtypes or devices
    that do not fit and an empty batch.
    Source: DDPM, arXiv 2006.11239, equation 4.
    """
    op = "add_keyed_noise"
    check_floating(op, "x0", x0)
    check_keys(op, keys)
    if x0.dim() < 2 or x0.shape[0] != keys.shape[0]:
        raise ValueError(f"{op}: x0 must be ({keys.shape[0]}, ...), one row per key, got {tuple(x0.shape)}")
    check_elements(op, x0.numel() // x0.shape[0])
    check_device(op, "keys", keys, "x0", x0)
    check_coefficients(op, _CALL, keys.shape[0], "x0", x0, a=a, s=s)
    return _add_keyed_noise(x0, keys, a.detach(), s.detach())
