"""What a step says about itself: numbers that stay on the device until the step after, then a metrics line."""

from __future__ import annotations

from typing import Any

import torch

from fastpref.objectives import PairRewards


class Arriving:
    """Scalars on their way from ``device`` to the host; the device has gone on long since when they are read."""

    def __init__(self, figures: dict[str, torch.Tensor], device: torch.device) -> None:
        self.names = list(figures)
        self._numbers = torch.stack([figure.double().reshape(()) for figure in figures.values()])
        self._numbers = self._numbers.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> dict[str, float]:
        """The numbers by name; waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self.names, self._numbers.tolist(), strict=True))


def won(winner: torch.Tensor, loser: torch.Tensor) -> torch.Tensor:
    """1 where the winner's number is higher, a half where both are equal, 0 elsewhere, in fp64; accuracy is its mean.

    As in diffusers' scripts: a policy that is still its reference has an accuracy of one half.
    """
    return (winner > loser).double() + 0.5 * (winner == loser).double()


def step_figures(
    rewards: PairRewards, loss: torch.Tensor, norm: torch.Tensor, effective_contrasts: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The figures of a global batch as scalars on its device; nothing here waits for it."""
    figures = {"loss": loss, "grad_norm": norm, "err_winner": rewards.error_w.mean()}
    if rewards.reward_l is not None and rewards.error_l is not None:
        margin = rewards.reward_w - rewards.reward_l
        figures["reward_winner"] = rewards.reward_w.mean()
        figures["reward_loser"] = rewards.reward_l.mean()
        figures["err_loser"] = rewards.error_l.mean()
        figures["margin"] = margin.mean()
        figures["accuracy"] = won(rewards.reward_w, rewards.reward_l).mean()
    if effective_contrasts is not None:
        figures["effective_contrasts"] = effective_contrasts
    return figures


_KEYS = ("loss", "reward_winner", "reward_loser", "err_winner", "err_loser", "margin", "accuracy", "grad_norm")


def step_metrics(step: int, found: dict[str, float | None], rate: float) -> dict[str, Any]:
    """The line of ``metrics.jsonl`` of a 0-based step; None for what a method does not have."""
    metrics: dict[str, Any] = {"step": step + 1, **{key: found.get(key) for key in _KEYS}, "lr": rate}
    if "effective_contrasts" in found:
        metrics["effective_contrasts"] = found["effective_contrasts"]
    return metrics
