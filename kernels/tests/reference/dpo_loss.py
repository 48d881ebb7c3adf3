from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def share_won(winner: Tensor, loser: Tensor) -> Tensor:
    """Mean of (1 + sign(winner - loser)) / 2."""
    return (1 + torch.sign(winner.double() - loser.double())).mean() / 2


def dpo_loss(reward_w: Tensor, reward_l: Tensor, beta: float, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(loss, accuracy); a tie of rewards counts a half, as in diffusers' scripts."""
    u = beta / 2 * (reward_w.double() - reward_l.double())
    loss = -((1 - label_smoothing) * logsigmoid(u) + label_smoothing * logsigmoid(-u)).mean()
    return loss, share_won(reward_w, reward_l)
