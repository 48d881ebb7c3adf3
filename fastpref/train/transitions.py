"""The loss of denoising transitions under policy and reference (SPO, arXiv 2406.04314)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref.config import Config
from fastpref.memory import moved
from fastpref.models.guidance import GuidedRows
from fastpref.models.policy import Policy
from fastpref.models.prompt_book import PromptBook
from fastpref.rollout.pool import PoolSampler
from fastpref.rollout.transitions import Transitions
from fastpref.train.profile import phase
from fastpref_kernels import transition_loss


class TransitionObjective:
    """Predicts with policy and reference, guided alike, and compares the likelihoods of win and lose.

    A state that win and lose share passes through each UNet once, two rows under guidance.
    """

    def __init__(
        self, config: Config, policy: Policy, book: PromptBook, sampler: PoolSampler, prompts: Sequence[str]
    ) -> None:
        self.config, self.policy, self.book, self.sampler, self.prompts = config, policy, book, sampler, prompts
        self._steps = torch.tensor(sampler.steps)  # (S, 2): t, t_prev
        self._alphas = sampler.schedule.alphas_cumprod.to(policy.device)

    def loss(self, part: Transitions) -> tuple[Tensor, Tensor]:
        """(mean loss with its graph, (2, m) likelihood ratios of win and lose before clipping) of m transitions.

        What ``part`` is looked up by (shared, step, prompt) is on the CPU, where nobody waits for the device.
        """
        shared, apart = part.shared.nonzero().flatten(), (~part.shared).nonzero().flatten()
        order, together, aside = torch.cat([shared, apart]), slice(0, len(shared)), slice(len(shared), None)
        back = moved(order.argsort(), self.policy.device)
        conditioning = self.book.conditioning(
            [self.prompts[i] for i in part.prompt[torch.cat([order, apart])].tolist()]
        )
        times = moved(self._steps[part.step[order]], self.policy.device)
        part = part.rows(order).to(self.policy.device)
        states = torch.cat([part.x_t, part.x_t_l[aside]])
        timesteps = torch.cat([times[:, 0], times[aside, 0]])
        predicted = []
        for name, predict in (("policy forward", self.policy.predict), ("reference", self.policy.predict_reference)):
            with phase(name):
                guided = GuidedRows(predict, conditioning, self.book.empty(), self.config.guidance_scale)
                predicted.append(guided(states, timesteps))
        policy, reference = predicted
        loss, ratios = states.new_zeros(()), []
        for chosen in (together, aside):
            own = part.rows(chosen)
            if len(own):
                branches = _cut(policy, chosen), _cut(reference, chosen)
                value, found = self._compare(own, times[chosen], states[chosen], *branches)
                loss = loss + value * (len(own) / len(part))
                ratios.append(found)
        return loss, torch.cat(ratios, dim=1).index_select(1, back)

    def unet_rows(self, part: Transitions) -> int:
        """Rows of one UNet pass over ``part``."""
        states = 2 * len(part) - int(part.shared.sum())
        return states * (2 if self.config.guidance_scale != 1.0 else 1)

    def _compare(
        self, part: Transitions, times: Tensor, states: Tensor, policy: Branches, reference: Branches
    ) -> tuple[Tensor, Tensor]:
        result = transition_loss(
            *policy,
            *reference,
            states,
            part.x_w,
            part.x_l,
            self._alphas,
            *(column.contiguous() for column in times.unbind(dim=1)),
            guidance_scale=self.config.guidance_scale,
            eta=self.config.eta,
            beta=self.config.beta,
            clip=self.config.ratio_clip,
            prediction_type=self.sampler.schedule.prediction_type,
        )
        return result.loss, torch.stack([result.ratio_w, result.ratio_l]).to(part.x_w)


Branches = tuple[Tensor, Tensor | None]


def _cut(branches: Branches, rows: slice) -> Branches:
    with_prompt, without = branches
    return with_prompt[rows], None if without is None else without[rows]
