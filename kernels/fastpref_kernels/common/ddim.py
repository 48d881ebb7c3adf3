"""What the ops on DDIM transitions share: coefficients of a step, addresses within a row, checks of the arguments.

    sigma^2 = eta^2 * (1 - abar_prev)/(1 - abar_t) * (1 - abar_t/abar_prev)
    x0      = (x_t - sqrt(1 - abar_t) * eps) / sqrt(abar_t)
    mean    = sqrt(abar_prev) * x0 + sqrt(1 - abar_prev - sigma^2) * eps

x0 and mean are linear in x_t and in the prediction, so four coefficients and sigma say all; that of x_t in the mean is
kept as its difference from 1, drift: mean = x_t + (drift * x_t + c * pred), because a state lies within a few sigma of
x_t and sigma may be small. None is computed as a difference of nearly equal numbers (1 - abar and abar_prev - abar_t
apart, which are as good as the table): fp32 is enough next to abar = 1 and between neighbouring timesteps.
The same formulas in torch, fp64: ddim_torch.py.
Source: DDIM, arXiv 2010.02502, equations 12 and 16.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_between, check_device, check_tensor, is_number
from .dispatch import jit, tl

PREDICTION_TYPES = ("epsilon", "v_prediction")
PER_ROW = -1  # as the number t: every row reads its own
FIRST_ALPHA = -1.0  # as final_alpha: abar before t = 0 is alphas_cumprod[0]


class Step(NamedTuple):
    """A DDIM step as the ops take it: t and t_prev are one number each, or t = PER_ROW and two vectors."""

    t_rows: Tensor | None
    t_prev_rows: Tensor | None
    t: int
    t_prev: int
    guidance_scale: float
    eta: float
    final_alpha: float
    v_prediction: bool

    def row_pointers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What kernels take as the t and t_prev of the rows; they do not read it if t is a number."""
        if self.t_rows is None or self.t_prev_rows is None:
            unread = torch.empty(1, dtype=torch.int64, device=device)
            return unread, unread
        return self.t_rows.contiguous(), self.t_prev_rows.contiguous()

    def numbers(self) -> tuple[int | float, ...]:
        """The other fields, as kernels take them."""
        return self.t, self.t_prev, int(self.v_prediction), self.guidance_scale, self.eta, self.final_alpha


# the fields of a Step in the schema of an op
STEP_SCHEMA = (
    "Tensor? t_rows, Tensor? t_prev_rows, SymInt t, SymInt t_prev, float guidance_scale, float eta, float final_alpha,"
    " bool v_prediction"
)


@jit
def step_coefficients(
    alphas_cumprod_ptr, n_timesteps, t_ptr, t_prev_ptr, row, t_all, t_prev_all, final_alpha, eta, v_prediction
):
    """(drift, mean of pred, x0 of x_t, x0 of pred, sigma) of a row; NaN unless 0 <= t < T and t_prev < t."""
    t = tl.load(t_ptr + row, mask=t_all < 0, other=t_all)
    t_prev = tl.load(t_prev_ptr + row, mask=t_all < 0, other=t_prev_all)
    valid = (t >= 0) & (t < n_timesteps) & (t_prev < t)
    abar = tl.load(alphas_cumprod_ptr + t, mask=valid, other=float("nan"))
    abar_prev = tl.load(alphas_cumprod_ptr + tl.maximum(t_prev, 0), mask=valid, other=float("nan"))
    abar_prev = tl.where(valid & (t_prev < 0) & (final_alpha >= 0.0), final_alpha, abar_prev)
    beta = (1.0 - abar).to(tl.float32)
    beta_prev = (1.0 - abar_prev).to(tl.float32)
    gap = (abar_prev - abar).to(tl.float32)
    abar = abar.to(tl.float32)
    abar_prev = abar_prev.to(tl.float32)
    variance = eta * eta * (beta_prev / beta) * (gap / abar_prev)
    # 1 - abar_prev - sigma^2, as a sum of terms that are not negative
    keep = (1.0 - eta * eta) * beta_prev + eta * eta * (beta_prev / beta) * (beta_prev / abar_prev) * abar
    direction = tl.sqrt(keep)
    root, root_beta = tl.sqrt(abar), tl.sqrt(beta)
    # direction * root - sqrt(abar_prev * beta) by its conjugate: the terms of either sum have one sign
    mean_v = -(gap + variance * abar) / (direction * root + tl.sqrt(abar_prev * beta))
    if v_prediction != 0:
        # 1 - sqrt(abar_prev * abar) - direction * root_beta, where abar_prev + keep + sigma^2 = abar + beta = 1
        signal = gap / (tl.sqrt(abar_prev) + root)
        noise = (gap + variance) / (direction + root_beta)
        drift = -0.5 * (signal * signal + noise * noise + variance)
        mean_pred, x0_x, x0_pred = mean_v, root, -root_beta
    else:
        drift = gap / (abar * (tl.sqrt(abar_prev / abar) + 1.0))
        mean_pred, x0_x, x0_pred = mean_v / root, 1.0 / root, -root_beta / root
    return drift, mean_pred, x0_x, x0_pred, tl.sqrt(variance)


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


def check_alphas_cumprod(op: str, alphas_cumprod: Tensor, name: str, like: Tensor) -> None:
    check_tensor(op, "alphas_cumprod", alphas_cumprod)
    if alphas_cumprod.dtype not in (torch.float32, torch.float64) or alphas_cumprod.dim() != 1:
        raise ValueError(
            f"{op}: alphas_cumprod must be an fp32 or fp64 vector, got {alphas_cumprod.dtype} of shape"
            f" {tuple(alphas_cumprod.shape)}"
        )
    if alphas_cumprod.numel() == 0:
        raise ValueError(f"{op}: alphas_cumprod is empty")
    check_device(op, "alphas_cumprod", alphas_cumprod, name, like)


def check_step_rows(op: str, step: Step, n_timesteps: int) -> None:
    """Refuses timesteps on the CPU out of range; on a GPU, where a look would wait for it, such rows become NaN."""
    t, t_prev = step.t_rows, step.t_prev_rows
    if t is None or t_prev is None or t.device.type != "cpu":
        return
    if not ((t >= 0) & (t < n_timesteps) & (t_prev < t)).all():
        raise ValueError(
            f"{op}: needs t_prev < t and t in [0, {n_timesteps}), got t {t.tolist()} and t_prev {t_prev.tolist()}"
        )


def _timestep_rows(op: str, name: str, t: int | Tensor, n_rows: int, device: torch.device) -> Tensor:
    if not isinstance(t, Tensor):
        return torch.full((n_rows,), t, dtype=torch.int64, device=device)
    if t.dtype != torch.int64 or t.shape not in ((), (n_rows,)):
        raise ValueError(
            f"{op}: {name} must be a number or int64 of shape ({n_rows},), got {t.dtype} of shape {tuple(t.shape)}"
        )
    if t.device != device:
        raise ValueError(f"{op}: {name} is on {t.device}, the latents are on {device}")
    return t.expand(n_rows)


def make_step(
    op: str,
    t: int | Tensor,
    t_prev: int | Tensor,
    alphas_cumprod: Tensor,
    n_rows: int,
    *,
    guidance_scale: float,
    eta: float,
    final_alpha_cumprod: float | None,
    prediction_type: str,
) -> Step:
    """The checked settings of a step; two numbers stay numbers, else both become vectors."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"{op}: prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
    check_between(op, "guidance_scale", guidance_scale, -math.inf, math.inf, "finite")
    if not (is_number(eta) and 0 <= eta <= 1):
        raise ValueError(f"{op}: eta must be in [0, 1], got {eta!r}")
    if final_alpha_cumprod is not None and not (is_number(final_alpha_cumprod) and 0 < final_alpha_cumprod <= 1):
        raise ValueError(f"{op}: final_alpha_cumprod must be in (0, 1], got {final_alpha_cumprod}")
    final_alpha = FIRST_ALPHA if final_alpha_cumprod is None else float(final_alpha_cumprod)
    settings = (float(guidance_scale), float(eta), final_alpha, prediction_type == "v_prediction")
    if isinstance(t, Tensor) or isinstance(t_prev, Tensor):
        device = alphas_cumprod.device
        t_rows = _timestep_rows(op, "t", t, n_rows, device)
        t_prev_rows = _timestep_rows(op, "t_prev", t_prev, n_rows, device)
        return Step(t_rows, t_prev_rows, PER_ROW, 0, *settings)
    if not (is_number(t) and is_number(t_prev) and 0 <= t < alphas_cumprod.shape[0] and t_prev < t):
        raise ValueError(f"{op}: needs t_prev < t and t in [0, {alphas_cumprod.shape[0]}), got {t!r} and {t_prev!r}")
    return Step(None, None, t, t_prev, *settings)
