"""What the ops on denoising steps share: coefficients, guidance, addresses within a row, checks of the arguments.

A step is five numbers of a row, coefficients (B, 5) = (u, w, drift, c, std), whatever the process:

    x0        = u * x_t + w * pred
    mean      = x_t + (drift * x_t + c * pred)
    candidate = mean + std * z

That of x_t in the mean is kept as its difference from 1, drift: a state lies within a few std of x_t and std may be
small. Who computes them does so in float64, none as a difference of nearly equal numbers.
DDIM: sigma^2 = eta^2 * (1 - abar_prev)/(1 - abar_t) * (1 - abar_t/abar_prev) and a prediction of the noise give
u = 1/sqrt(abar_t), w = -sqrt(1 - abar_t)/sqrt(abar_t), drift = sqrt(abar_prev/abar_t) - 1,
c = sqrt(1 - abar_prev - sigma^2) + sqrt(abar_prev) * w, std = sigma.
Source: DDIM, arXiv 2010.02502, equations 12 and 16.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_between, check_device, check_tensor
from .dispatch import jit, tl

CHUNK = 1 << 16  # elements of a chunk of a torch path, whose fp32 temporaries stay in the L2 cache


@jit
def load_step(coefficients_ptr, coefficient_row, row):
    """(u, w, drift, c, std) of a row, fp32."""
    place = coefficients_ptr + row * coefficient_row
    u = tl.load(place).to(tl.float32)
    w = tl.load(place + 1).to(tl.float32)
    drift = tl.load(place + 2).to(tl.float32)
    c = tl.load(place + 3).to(tl.float32)
    std = tl.load(place + 4).to(tl.float32)
    return u, w, drift, c, std


def row_pointer(coefficients: Tensor) -> tuple[Tensor, int]:
    """What kernels take: a tensor whose rows are dense, and the distance between them, 0 where they share one."""
    dense = coefficients if coefficients.stride(1) == 1 else coefficients.contiguous()
    return dense, dense.stride(0)


def columns(coefficients: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """u, w, drift, c and std, each (B, 1) in dtype."""
    return coefficients.to(dtype).unsqueeze(2).unbind(1)


def guided(cond: Tensor, uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    """Classifier-free guidance in dtype, flattened to (rows, elements) in logical order; a new tensor."""
    pred = cond.to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(1)
    if uncond is None:
        return pred
    base = uncond.to(dtype).flatten(1)
    return pred.sub_(base).mul_(guidance_scale).add_(base)


@jit
def transpose(offset, inner, outer, LINEAR: tl.constexpr):
    """Where an element of an (outer, inner) row lies in one stored as (inner, outer); itself if LINEAR or inner = 1."""
    if not LINEAR:
        logical = offset.to(tl.int32)  # all_channels_last refuses rows of 2^31 elements; 64-bit division is slow
        offset = (logical % inner) * outer + logical // inner
    return offset


@jit
def load_fp32(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


def _dense(x: Tensor) -> bool:
    """The rows are contiguous, whatever the distance between them."""
    return x[0].is_contiguous()


def _channels_last(x: Tensor) -> bool:
    return x.dim() > 2 and x[0].movedim(0, -1).is_contiguous()


def all_channels_last(op: str, tensors: dict[str, Tensor]) -> bool:
    """False if the rows of all tensors are contiguous, True if all are channels_last. Raises ValueError otherwise."""
    if all(map(_dense, tensors.values())):
        return False
    if all(_channels_last(x) and x[0].numel() < 1 << 31 for x in tensors.values()):
        return True
    strides = ", ".join(f"{x.stride()} of {name}" for name, x in tensors.items())
    raise ValueError(
        f"{op}: rows must all be contiguous, or all channels_last of less than 2^31 elements, got strides {strides}:"
        " call .contiguous()"
    )


def empty_rows_like(x: Tensor) -> Tensor:
    """Packed rows in the memory order of x: channels_last or contiguous."""
    if _dense(x) or not _channels_last(x):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1)


def check_step(op: str, call: str, coefficients: Tensor, guidance_scale: float, like: Tensor, name: str) -> None:
    """Five numbers for every row of `like`, and a finite scale; `call` shows how the op is called."""
    check_tensor(op, "coefficients", coefficients)
    shape = (like.shape[0], 5)
    if coefficients.dtype not in (torch.float32, torch.float64) or coefficients.shape != shape:
        found = f"{coefficients.dtype} of shape {tuple(coefficients.shape)}"
        raise ValueError(f"{op}: coefficients must be fp32 or fp64 of shape {shape} in {call}, got {found}")
    check_device(op, "coefficients", coefficients, name, like)
    check_between(op, "guidance_scale", guidance_scale, -math.inf, math.inf, "finite")
