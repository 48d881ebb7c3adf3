"""What an implicit reward compares a prediction with: a tensor, or noise that is recomputed from its key."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from ..common.checks import check_coefficients, check_device, check_like, renewed
from ..common.dispatch import jit, tl, use_triton
from ..common.keys import check_keys
from ..common.pairwise import without_gradient
from ..common.philox import _normals
from ..keyed_noise.torch import rows
from ..keyed_noise.triton import launch_noise


@dataclass(frozen=True, eq=False)
class KeyedNoise:
    """The target of an epsilon prediction: `keyed_noise(keys, shape, float32)`, never written to memory.

    keys: (N,) int64, those that `add_keyed_noise` was given.
    """

    keys: Tensor


_CALL = "KeyedVelocity(keys, x0, p, q)"


@dataclass(frozen=True, eq=False)
class KeyedVelocity:
    """The target of a v or flow prediction: p * keyed_noise(keys) + q * x0, never written to memory.

    keys: (N,) int64, those that `add_keyed_noise` was given; x0: (N, ...) clean latents, floating.
    p, q: (N,) fp32 or fp64. v prediction: sqrt(abar) and -sqrt(1 - abar) at the row's timestep; rectified flow: 1, -1.
    Source: Salimans and Ho, Progressive distillation, arXiv 2202.00512, appendix D.
    """

    keys: Tensor
    x0: Tensor
    p: Tensor
    q: Tensor


KeyedVelocity.__init__ = renewed(_CALL, 5, "timesteps", "alphas_cumprod")(KeyedVelocity.__init__)  # type: ignore[method-assign]

Target: TypeAlias = "Tensor | KeyedNoise | KeyedVelocity"


class Source(NamedTuple):
    """A target as a custom op takes it: `tensor` alone, `keys` alone (noise), or all four (velocity, tensor = x0)."""

    tensor: Tensor | None
    keys: Tensor | None = None
    p: Tensor | None = None
    q: Tensor | None = None


def source_of(op: str, pred: Tensor, target: Target) -> Source:
    """Takes a target apart. Raises ValueError for one that does not fit `pred`."""
    if isinstance(target, Tensor):
        check_like(op, "target", target, "pred", pred)
        return Source(without_gradient(target))
    if not isinstance(target, KeyedNoise | KeyedVelocity):
        raise ValueError(f"{op}: target must be a tensor, KeyedNoise or KeyedVelocity, got {type(target).__name__}")
    keys = target.keys
    check_keys(op, keys)
    check_device(op, "keys", keys, "pred", pred)
    if keys.shape[0] != pred.shape[0]:
        raise ValueError(f"{op}: keys must have shape ({pred.shape[0]},), one a row, got {tuple(keys.shape)}")
    if isinstance(target, KeyedNoise):
        return Source(None, keys)
    check_like(op, "x0", target.x0, "pred", pred)
    check_coefficients(op, _CALL, keys.shape[0], "pred", pred, p=target.p, q=target.q)
    return Source(without_gradient(target.x0), keys, without_gradient(target.p), without_gradient(target.q))


def with_device_noise(source: Source, pred: Tensor) -> Source:
    """For the torch path on a GPU, which float64 takes: the noise that the kernels make, as a tensor."""
    if source.keys is None or not use_triton(source.keys):
        return source
    noise = launch_noise(source.keys, pred.shape[1:], pred.dtype)
    if source.p is None or source.q is None or source.tensor is None:
        return Source(noise)
    return Source(noise.mul_(rows(source.p, pred)).add_(rows(source.q, pred) * source.tensor))


@jit
def row_coefficients(keyed, row, KEYED: tl.constexpr, VELOCITY: tl.constexpr):
    """(key, p, q) of a row, as far as its target needs them.

    keyed: (keys_ptr, p_ptr, q_ptr).
    """
    key = row
    p = 0.0
    q = 0.0
    if KEYED:
        key = tl.load(keyed[0] + row)
    if VELOCITY:
        p = tl.load(keyed[1] + row).to(tl.float32)
        q = tl.load(keyed[2] + row).to(tl.float32)
    return key, p, q


@jit
def target_block(
    target_ptr, place, mask, of_row, first, KEYED: tl.constexpr, VELOCITY: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """BLOCK_SIZE elements of a row's target from logical offset `first`, a multiple of 4, in fp32.

    place: their offsets in memory; of_row: `row_coefficients`.
    """
    if KEYED:
        noise = _normals(of_row[0], first // 4, BLOCK_SIZE // 4)
        if VELOCITY:
            x0 = tl.load(target_ptr + place, mask=mask, other=0.0).to(tl.float32)
            return of_row[1] * noise + of_row[2] * x0
        else:
            return noise
    else:
        return tl.load(target_ptr + place, mask=mask, other=0.0).to(tl.float32)
