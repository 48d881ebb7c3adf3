"""The pairwise log-sigmoid loss in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(reward_w: Tensor, reward_l: Tensor, beta: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """(loss of each pair (N,), its derivative with respect to reward_w (N,))."""
    u = (reward_w - reward_l) * (0.5 * beta)
    loss = -logsigmoid(u)
    slope = -torch.sigmoid(-u)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * logsigmoid(-u)
        slope = (1.0 - label_smoothing) * slope + label_smoothing * torch.sigmoid(u)
    return loss, slope * (0.5 * beta)
