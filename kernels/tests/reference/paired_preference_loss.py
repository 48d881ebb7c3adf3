from __future__ import annotations

from torch import Tensor

from . import dpo_loss, implicit_reward, rpo_loss


def paired_preference_loss(
    pred: Tensor,
    ref_pred: Tensor | None,
    target: Tensor,
    beta: float,
    kind: str = "dpo",
    ref_error: Tensor | None = None,
    label_smoothing: float = 0.0,
    **contrasts,
) -> tuple[Tensor, Tensor | float, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, reward)."""
    reward = implicit_reward.implicit_reward(pred, target, ref_pred, ref_error)
    winners, losers = reward.chunk(2)
    if kind == "dpo":
        loss, accuracy = dpo_loss.dpo_loss(winners, losers, beta, label_smoothing)
        return loss, 1.0, accuracy, reward
    return *rpo_loss.rpo_loss(winners, losers, beta=beta, **contrasts), reward
