"""From a config to the function that solves a batch of rewards."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastpref.config import Config
from fastpref.objectives.dpo import solve_dpo
from fastpref.objectives.rpo import solve_rpo
from fastpref.objectives.safeguard import safeguard_losers
from fastpref.objectives.sft import solve_sft
from fastpref.objectives.types import PairRewards, Solution


@dataclass(frozen=True)
class Objective:
    """A method with its settings.

    ``couples_pairs`` says that dL/dreward of a pair depends on other pairs, so all rewards of the global batch must be
    known before any gradient is. ``uses_losers`` and ``uses_reference`` say what has to be computed at all.
    """

    config: Config

    @property
    def couples_pairs(self) -> bool:
        return self.config.method == "rpo" and self.config.group > 1

    @property
    def uses_losers(self) -> bool:
        return self.config.method != "sft"

    @property
    def uses_reference(self) -> bool:
        return self.config.method != "sft"

    @property
    def uses_embeddings(self) -> bool:
        return self.config.method == "rpo" and self.config.weight != "uniform" and self.couples_pairs

    def solve(self, rewards: PairRewards, embeddings: tuple[torch.Tensor, torch.Tensor] | None = None) -> Solution:
        """Loss (a mean over the pairs given) and dL/dreward, with the SFT term and the safeguard where asked for."""
        config = self.config
        if config.method == "sft":
            return solve_sft(rewards)
        if config.method == "rpo" and self.couples_pairs:
            if embeddings is None:
                row = torch.ones_like(rewards.reward_w)[:, None]
                embeddings = (row, row)
            solution = solve_rpo(
                rewards,
                *embeddings,
                beta=config.beta,
                temperature=config.temperature,
                weight=config.weight,
                group_size=config.group,
            )
        else:
            solution = solve_dpo(rewards, beta=config.beta, label_smoothing=config.label_smoothing)
        if config.sft_weight:
            solution = _add_sft(solution, rewards, config.sft_weight)
        return solution if config.safeguard is None else safeguard_losers(solution, rewards, config.safeguard)


def build_objective(config: Config) -> Objective:
    """The objective of a recipe."""
    return Objective(config)


def _add_sft(solution: Solution, rewards: PairRewards, weight: float) -> Solution:
    term = solve_sft(rewards)
    return solution._replace(loss=solution.loss + weight * term.loss, grad_w=solution.grad_w + weight * term.grad_w)
