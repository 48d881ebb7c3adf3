"""What goes into an objective and what comes out."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PairRewards(NamedTuple):
    """Scalars of N pairs, ``(N,)`` fp32 or fp64, detached; loser fields are None where only winners are trained."""

    reward_w: torch.Tensor
    reward_l: torch.Tensor | None
    error_w: torch.Tensor
    error_l: torch.Tensor | None
    cross: torch.Tensor | None = None  # mean(δ_w·δ_l), for the safeguard
    label: torch.Tensor | None = None  # probability that the winner is preferred; None: 1 for every pair

    def stacked(self) -> torch.Tensor:
        """The fields that are there as rows of one ``(F, N)`` tensor: what ranks exchange."""
        return torch.stack([field for field in self if field is not None])

    def unstacked(self, rows: torch.Tensor) -> PairRewards:
        """Fields from ``rows (F, M)``, laid out as :meth:`stacked` of this one."""
        values = iter(rows)
        return PairRewards(*(None if field is None else next(values) for field in self))

    @classmethod
    def concatenate(cls, parts: list[PairRewards]) -> PairRewards:
        """The parts' pairs one after another."""
        return parts[0].unstacked(torch.cat([part.stacked() for part in parts], dim=1))


class Solution(NamedTuple):
    """The loss over all pairs given and its gradient with respect to every reward."""

    loss: torch.Tensor
    grad_w: torch.Tensor
    grad_l: torch.Tensor | None
    effective_contrasts: torch.Tensor | None = None
