"""The implicit reward of diffusion preference alignment.

    error_i  = mean over C*H*W of (pred_i - target_i)^2
    reward_i = mean over C*H*W of (ref_pred_i - target_i)^2 - error_i          or  ref_error_i - error_i

Shapes: pred, target, ref_pred (N, ...), ref_error (N,) -> reward (N,). Inputs fp16, bf16, fp32 or fp64, mixed at
will; they are upcast before the difference, and the sum and the result are fp32 (fp64 if pred is fp64). The target is
a tensor, `KeyedNoise` or `KeyedVelocity`; the latter two recompute their noise in registers.
The two squares are subtracted element by element, as (r - p)(r - t + p - t), before the sum: no digits are lost
between two nearly equal means, and the reward is exactly 0 where the policy equals the reference.
Bytes per element at 16 bits, forward (with ref_error) and backward, which writes the gradient:
    target tensor   6 (4)   6        KeyedNoise   4 (2)   4        KeyedVelocity   6 (4)   6
`cross` reads the losers' tensors once more. Strides are read in place; 16-byte accesses need dense, aligned rows.
The sum has two stages (chunks of a row, then the chunks, by the last program of the row to finish) whose order is a
function of C*H*W alone, without float atomics: a row's bits do not depend on the batch around it. One launch each way.
Rows of 8,448 elements or more have at least 66 chunks, so two rows fill the 132 multiprocessors of an H100.
Source: Diffusion-DPO, arXiv 2311.12908, equation 14, with the mean in place of the sum.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, empty_like

from ..common.checks import check_batch, check_device, check_floating, check_like, renewed
from ..common.dispatch import accumulation_dtype, use_triton
from ..common.operator import operator
from ..common.pairwise import without_gradient
from . import torch as torch_path
from .targets import Source, Target, source_of, with_device_noise
from .triton import launch_backward, launch_forward


class ImplicitReward(NamedTuple):
    """What `implicit_reward_parts` returns; only `reward` back-propagates."""

    reward: Tensor
    error: Tensor
    cross: Tensor | None


@operator(
    "implicit_reward",
    "(Tensor pred, Tensor? target, Tensor? keys, Tensor? p, Tensor? q, Tensor? ref_pred,"
    " Tensor? ref_error, bool cross) -> (Tensor, Tensor, Tensor)",
)
def _implicit_reward(
    pred: Tensor,
    target: Tensor | None,
    keys: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
    ref_pred: Tensor | None,
    ref_error: Tensor | None,
    cross: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    source = Source(target, keys, p, q)
    if use_triton(pred):
        return launch_forward(pred, source, ref_pred, ref_error, cross)
    return torch_path.forward(pred, with_device_noise(source, pred), ref_pred, ref_error, cross)


@_implicit_reward.register_fake
def _(pred, target, keys, p, q, ref_pred, ref_error, cross):
    rows = pred.shape[0]
    sizes = (rows, rows, rows // 2 if cross else 0)
    return tuple(pred.new_empty(size, dtype=accumulation_dtype(pred.dtype)) for size in sizes)


@operator(
    "implicit_reward_backward",
    "(Tensor grad, Tensor? factor, Tensor pred, Tensor? target, Tensor? keys, Tensor? p, Tensor? q) -> Tensor",
)
def implicit_reward_backward(
    grad: Tensor,
    factor: Tensor | None,
    pred: Tensor,
    target: Tensor | None,
    keys: Tensor | None,
    p: Tensor | None,
    q: Tensor | None,
) -> Tensor:
    """The gradient of sum(grad * reward) * factor with respect to pred; grad (N,), factor a scalar."""
    source = Source(target, keys, p, q)
    if use_triton(pred):
        return launch_backward(grad, factor, pred, source)
    return torch_path.backward(grad if factor is None else grad * factor, pred, with_device_noise(source, pred))


@implicit_reward_backward.register_fake
def _(grad, factor, pred, target, keys, p, q):
    return empty_like(pred)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros, a launch each, for the outputs that nobody differentiates
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5])


def _backward(ctx: Any, grad_reward: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_reward is None:
        return (None,) * 8
    return implicit_reward_backward(grad_reward, None, *ctx.saved_tensors), *[None] * 7


_implicit_reward.register_autograd(_backward, setup_context=_setup_context)


def check_reference(op: str, pred: Tensor, ref_pred: Tensor | None, ref_error: Tensor | None) -> None:
    """A batch of predictions with at most one of the two forms of a reference."""
    check_batch(op, pred, "pred")
    if ref_pred is not None and ref_error is not None:
        raise ValueError(f"{op}: give ref_pred or ref_error, not both")
    if ref_pred is not None:
        check_like(op, "ref_pred", ref_pred, "pred", pred)
    if ref_error is not None:
        check_floating(op, "ref_error", ref_error)
        check_device(op, "ref_error", ref_error, "pred", pred)
        if ref_error.shape != pred.shape[:1]:
            raise ValueError(f"{op}: ref_error must have shape ({pred.shape[0]},), got {tuple(ref_error.shape)}")


@renewed("implicit_reward_parts(pred, target, *, ref_pred=None, ref_error=None, cross=False)", 2)
def implicit_reward_parts(
    pred: Tensor,
    target: Target,
    *,
    ref_pred: Tensor | None = None,
    ref_error: Tensor | None = None,
    cross: bool = False,
) -> ImplicitReward:
    """The implicit reward with the policy's error and, on request, the pairs' cross term.

    Arguments and errors as `implicit_reward`; `cross=True` takes [winners; losers], an even number of rows.

    Returns `ImplicitReward(reward, error, cross)`, of which only `reward` back-propagates, to pred only:
    reward (N,); error (N,) = mean((pred - target)^2); cross (N/2,) = mean(delta_w * delta_l), where delta =
    pred - target and rows i and N/2 + i are a pair, or None. The cross term is the inner product in the safeguard of
    Diffusion-SDPO, arXiv 2511.03317.
    """
    reward, error, inner = _parts(pred, target, ref_pred, ref_error, cross)
    return ImplicitReward(reward, without_gradient(error), without_gradient(inner) if cross else None)


def _parts(
    pred: Tensor, target: Target, ref_pred: Tensor | None, ref_error: Tensor | None, cross: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks, and the op."""
    op = "implicit_reward"
    check_reference(op, pred, ref_pred, ref_error)
    source = source_of(op, pred, target)
    if cross and pred.shape[0] % 2:
        raise ValueError(f"{op}: cross needs [winners; losers], an even number of rows, got {pred.shape[0]}")
    ref_pred, ref_error = (x if x is None else without_gradient(x) for x in (ref_pred, ref_error))
    return _implicit_reward(pred, *source, ref_pred, ref_error, cross)


@renewed("implicit_reward(pred, target, *, ref_pred=None, ref_error=None)", 2)
def implicit_reward(
    pred: Tensor, target: Target, *, ref_pred: Tensor | None = None, ref_error: Tensor | None = None
) -> Tensor:
    """How much better the policy denoises each sample than the reference: err_ref - err_theta.

    pred, ref_pred: (N, ...) predictions; fp16, bf16, fp32 or fp64, mixed at will, of any strides that collapse to
        three dimensions together.
    target: their common target, noise or velocity: a tensor like pred, or `KeyedNoise(keys)` or `KeyedVelocity(keys,
        x0, p, q)`, which equal fp32 tensors that are never written to memory.
    ref_error: (N,) the reference's mean squared error, in place of ref_pred; with neither, err_ref = 0.

    Returns (N,) fp32, fp64 if pred is fp64; NaN in a row gives NaN for that row. The gradient goes to pred only, in
    pred's dtype and memory order.
    Raises ValueError for an empty batch, what is not a tensor, and a shape, dtype or device that does not fit.
    Source: Diffusion-DPO, arXiv 2311.12908, equation 14.
    """
    return _parts(pred, target, ref_pred, ref_error, False)[0]
