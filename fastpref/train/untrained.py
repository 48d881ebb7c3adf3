"""What a run with a ledger says of it in its first step, where the policy still is the reference and all rewards are 0.

What they are instead is the rounding of two computations of one number. A reference in the step shares the policy's
rounding until the first update and no longer, so its noise in all later steps is that between two passes which round
independently. Two forwards show how much that is whose latents differ by less than what half precision rounds off.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from fastpref.errors import UserError
from fastpref.models.policy import Policy
from fastpref.objectives import PairRewards
from fastpref.train.batch import PairBatch
from fastpref_kernels import implicit_reward

MAX_LOGIT_NOISE = 0.05  # that nobody needs to ask about
_MOST = 10  # times the noise of a reference in the step; a batch of one pair is a draw of either
_SHIFT = 1 / 16  # of the dtype's epsilon, relative to the latents
LEAST_PAIRS, ENOUGH_PAIRS = 8, 64  # that the noise is estimated from


@torch.no_grad()
def rounding_apart(policy: Policy, batch: PairBatch, repeats: int) -> torch.Tensor:
    """``(2, repeats·n)``, winners first: how far errors of forwards that round independently lie apart, in fp64.

    Every forward gets latents shifted by a sixteenth of the precision's epsilon, which does nothing in fp32 that could
    be told from rounding but has the values between layers rounded otherwise.
    """
    random = torch.Generator().manual_seed(0)
    shift = _SHIFT * torch.finfo(policy.base_dtype).eps
    errors = []
    for _ in range(repeats + 1):
        factor = 1 + shift * torch.randn(batch.noisy.shape, generator=random)
        pred = policy.forward_pass(batch.noisy * factor.to(batch.noisy), batch.timesteps, batch.conditioning)
        policy.forwards += batch.rows
        errors.append(-implicit_reward(pred, batch.target).double().view(2, -1))
    return torch.cat([after - before for before, after in pairwise(errors)], dim=1)


def check_untrained(rewards: PairRewards, beta: float, apart: torch.Tensor | None = None) -> str:
    """The noise that a ledger brings into the first step's logits β/2·Δreward, in one line.

    Args:
        rewards: of the whole batch before the first update. apart: from :func:`rounding_apart`, of all ranks; None
            where training is not in half precision.

    Raises:
        UserError: it is more than rounding explains.
    """
    assert rewards.reward_l is not None
    noise = _rms(rewards.reward_w - rewards.reward_l, beta)
    own = 0.0 if apart is None else _rms(apart[0] - apart[1], beta)
    most = max(MAX_LOGIT_NOISE, _MOST * own)
    if not noise <= most:
        raise UserError(
            f"the ledger's errors are not this model's: {noise:.2g} in the logit, at most {most:.2g}",
            "reference",
            "prepare the ledger on the kind of device that trains, or use precision=fp32 or a smaller beta",
        )
    switching = "" if apart is None else f"; once trained, a reference computed in the step by {own:.2g}"
    return f"reference ledger: rounding moves the logit by {noise:.2g}{switching}"


def _rms(differences: torch.Tensor, beta: float) -> float:
    return float((differences.double() * (beta / 2)).square().mean().sqrt())


def micro_batches_to_ask(pairs: int, count: int) -> tuple[int, int]:
    """Of ``count`` micro-batches with ``pairs`` on all ranks each: how many to estimate from, and how often each."""
    asked = min(count, math.ceil(ENOUGH_PAIRS / pairs))
    return asked, math.ceil(LEAST_PAIRS / (asked * pairs))
