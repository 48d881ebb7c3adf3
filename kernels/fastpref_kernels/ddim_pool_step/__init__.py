"""A DDIM step that draws a pool of K candidates from one prediction.

    pred        = eps_uncond + s * (eps_cond - eps_uncond)                          s = guidance_scale
    x0          = (x_t - sqrt(1 - abar_t) * pred) / sqrt(abar_t)
    sigma^2     = eta^2 * (1 - abar_prev)/(1 - abar_t) * (1 - abar_t/abar_prev)
    candidate_k = sqrt(abar_prev) * x0 + sqrt(1 - abar_prev - sigma^2) * pred + sigma * z_k

Shapes: x_t, eps_cond, eps_uncond (B, ...), keys (B, K) int64 -> candidates (B, K, ...), x0 (B, ...). z_k is
`keyed_noise(keys[:, k])`, drawn in registers. Inputs fp16, bf16, fp32 or fp64, mixed at will; all arithmetic is fp32
(fp64 if x_t is fp64), the results have x_t's dtype. One launch, coefficients included.
Bytes per element at 16 bits: forward 8 + 2K (reads of x_t and the two predictions, writes of x0 and K candidates; 2
less without guidance), backward 8 + 2K (reads of K + 1 gradients, writes of three).
Source: DDIM, arXiv 2010.02502, equations 12 and 16; SPO, arXiv 2406.04314.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

from torch import Size, Tensor, contiguous_format, empty, empty_like, int64
from torch import dtype as DType

from ..common.checks import check_batch, check_device, check_elements, check_like, check_tensor
from ..common.ddim import (
    STEP_SCHEMA,
    Step,
    check_alphas_cumprod,
    check_step_rows,
    make_step,
)
from ..common.dispatch import use_triton
from ..common.operator import operator
from ..keyed_noise import _keyed_noise
from . import torch as torch_path
from .triton import launch_backward, launch_forward


class DDIMPool(NamedTuple):
    """What `ddim_pool_step` returns: candidates (B, K, ...) and the predicted clean latents x0 (B, ...)."""

    candidates: Tensor
    x0: Tensor


def _noise(keys: Tensor, shape: Size, dtype: DType) -> Tensor:
    return _keyed_noise(keys, list(shape), dtype)


@operator(
    "ddim_pool_step",
    "(Tensor x_t, Tensor eps_cond, Tensor? eps_uncond, Tensor keys, Tensor alphas_cumprod, "
    + STEP_SCHEMA
    + ") -> (Tensor, Tensor)",
)
def _ddim_pool_step(
    x_t: Tensor, eps_cond: Tensor, eps_uncond: Tensor | None, keys: Tensor, alphas_cumprod: Tensor, *fields: Any
) -> tuple[Tensor, Tensor]:
    step = Step(*fields)
    check_step_rows("ddim_pool_step", step, alphas_cumprod.shape[0])
    if use_triton(x_t):
        return launch_forward(x_t, eps_cond, eps_uncond, keys, alphas_cumprod, step)
    return torch_path.forward(x_t, eps_cond, eps_uncond, keys, alphas_cumprod, step, _noise)


@_ddim_pool_step.register_fake
def _(x_t, eps_cond, eps_uncond, keys, alphas_cumprod, *fields):
    candidates = x_t.new_empty((*keys.shape, *x_t.shape[1:]))
    return candidates, empty_like(x_t, memory_format=contiguous_format)


@operator(
    "ddim_pool_step_backward",
    "(Tensor grad_candidates, Tensor grad_x0, Tensor alphas_cumprod, "
    + STEP_SCHEMA
    + ", ScalarType x_dtype, ScalarType cond_dtype, ScalarType? uncond_dtype) -> Tensor[]",
)
def _ddim_pool_step_backward(
    grad_candidates: Tensor, grad_x0: Tensor, alphas_cumprod: Tensor, *rest: Any
) -> list[Tensor]:
    """Gradients of x_t, eps_cond and, if there is a third dtype, eps_uncond."""
    dtypes = [x for x in rest[-3:] if x is not None]
    path = launch_backward if use_triton(grad_x0) else torch_path.backward
    return list(path(grad_candidates, grad_x0, alphas_cumprod, Step(*rest[:-3]), dtypes))


@_ddim_pool_step_backward.register_fake
def _(grad_candidates, grad_x0, alphas_cumprod, *rest):
    return [grad_x0.new_empty(grad_x0.shape, dtype=dtype) for dtype in rest[-3:] if dtype is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    t_rows, t_prev_rows, *ctx.numbers = inputs[5:]
    ctx.save_for_backward(inputs[4], t_rows, t_prev_rows)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def _backward(ctx: Any, grad_candidates: Tensor, grad_x0: Tensor) -> tuple[Tensor | None, ...]:
    alphas_cumprod, *rows = ctx.saved_tensors
    grads = _ddim_pool_step_backward(grad_candidates, grad_x0, alphas_cumprod, *rows, *ctx.numbers, *ctx.dtypes)
    return *grads, *[None] * (13 - len(grads))


_ddim_pool_step.register_autograd(_backward, setup_context=_setup_context)


def _check_predictions(op: str, x_t: Tensor, eps_cond: Tensor, eps_uncond: Tensor | None) -> None:
    check_batch(op, x_t, "x_t")
    check_elements(op, x_t[0].numel())
    check_like(op, "eps_cond", eps_cond, "x_t", x_t)
    if eps_uncond is not None:
        check_like(op, "eps_uncond", eps_uncond, "x_t", x_t)


def ddim_pool_step(
    x_t: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    keys: Tensor,
    alphas_cumprod: Tensor,
    t: int | Tensor,
    t_prev: int | Tensor,
    *,
    guidance_scale: float,
    eta: float = 1.0,
    k: int | None = None,
    final_alpha_cumprod: float | None = None,
    prediction_type: str = "epsilon",
) -> DDIMPool:
    """One DDIM step from x_t: K stochastic candidates for t_prev and the predicted clean latents.

    x_t: (B, ...) latents at t, fp16, bf16, fp32 or fp64; rows contiguous or channels_last (elsewhere
        than on the CPU other strides are refused).
    eps_cond, eps_uncond: predictions of x_t's shape, in one of these memory orders, x_t's or
        not; eps_uncond=None: no guidance.
    keys: (B, K) int64 (`derive_keys`); candidate k of row b takes `keyed_noise(keys[b, k])`. K = 0 gives x0 alone.
    alphas_cumprod: (T,) fp32 or fp64.
    t, t_prev: numbers or int64 of shape () or (B,), with 0 <= t < T and t_prev < t. t_prev < 0 is the end of the
        schedule, abar_prev = final_alpha_cumprod in (0, 1], by default alphas_cumprod[0].
    guidance_scale: finite. eta: in [0, 1]; 0 is the deterministic step, 1 that of DDPM.
    k: None, or K for a check of the keys.
    prediction_type: "epsilon" or "v_prediction", what eps_cond and eps_uncond are.

    Returns `DDIMPool(candidates, x0)`, contiguous, in x_t's dtype, as diffusers' DDIMScheduler.step without
    clip_sample computes them in fp32 (fp64 for fp64 x_t). NaN stays in its element. The gradients go to x_t and the
    two predictions.
    Raises ValueError for an empty batch, shapes, dtypes, devices, memory layouts or settings that do not fit; on a GPU
    rows whose timesteps, given as tensors, are out of bounds are NaN.
    Source: DDIM, arXiv 2010.02502, equations 12 and 16; SPO, arXiv 2406.04314.
    """
    op = "ddim_pool_step"
    _check_predictions(op, x_t, eps_cond, eps_uncond)
    check_tensor(op, "keys", keys)
    if keys.dtype != int64 or keys.dim() != 2 or keys.shape[0] != x_t.shape[0]:
        raise ValueError(
            f"{op}: keys must be int64 of shape ({x_t.shape[0]}, K), got {keys.dtype} of shape {tuple(keys.shape)}"
        )
    check_device(op, "keys", keys, "x_t", x_t)
    if k is not None and k != keys.shape[1]:
        raise ValueError(f"{op}: k is {k}, keys have {keys.shape[1]} columns")
    check_alphas_cumprod(op, alphas_cumprod, "x_t", x_t)
    step = make_step(
        op,
        t,
        t_prev,
        alphas_cumprod,
        x_t.shape[0],
        guidance_scale=guidance_scale,
        eta=eta,
        final_alpha_cumprod=final_alpha_cumprod,
        prediction_type=prediction_type,
    )
    return DDIMPool(*_ddim_pool_step(x_t, eps_cond, eps_uncond, keys, alphas_cumprod.detach(), *step))


def predict_x0(
    x_t: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    alphas_cumprod: Tensor,
    t: int | Tensor,
    *,
    guidance_scale: float,
    prediction_type: str = "epsilon",
) -> Tensor:
    """The clean latents that a guided prediction implies, for scoring; arguments and errors as `ddim_pool_step`.

    Returns (B, ...), contiguous, in x_t's dtype: (x_t - sqrt(1 - abar_t) * pred) / sqrt(abar_t).
    """
    _check_predictions("predict_x0", x_t, eps_cond, eps_uncond)
    keys = empty(x_t.shape[0], 0, dtype=int64, device=x_t.device)
    pool = ddim_pool_step(
        x_t,
        eps_cond,
        eps_uncond,
        keys,
        alphas_cumprod,
        t,
        -1,
        guidance_scale=guidance_scale,
        prediction_type=prediction_type,
    )
    return pool.x0
