"""A denoising step that draws a pool of K candidates from one prediction.

    pred        = eps_uncond + s * (eps_cond - eps_uncond)                          s = guidance_scale
    x0          = u * x_t + w * pred
    mean        = x_t + (drift * x_t + c * pred)
    candidate_k = mean + std * z_k

Shapes: x_t, eps_cond, eps_uncond (B, ...), keys (B, K) int64, coefficients (B, 5) = (u, w, drift, c, std) ->
candidates (B, K, ...), x0 (B, ...). z_k is `keyed_noise(keys[:, k])`, drawn in registers. Inputs fp16, bf16, fp32 or
fp64, mixed at will; all arithmetic is fp32 (fp64 if x_t is fp64), the results have x_t's dtype. One launch.
Bytes per element at 16 bits: forward 8 + 2K (reads of x_t and the two predictions, writes of x0 and K candidates; 2
less without guidance), backward 8 + 2K (reads of K + 1 gradients, writes of three).
Source: DDIM, arXiv 2010.02502, equations 12 and 16; SPO, arXiv 2406.04314. Coefficients of DDIM: `common/steps.py`.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

from torch import Size, Tensor, contiguous_format, empty, empty_like, int64
from torch import dtype as DType

from ..common.checks import check_batch, check_device, check_elements, check_like, check_tensor, renewed
from ..common.dispatch import use_triton
from ..common.operator import operator
from ..common.steps import check_step
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
    "(Tensor x_t, Tensor eps_cond, Tensor? eps_uncond, Tensor keys, Tensor coefficients, float guidance_scale)"
    " -> (Tensor, Tensor)",
)
def _ddim_pool_step(
    x_t: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    keys: Tensor,
    coefficients: Tensor,
    guidance_scale: float,
) -> tuple[Tensor, Tensor]:
    step = coefficients, guidance_scale
    if use_triton(x_t):
        return launch_forward(x_t, eps_cond, eps_uncond, keys, *step)
    return torch_path.forward(x_t, eps_cond, eps_uncond, keys, *step, _noise)


@_ddim_pool_step.register_fake
def _(x_t, eps_cond, eps_uncond, keys, coefficients, guidance_scale):
    candidates = x_t.new_empty((*keys.shape, *x_t.shape[1:]))
    return candidates, empty_like(x_t, memory_format=contiguous_format)


@operator(
    "ddim_pool_step_backward",
    "(Tensor grad_candidates, Tensor grad_x0, Tensor coefficients, float guidance_scale, ScalarType x_dtype,"
    " ScalarType cond_dtype, ScalarType? uncond_dtype) -> Tensor[]",
)
def _ddim_pool_step_backward(
    grad_candidates: Tensor,
    grad_x0: Tensor,
    coefficients: Tensor,
    guidance_scale: float,
    *dtypes: DType | None,
) -> list[Tensor]:
    """Gradients of x_t, eps_cond and, if there is a third dtype, eps_uncond."""
    path = launch_backward if use_triton(grad_x0) else torch_path.backward
    given = [x for x in dtypes if x is not None]
    return list(path(grad_candidates, grad_x0, coefficients, guidance_scale, given))


@_ddim_pool_step_backward.register_fake
def _(grad_candidates, grad_x0, coefficients, guidance_scale, *dtypes):
    return [grad_x0.new_empty(grad_x0.shape, dtype=dtype) for dtype in dtypes if dtype is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[4])
    ctx.guidance_scale = inputs[5]
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]


def _backward(ctx: Any, grad_candidates: Tensor, grad_x0: Tensor) -> tuple[Tensor | None, ...]:
    grads = _ddim_pool_step_backward(grad_candidates, grad_x0, *ctx.saved_tensors, ctx.guidance_scale, *ctx.dtypes)
    return *grads, *[None] * (6 - len(grads))


_ddim_pool_step.register_autograd(_backward, setup_context=_setup_context)


def _check_predictions(op: str, x_t: Tensor, eps_cond: Tensor, eps_uncond: Tensor | None) -> None:
    check_batch(op, x_t, "x_t")
    check_elements(op, x_t[0].numel())
    check_like(op, "eps_cond", eps_cond, "x_t", x_t)
    if eps_uncond is not None:
        check_like(op, "eps_uncond", eps_uncond, "x_t", x_t)


_POOL = "ddim_pool_step(x_t, eps_cond, eps_uncond, keys, coefficients, *, guidance_scale, k=None)"
_X0 = "predict_x0(x_t, eps_cond, eps_uncond, coefficients, *, guidance_scale)"
_GONE = ("alphas_cumprod", "t", "t_prev", "eta", "final_alpha_cumprod", "prediction_type")


@renewed(_POOL, 5, *_GONE)
def ddim_pool_step(
    x_t: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    keys: Tensor,
    coefficients: Tensor,
    *,
    guidance_scale: float,
    k: int | None = None,
) -> DDIMPool:
    """One denoising step from x_t: K stochastic candidates and the predicted clean latents.

    x_t: (B, ...) latents, fp16, bf16, fp32 or fp64; rows contiguous or channels_last (elsewhere than on the CPU other
        strides are refused).
    eps_cond, eps_uncond: predictions of x_t's shape, of the noise, v or a velocity, in one of these memory orders,
        x_t's or not; eps_uncond=None: no guidance.
    keys: (B, K) int64 (`derive_keys`); candidate k of row b takes `keyed_noise(keys[b, k])`. K = 0 gives x0 alone.
    coefficients: (B, 5) fp32 or fp64, (u, w, drift, c, std) of every row: x0 = u * x_t + w * pred, candidate =
        x_t + (drift * x_t + c * pred) + std * z. One row that is expanded is read in place. What they are for DDIM is
        in the docstring of `common/steps.py`.
    guidance_scale: finite.
    k: None, or K for a check of the keys.

    Returns `DDIMPool(candidates, x0)`, contiguous, in x_t's dtype, computed in fp32 (fp64 for fp64 x_t). NaN stays in
    its element, one in a coefficient makes what it enters NaN in its row. The gradients go to x_t and the two
    predictions.
    Raises ValueError for an empty batch, shapes, dtypes, devices, memory layouts or settings that do not fit.
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
    check_step(op, _POOL, coefficients, guidance_scale, x_t, "x_t")
    return DDIMPool(*_ddim_pool_step(x_t, eps_cond, eps_uncond, keys, coefficients.detach(), float(guidance_scale)))


@renewed(_X0, 4, *_GONE)
def predict_x0(
    x_t: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor | None,
    coefficients: Tensor,
    *,
    guidance_scale: float,
) -> Tensor:
    """The clean latents that a guided prediction implies, for scoring; arguments and errors as `ddim_pool_step`.

    Returns (B, ...), contiguous, in x_t's dtype: u * x_t + w * pred; the last three coefficients do not matter.
    """
    op = "predict_x0"
    _check_predictions(op, x_t, eps_cond, eps_uncond)
    check_step(op, _X0, coefficients, guidance_scale, x_t, "x_t")
    keys = empty(x_t.shape[0], 0, dtype=int64, device=x_t.device)
    return _ddim_pool_step(x_t, eps_cond, eps_uncond, keys, coefficients.detach(), float(guidance_scale))[1]
