"""What the losses of rewards share: results, rewards as kernels take them, parts of kernels.

Rewards are read from memory, or added up from the chunks that the reward kernel left (`rewards_of`), which saves
`paired_preference_loss` a launch.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .dispatch import jit, tl
from .operator import Operator


class PairwiseLoss(NamedTuple):
    """What `dpo_loss` and `rpo_loss` return, three scalars.

    loss: the only one that back-propagates, to the rewards.
    effective_contrasts: mean over rows of exp(entropy of the row's weights).
    accuracy: share of pairs with reward_w > reward_l; a tie counts a half.
    """

    loss: Tensor
    effective_contrasts: Tensor
    accuracy: Tensor


class Rewards(NamedTuple):
    """Rewards as the kernels take them: the row sums of values (N, chunks) * scale."""

    values: Tensor
    scale: float = 1.0


def without_gradient(x: Tensor) -> Tensor:
    """x.detach(), whose host time is that of a small op, where it changes something."""
    return x.detach() if x.requires_grad else x


def times_beta(reward_w: Tensor, reward_l: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor, float]:
    """Rewards and beta as an op takes them: a beta in a tensor has multiplied the rewards and is 1."""
    if isinstance(beta, Tensor):
        beta = beta.detach()
        return reward_w * beta, reward_l * beta, 1.0
    return reward_w, reward_l, float(beta)


def chunk_block(n_chunks: int) -> int:
    """BLOCK_CHUNKS: 1 for rewards that are there already."""
    return 16 if n_chunks > 1 else 1


def register_stored_gradients(op: Operator, first: int, n_inputs: int) -> None:
    """The forward has made the gradients of the two rewards, its first inputs: outputs `first` and `first + 1`."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # no zeros, a launch each, for the outputs that nobody differentiates
        # The two that are saved stay differentiable, by which a second derivative is noticed and refused.
        ctx.mark_non_differentiable(*output[1:first], *output[first + 2 :])
        ctx.save_for_backward(output[first], output[first + 1])

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * n_inputs
        return *(grad_loss * grad for grad in ctx.saved_tensors), *[None] * (n_inputs - 2)

    op.register_autograd(backward, setup_context=setup_context)


@jit
def log_sigmoid_and_slope(u):
    """(log sigmoid(u), sigmoid(-u)) without overflow; the second is the derivative of the first."""
    e = tl.exp(-tl.abs(u))
    return tl.minimum(u, 0.0) - tl.log(1.0 + e), tl.where(u >= 0.0, e, 1.0) / (1.0 + e)


@jit
def won(w, l):  # noqa: E741
    """1 where w > l, a half where they are equal, else 0, as with NaN."""
    return tl.where(w > l, 1.0, tl.where(w == l, 0.5, 0.0))


@jit
def rewards_of(reward, row, BLOCK: tl.constexpr, BLOCK_CHUNKS: tl.constexpr):
    """Rewards of some rows: sum over chunks of value[row, chunk] * scale; every row is valid.

    reward: (value_ptr, row stride, number of chunks, scale). A reward that is there already is one chunk, scale 1.
    """
    chunks = tl.zeros((BLOCK, BLOCK_CHUNKS), tl.float32)
    for first in range(0, reward[2], BLOCK_CHUNKS):
        chunk = first + tl.arange(0, BLOCK_CHUNKS)
        place = reward[0] + row.to(tl.int64)[:, None] * reward[1] + chunk[None, :]
        chunks += tl.load(place, mask=(chunk < reward[2])[None, :], other=0.0)
    return tl.sum(chunks, axis=1) * reward[3]
