"""SPO's loss as its code and paper state it (arXiv 2406.04314): likelihoods of the Gaussians, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .ddim_pool_step import ddim_step, guided


class Settings(NamedTuple):
    alphas_cumprod: Tensor
    t: Tensor
    t_prev: Tensor
    guidance_scale: float = 5.0
    eta: float = 1.0
    beta: float = 10.0
    clip: float | None = 0.1
    prediction_type: str = "epsilon"


def log_likelihood(x_prev: Tensor, x_t: Tensor, cond: Tensor, uncond: Tensor | None, s: Settings) -> Tensor:
    """Mean over the elements of log N(x_prev; mean, sigma^2)."""
    pred = guided(cond, uncond, s.guidance_scale)
    mean, sigma, _ = ddim_step(x_t, pred, s.alphas_cumprod, s.t, s.t_prev, s.eta, None, s.prediction_type)
    square = (x_prev.double() - mean) ** 2
    log_p = -square / (2 * sigma**2) - sigma.log() - math.log(math.sqrt(2 * math.pi))
    return log_p.flatten(1).mean(1)


def ratio(x_prev: Tensor, x_t: Tensor, policy: tuple, reference: tuple, s: Settings) -> Tensor:
    return (log_likelihood(x_prev, x_t, *policy, s) - log_likelihood(x_prev, x_t, *reference, s)).exp()


def transition_loss(
    policy_w: tuple, policy_l: tuple, reference_w: tuple, reference_l: tuple, ends: tuple, starts: tuple, s: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ratio_w, ratio_l) from separate predictions (cond, uncond) of winners and losers."""
    found = [
        ratio(x_prev, x_t, policy, reference, s)
        for x_prev, x_t, policy, reference in zip(
            ends, starts, (policy_w, policy_l), (reference_w, reference_l), strict=True
        )
    ]
    kept_w, kept_l = (r if s.clip is None else r.clamp(1 - s.clip, 1 + s.clip) for r in found)
    u = s.beta * kept_w.log() - s.beta * kept_l.log()
    return -torch.sigmoid(u).log().mean(), found[0].detach(), found[1].detach()
