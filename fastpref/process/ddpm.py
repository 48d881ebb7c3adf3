"""DDPM with a prediction of the noise or of v, as coefficients.

Everything is linear in each row, where abar = alphas_cumprod[t]:

    x_t       = a x0 + s noise            a = sqrt(abar)          s = sqrt(1 - abar)
    target    = p noise + q x0            noise: p = 1, q = 0     v: p = a, q = -s
    x0        = u x_t + w prediction      noise: u = 1/a, w = -s/a        v: u = a, w = -s
    mean      = x_t + (drift x_t + c prediction)                          of the DDIM step to abar_prev
    candidate = mean + std z

with std^2 = eta^2 (1 - abar_prev)/(1 - abar) (1 - abar/abar_prev) and, where the noise is predicted,
mean = sqrt(abar_prev) x0 + sqrt(1 - abar_prev - std^2) prediction.

Computed in float64, none as a difference of nearly equal numbers but 1 - abar and abar_prev - abar, which are as good
as the table, and rounded once by who uses them. Between neighbouring timesteps the factor of x_t in the mean is close
to 1; drift is what it is above 1.
Source: DDPM, arXiv 2006.11239, equation 4; v, arXiv 2202.00512, appendix D; DDIM, arXiv 2010.02502, equations 12, 16.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


class Noising(NamedTuple):
    """x_t = a x0 + s noise, target = p noise + q x0; each (T,) by timestep, or (N,) of rows."""

    a: Tensor
    s: Tensor
    p: Tensor
    q: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Noising:
        return Noising(*(x.to(device, dtype) for x in self))

    def at(self, timesteps: Tensor) -> Noising:
        """Of rows at ``timesteps`` (N,) int64, each (N,)."""
        return Noising(*(x[timesteps] for x in self))


def noising(alphas_cumprod: Tensor, prediction_type: PredictionType) -> Noising:
    """Of every timestep, in float64, on the device of ``alphas_cumprod`` (T,)."""
    abar = alphas_cumprod.double()
    a, s = abar.sqrt(), (1 - abar).sqrt()
    if prediction_type == "epsilon":
        return Noising(a, s, torch.ones_like(a), torch.zeros_like(a))
    return Noising(a, s, a, -s)


def x0_coefficients(abar: Tensor, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """(u, w) of x0 = u x_t + w prediction, in float64, of abar's shape."""
    a, s, _, _ = noising(abar, prediction_type)
    return (1 / a, -s / a) if prediction_type == "epsilon" else (a, -s)


def ddim_steps(
    alphas_cumprod: Tensor,
    t: Tensor,
    t_prev: Tensor,
    prediction_type: PredictionType,
    *,
    eta: float = 1.0,
    final_alpha_cumprod: float | None = None,
) -> Tensor:
    """(u, w, drift, c, std) of DDIM steps, (N, 5) float64: what ``ddim_pool_step`` and ``transition_loss`` take.

    Args:
        alphas_cumprod: (T,). t, t_prev: (N,) int64, 0 <= t < T and t_prev < t, all on one device. A t_prev below 0 is
            the end of the schedule.
        eta: in [0, 1]; 0 is the deterministic step, 1 that of DDPM.
        final_alpha_cumprod: abar at the end of the schedule, in (0, 1]; by default ``alphas_cumprod[0]``.

    Raises:
        ValueError: timesteps or settings out of range.
    """
    if not ((t >= 0) & (t < len(alphas_cumprod)) & (t_prev < t)).all():
        known = f"needs t_prev < t and t in [0, {len(alphas_cumprod)})"
        raise ValueError(f"ddim_steps: {known}, got t {t.tolist()} and t_prev {t_prev.tolist()}")
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim_steps: eta must be in [0, 1], got {eta}")
    if final_alpha_cumprod is not None and not 0 < final_alpha_cumprod <= 1:
        raise ValueError(f"ddim_steps: final_alpha_cumprod must be in (0, 1], got {final_alpha_cumprod}")
    table = alphas_cumprod.double()
    final = table[0] if final_alpha_cumprod is None else table.new_tensor(final_alpha_cumprod)
    abar, abar_prev = table[t], torch.where(t_prev < 0, final, table[t_prev.clamp(min=0)])
    beta, beta_prev, gap, eta2 = 1 - abar, 1 - abar_prev, abar_prev - abar, eta**2
    variance = eta2 * (beta_prev / beta) * (gap / abar_prev)
    # sqrt(1 - abar_prev - variance), of a sum of terms that are not negative
    direction = ((1 - eta2) * beta_prev + eta2 * (beta_prev / beta) * (beta_prev / abar_prev) * abar).sqrt()
    root, root_beta, root_prev = abar.sqrt(), beta.sqrt(), abar_prev.sqrt()
    # direction * root - root_prev * root_beta by its conjugate: the terms of either sum have one sign
    c = -(gap + variance * abar) / (direction * root + root_prev * root_beta)
    if prediction_type == "epsilon":
        drift, c = gap / (root * (root_prev + root)), c / root
    else:
        # 1 - root_prev * root - direction * root_beta, where abar_prev + direction^2 + variance = abar + beta = 1
        signal, noise = gap / (root_prev + root), (gap + variance) / (direction + root_beta)
        drift = -0.5 * (signal.square() + noise.square() + variance)
    u, w = x0_coefficients(abar, prediction_type)
    return torch.stack([u, w, drift, c, variance.sqrt()], dim=1)
