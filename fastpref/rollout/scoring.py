"""Scorers of denoising states behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class StepScorer(Protocol):
    """What judges the candidates of a pool."""

    needs_x0: bool
    """Whether ``x0`` is looked at; it costs a UNet forward of every candidate."""

    def score(self, latents: Tensor, x0: Tensor | None, t: int, prompts: Sequence[str]) -> Tensor:
        """(n,) scores, higher is better, fp32 or fp64 on ``latents``' device.

        latents: (n, C, h, w) candidates.
        x0: (n, C, h, w) what they promise to become, under guidance (finished ones: the latents); None unless
            ``needs_x0``.
        t: the candidates' timestep, 0 if they are finished; with ``score_at=current`` that of the step before.
        prompts: n prompts.
        """
        ...
