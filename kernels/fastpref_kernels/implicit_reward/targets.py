"""What an implicit reward compares a prediction with: a tensor, or noise that is recomputed from its key."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..common.checks import check_device, check_like
from ..common.dispatch import jit, tl, use_triton
from ..common.keys import check_keys
from ..common.philox import _normals
from ..keyed_noise.triton import launch_noise, row_scales


@dataclass(frozen=True, eq=False)
class KeyedNoise:
    """The target of an epsilon prediction: `keyed_noise(keys, shape, float32)`, never written to memory.

    keys: (N,) int64, those that `add_keyed_noise` was given.
    """

    keys: Tensor


@dataclass(frozen=True, eq=False)
class KeyedVelocity:
    """The target of a v prediction: sqrt(abar) * keyed_noise(keys) - sqrt(1 - abar) * x0, never written to memory.

    keys, timesteps: (N,) int64, those that `add_keyed_noise` was given; x0: (N, ...) clean latents, floating.
    alphas_cumprod: (T,) floating, abar by timestep.
    Source: Salimans and Ho, Progressive distillation, arXiv 2202.00512, appendix D.
    """

    keys: Tensor
    x0: Tensor
    timesteps: Tensor
    alphas_cumprod: Tensor


Target: TypeAlias = "Tensor | KeyedNoise | KeyedVelocity"


class Source(NamedTuple):
    """A target as a custom op takes it: `tensor` alone, `keys` alone (noise), or all four (velocity, tensor = x0)."""

    tensor: Tensor | None
    keys: Tensor | None = None
    timesteps: Tensor | None = None
    alphas_cumprod: Tensor | None = None


def source_of(op: str, pred: Tensor, target: Target) -> Source:
    """Takes a target apart. Raises TypeError for another type and ValueError for one that does not fit `pred`."""
    if isinstance(target, Tensor):
        check_like(op, "target", target, "pred", pred)
        return Source(target.detach())
    if not isinstance(target, KeyedNoise | KeyedVelocity):
        raise TypeError(f"{op}: target must be a tensor, KeyedNoise or KeyedVelocity, got {type(target).__name__}")
    keys = target.keys
    check_keys(op, keys)
    check_device(op, "keys", keys, "pred", pred)
    if keys.shape[0] != pred.shape[0]:
        raise ValueError(f"{op}: keys must have shape ({pred.shape[0]},), one a row, got {tuple(keys.shape)}")
    if isinstance(target, KeyedNoise):
        return Source(None, keys)
    check_like(op, "x0", target.x0, "pred", pred)
    timesteps, alphas_cumprod = target.timesteps, target.alphas_cumprod
    if timesteps.dtype != torch.int64 or timesteps.shape != keys.shape:
        raise ValueError(
            f"{op}: timesteps must be int64 of shape ({keys.shape[0]},), got {timesteps.dtype} {tuple(timesteps.shape)}"
        )
    if alphas_cumprod.dim() != 1 or not alphas_cumprod.dtype.is_floating_point:
        raise ValueError(f"{op}: alphas_cumprod must be a floating vector, got {tuple(alphas_cumprod.shape)}")
    check_device(op, "timesteps", timesteps, "pred", pred)
    check_device(op, "alphas_cumprod", alphas_cumprod, "pred", pred)
    return Source(target.x0.detach(), keys, timesteps, alphas_cumprod.detach())


def with_device_noise(source: Source, pred: Tensor) -> Source:
    """For the torch path on a GPU, which float64 takes: the noise that the kernels make, as a tensor."""
    if source.keys is None or not use_triton(source.keys):
        return source
    noise = launch_noise(source.keys, pred.shape[1:], pred.dtype)
    if source.timesteps is None or source.alphas_cumprod is None or source.tensor is None:
        return Source(noise)
    abar = source.alphas_cumprod[source.timesteps].to(pred.dtype).view(-1, *[1] * (pred.dim() - 1))
    return Source(noise.mul_(abar.sqrt()).sub_((1.0 - abar).sqrt() * source.tensor))


@jit
def row_schedule(keyed, row, KEYED: tl.constexpr, VELOCITY: tl.constexpr):
    """(key, sqrt(abar), sqrt(1 - abar)) of a row, as far as its target needs them.

    keyed: (keys_ptr, timesteps_ptr, alphas_cumprod_ptr, n_timesteps).
    """
    key = row
    scale = 0.0
    sigma = 0.0
    if KEYED:
        key = tl.load(keyed[0] + row)
    if VELOCITY:
        scale, sigma = row_scales(keyed[1], keyed[2], row, keyed[3])
    return key, scale, sigma


@jit
def target_block(
    target_ptr, place, mask, schedule, first, KEYED: tl.constexpr, VELOCITY: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """BLOCK_SIZE elements of a row's target from logical offset `first`, a multiple of 4, in fp32.

    place: their offsets in memory; schedule: of `row_schedule`.
    """
    if KEYED:
        noise = _normals(schedule[0], first // 4, BLOCK_SIZE // 4)
        if VELOCITY:
            x0 = tl.load(target_ptr + place, mask=mask, other=0.0).to(tl.float32)
            return schedule[1] * noise - schedule[2] * x0
        else:
            return noise
    else:
        return tl.load(target_ptr + place, mask=mask, other=0.0).to(tl.float32)
