"""The loss of denoising transitions under policy and reference (SPO, arXiv 2406.04314)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.memory import moved
from fastpref.models.guidance import both_predictions, with_empty
from fastpref.models.policy import Conditioning, Policy
from fastpref.models.prompt_book import PromptBook
from fastpref.rollout.pool import PoolSampler
from fastpref.rollout.transitions import Transitions
from fastpref.train.profile import phase
from fastpref_kernels import transition_loss


class Piece(NamedTuple):
    """Transitions laid out for one forward: what it takes, and how its rows are put back in order."""

    inputs: tuple[Tensor | None, ...]  # of :meth:`TransitionObjective.terms`
    shared: int  # transitions whose win and lose have one state; they come first
    back: Tensor  # (m,) int64

    def restored(self, ratios: Tensor) -> Tensor:
        """``ratios`` (2, m) in the order of the transitions."""
        return ratios.index_select(1, self.back)


class TransitionObjective:
    """Predicts with policy and reference, guided alike, and compares the likelihoods of win and lose.

    A state that win and lose share passes through each UNet once, two rows under guidance.
    """

    def __init__(
        self, config: Config, policy: Policy, book: PromptBook, sampler: PoolSampler, prompts: Sequence[str]
    ) -> None:
        self.config, self.policy, self.book, self.sampler, self.prompts = config, policy, book, sampler, prompts
        self.two = config.guidance_scale != 1.0  # rows of the UNet for each state
        self._times = torch.tensor(sampler.steps)[:, 0]  # (S,)
        self._coefficients = sampler.coefficients.to(torch.float64 if config.precision == "fp64" else torch.float32)

    def loss(self, part: Transitions) -> tuple[Tensor, Tensor]:
        """(mean loss with its graph, (2, m) likelihood ratios of win and lose before clipping) of m transitions."""
        piece = self.laid_out(part)
        loss, ratios = self.terms(piece.shared, *piece.inputs)
        return loss, piece.restored(ratios)

    def laid_out(self, part: Transitions) -> Piece:
        """The rows of a forward. What ``part`` is looked up by (shared, step, prompt) is on the CPU, where nobody waits
        for the device."""
        device, shared = self.policy.device, part.shared.nonzero().flatten()
        apart = (~part.shared).nonzero().flatten()
        order, aside = torch.cat([shared, apart]), slice(len(shared), None)
        prompts = [self.prompts[i] for i in part.prompt[torch.cat([order, apart])].tolist()]
        conditioning = self.book.conditioning(prompts)
        if self.two:
            conditioning = with_empty(conditioning, self.book.empty())
        steps = part.step[order]
        times, coefficients = (moved(table[steps], device) for table in (self._times, self._coefficients))
        back, own = moved(order.argsort(), device), part.rows(order).to(device)
        states = torch.cat([own.x_t, own.x_t_l[aside]])
        timesteps = torch.cat([times, times[aside]])
        return Piece((states, timesteps, own.x_w, own.x_l, coefficients, *conditioning.tensors()), len(shared), back)

    def terms(
        self,
        shared: int,
        states: Tensor,
        timesteps: Tensor,
        x_w: Tensor,
        x_l: Tensor,
        coefficients: Tensor,
        *conditioning: Any,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`loss` of what :meth:`laid_out` gives, a function of its inputs and the weights alone.

        The first ``shared`` of the m transitions have one state for win and lose.
        """
        predicted, told, m = [], Conditioning(*conditioning), len(x_w)
        passes = ("policy forward", self.policy.forward_pass), ("reference", self.policy.reference_pass)
        for name, predict in passes:
            with phase(name):
                predicted.append(both_predictions(predict, states, timesteps, told, two=self.two))
        policy, reference = predicted
        loss, ratios = states.new_zeros(()), []
        for own, rows in ((slice(0, shared), slice(0, shared)), (slice(shared, m), slice(shared, None))):
            if own.start < own.stop:  # where the states are two, losers' rows come behind winners'
                branches = _cut(policy, rows), _cut(reference, rows)
                value, found = self._compare(x_w[own], x_l[own], coefficients[own], states[rows], *branches)
                loss = loss + value * ((own.stop - own.start) / m)
                ratios.append(found)
        return loss, torch.cat(ratios, dim=1)

    def unet_rows(self, part: Transitions) -> int:
        """Rows of one UNet pass over ``part``."""
        states = 2 * len(part) - int(part.shared.sum())
        return states * (2 if self.two else 1)

    def _compare(
        self, x_w: Tensor, x_l: Tensor, coefficients: Tensor, states: Tensor, policy: Branches, reference: Branches
    ) -> tuple[Tensor, Tensor]:
        result = transition_loss(
            *policy,
            *reference,
            states,
            x_w,
            x_l,
            coefficients,
            guidance_scale=self.config.guidance_scale,
            beta=self.config.beta,
            clip=self.config.ratio_clip,
        )
        return result.loss, torch.stack([result.ratio_w, result.ratio_l]).to(x_w)


Branches = tuple[Tensor, Tensor | None]


def _cut(branches: Branches, rows: slice) -> Branches:
    with_prompt, without = branches
    return with_prompt[rows], None if without is None else without[rows]
