"""The step-wise preference loss of SPO over denoising transitions.

    pred   = eps_uncond + s * (eps_cond - eps_uncond)       s = guidance_scale, policy and reference alike
    mu     = x_t + (drift * x_t + c * pred)                 the mean of the step, see ddim_pool_step
    d_i    = mean over C*H*W of [(x_i - mu_ref)^2 - (x_i - mu)^2] / (2 std^2)            i = w, l
    r_i    = clamp(exp(d_i), 1 - clip, 1 + clip)
    loss   = -mean over pairs of log sigmoid(beta * (log r_w - log r_l))

Shapes: x_w, x_l (B, ...), coefficients (B, 5); predictions and x_t (B, ...), or (2B, ...) as [winners; losers] where a
pair has no common x_t -> scalar. Inputs fp16, bf16, fp32 or fp64, mixed at will; arithmetic and results are fp32 (fp64
if eps_cond is). d is computed as mean of c * delta * (2 (x_i - mu) + c * delta) / (2 std^2) with delta = pred -
ref_pred taken branch by branch: no difference of nearly equal sums, and d = 0, r = 1 exactly where the policy equals
the reference.
Bytes per element of a prediction at 16 bits, without guidance in brackets: forward 14 [10], stacked 12 [8]; backward
8 [6] where no ratio is clipped (mu cancels), 14 [10] where one is, 4 [2] where both are; stacked 12 [8], clipped 4 [2].
The sum has two stages (chunks of a row, then the chunks) whose order is a function of C*H*W alone, without atomics: a
pair's ratios have the same bits in any batch. Two launches forward, one backward.
Source: SPO, arXiv 2406.04314; DDIM, arXiv 2010.02502, equations 12 and 16.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ..common.checks import check_batch, check_beta, check_like, check_positive, renewed
from ..common.dispatch import accumulation_dtype, use_triton
from ..common.operator import operator
from ..common.steps import check_step, empty_rows_like
from . import torch as torch_path
from .triton import launch_backward, launch_forward


class TransitionLoss(NamedTuple):
    """What `transition_loss` returns, in fp32 (fp64).

    loss: scalar, the only one that back-propagates, to eps_cond and eps_uncond.
    ratio_w, ratio_l: (B,) policy over reference likelihood of a transition (mean over elements), before clipping.
    clipped: scalar, share of the 2B ratios outside [1 - clip, 1 + clip].
    accuracy: scalar, share of pairs with ratio_w > ratio_l; a tie counts a half.
    """

    loss: Tensor
    ratio_w: Tensor
    ratio_l: Tensor
    clipped: Tensor
    accuracy: Tensor


@operator(
    "transition_loss",
    "(Tensor eps_cond, Tensor? eps_uncond, Tensor ref_eps_cond, Tensor? ref_eps_uncond, Tensor x_t, Tensor x_w,"
    " Tensor x_l, Tensor coefficients, float guidance_scale, Tensor? stored_beta, float beta, float clip)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _transition_loss(*inputs: Any) -> tuple[Tensor, ...]:
    """(loss, ratio_w, ratio_l, clipped, accuracy, derivatives of the loss by the log-ratios (2, B))."""
    coefficients, guidance_scale, stored_beta, beta, clip = inputs[7:]
    if coefficients.device.type == "cpu" and (coefficients[:, 4] <= 0).any():  # on a GPU a look would wait for it
        raise ValueError("transition_loss: a step without noise has no likelihood: needs std > 0 in coefficients")
    bounds = math.log1p(-clip) if clip < 1 else -math.inf, math.log1p(clip)
    path = launch_forward if use_triton(inputs[0]) else torch_path.forward
    step = coefficients, guidance_scale
    return path(inputs[:4], inputs[4:7], *step, beta if stored_beta is None else stored_beta, *bounds)


@_transition_loss.register_fake
def _(*inputs):
    eps_cond, x_w = inputs[0], inputs[5]
    n_pairs = x_w.shape[0]
    shapes = ((), (n_pairs,), (n_pairs,), (), (), (2, n_pairs))
    return tuple(eps_cond.new_empty(shape, dtype=accumulation_dtype(eps_cond.dtype)) for shape in shapes)


@operator(
    "transition_loss_backward",
    "(Tensor grad, Tensor slopes, Tensor eps_cond, Tensor? eps_uncond, Tensor x_t, Tensor x_w, Tensor x_l,"
    " Tensor coefficients, float guidance_scale) -> Tensor[]",
)
def _transition_loss_backward(*inputs: Any) -> list[Tensor]:
    """Gradients of eps_cond and, unless it is None, eps_uncond, in their memory order."""
    grad, slopes, eps_cond, eps_uncond, x_t, x_w, x_l, *step = inputs
    path = launch_backward if use_triton(eps_cond) else torch_path.backward
    return path(grad, slopes, eps_cond, eps_uncond, (x_t, x_w, x_l), *step)


@_transition_loss_backward.register_fake
def _(*inputs):
    return [empty_rows_like(x) for x in inputs[2:4] if x is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros, a launch each, for the outputs that nobody differentiates
    ctx.save_for_backward(output[5], *inputs[:2], *inputs[4:8])
    ctx.guidance_scale = inputs[8]


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 12
    grads = _transition_loss_backward(grad_loss, *ctx.saved_tensors, ctx.guidance_scale)
    return *grads, *[None] * (12 - len(grads))


_transition_loss.register_autograd(_backward, setup_context=_setup_context)


def _check(predictions: dict[str, Tensor | None], x_t: Tensor, x_w: Tensor, x_l: Tensor) -> None:
    op = "transition_loss"
    check_batch(op, x_w, "x_w")
    check_like(op, "x_l", x_l, "x_w", x_w)
    check_batch(op, x_t, "x_t")
    if x_t.shape[1:] != x_w.shape[1:] or x_t.shape[0] not in (x_w.shape[0], 2 * x_w.shape[0]):
        raise ValueError(
            f"{op}: x_t must have x_w's shape {tuple(x_w.shape)} or twice its rows, [winners; losers], got"
            f" {tuple(x_t.shape)}"
        )
    if (predictions["eps_uncond"] is None) != (predictions["ref_eps_uncond"] is None):
        raise ValueError(f"{op}: eps_uncond and ref_eps_uncond must both be tensors or both be None")
    for name, x in predictions.items():
        if x is not None:
            check_like(op, name, x, "x_t", x_t)


_CALL = (
    "transition_loss(eps_cond, eps_uncond, ref_eps_cond, ref_eps_uncond, x_t, x_w, x_l, coefficients, *,"
    " guidance_scale, beta=10.0, clip=0.1)"
)


@renewed(_CALL, 8, "alphas_cumprod", "t", "t_prev", "eta", "final_alpha_cumprod", "prediction_type")
def transition_loss(
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    ref_eps_cond: Tensor,
    ref_eps_uncond: Tensor | None,
    x_t: Tensor,
    x_w: Tensor,
    x_l: Tensor,
    coefficients: Tensor,
    *,
    guidance_scale: float,
    beta: float | Tensor = 10.0,
    clip: float | None = 0.1,
) -> TransitionLoss:
    """SPO's loss of transitions x_t -> x_w (preferred) and x_t -> x_l, with its gradient to both guidance branches.

    eps_cond, eps_uncond, ref_eps_cond, ref_eps_uncond: the policy's and the reference's predictions at x_t, of its
        shape; the two unconditional ones may be None, no guidance. In fp16, bf16, fp32 or fp64.
    x_t: (B, ...), the state that x_w and x_l came from; or (2B, ...), [winners; losers], where they came from two
        states, the predictions then being (2B, ...) too. With one x_t a prediction is read once for both sides.
    x_w, x_l: (B, ...).
    coefficients: (B, 5) fp32 or fp64, (u, w, drift, c, std) of every pair as in `ddim_pool_step`; u and w do not
        matter, std > 0.
    guidance_scale: finite. beta: > 0; a number, or a scalar tensor, whose value is not checked.
    clip: bound of the ratios around 1, > 0; outside it a ratio has no gradient. None: no bound. SPO's code: 0.1.

    Rows of the predictions must all be contiguous or all channels_last in memory, those of x_t, x_w and x_l likewise
    (elsewhere than on the CPU other strides are refused). Gradients have the dtype and memory order of their
    prediction. NaN in a pair gives a NaN loss and NaN in that pair's ratios and gradients, in no other's.

    Returns `TransitionLoss(loss, ratio_w, ratio_l, clipped, accuracy)`.
    Raises ValueError for an empty batch, shapes, dtypes, devices, memory layouts or settings that do not fit, and for
    std = 0; on a GPU, where a look would wait for it, such pairs give infinite or NaN ratios.
    Source: SPO, arXiv 2406.04314.
    """
    op = "transition_loss"
    predictions = {"eps_cond": eps_cond, "eps_uncond": eps_uncond}
    references = {"ref_eps_cond": ref_eps_cond, "ref_eps_uncond": ref_eps_uncond}
    _check(predictions | references, x_t, x_w, x_l)
    check_step(op, _CALL, coefficients, guidance_scale, x_w, "x_w")
    check_beta(op, beta)
    if clip is not None:
        check_positive(op, "clip", clip)
    fixed = [None if x is None else x.detach() for x in (*references.values(), x_t, x_w, x_l, coefficients)]
    stored_beta = beta.detach() if isinstance(beta, Tensor) else None
    settings = stored_beta, 1.0 if isinstance(beta, Tensor) else float(beta), math.inf if clip is None else float(clip)
    loss, *rest, _ = _transition_loss(eps_cond, eps_uncond, *fixed, float(guidance_scale), *settings)
    return TransitionLoss(loss, *(x.detach() for x in rest))
