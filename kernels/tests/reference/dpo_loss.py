from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(reward_w: Tensor, reward_l: Tensor, beta: float, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """(loss, accuracy)."""
    u = beta / 2 * (reward_w.double() - reward_l.double())
    loss = -((1 - label_smoothing) * logsigmoid(u) + label_smoothing * logsigmoid(-u)).mean()
    return loss, (reward_w > reward_l).double().mean()
