"""The paired preference loss in torch: the implicit reward and a pairwise loss, one after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.rows import share_won
from ..dpo_loss.torch import dpo_loss
from ..implicit_reward.targets import Source
from ..implicit_reward.torch import forward as implicit_reward
from ..rpo_loss.torch import rpo_loss


class Settings(NamedTuple):
    """weight: "dpo", or one of `rpo_loss`."""

    beta: float
    label_smoothing: float
    temperature: float
    weight: str
    groups: int


def forward(
    pred: Tensor,
    source: Source,
    ref_pred: Tensor | None,
    ref_error: Tensor | None,
    emb_w: Tensor | None,
    emb_l: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, reward (2N,), dL/dreward (2N,))."""
    reward, _, _ = implicit_reward(pred, source, ref_pred, ref_error, False)
    winners, losers = reward.chunk(2)
    accuracy = share_won(winners, losers)
    n_pairs, beta = winners.shape[0], settings.beta
    if settings.weight == "dpo":
        losses, slope = dpo_loss(winners, losers, beta, settings.label_smoothing)
        slope = slope / n_pairs
        return losses.mean(), torch.ones_like(accuracy), accuracy, reward, torch.cat([slope, -slope])
    losses, effective, grad_w, grad_l = rpo_loss(
        winners, losers, emb_w, emb_l, beta, settings.temperature, settings.weight, settings.groups
    )
    count = n_pairs * (n_pairs // settings.groups if settings.weight == "inside" else 1)
    return losses.sum() / count, effective.mean(), accuracy, reward, torch.cat([grad_w, grad_l]) / count
