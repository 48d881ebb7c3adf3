"""The pairwise preference loss of Diffusion-DPO.

    u_i  = beta/2 * (reward_w_i - reward_l_i)
    loss = -mean_i [ (1 - s) * log sigmoid(u_i) + s * log sigmoid(-u_i) ]        s = label_smoothing

Shapes: reward_w, reward_l (N,) -> scalar, in fp32 (fp64 if a reward is fp64).
Bytes per pair: forward 24 (two reads; both rewards and both derivatives written), backward 16. One launch of one
program: the mean has one order.
Source: Diffusion-DPO, arXiv 2311.12908, equation 14; label smoothing as in conservative DPO (Mitchell 2023)."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_positive, check_rewards
from ._dispatch import accumulation_dtype, use_triton
from ._operator import operator
from ._pairwise_kernels import _dpo_loss_kernel
from ._pairwise_kernels import log_sigmoid_and_slope as log_sigmoid_and_slope
from .cpu.dpo_loss import dpo_loss as torch_path
from .cpu.dpo_loss import share_won


class Rewards(NamedTuple):
    """Rewards as the kernels take them: the row sums of values (N, chunks) * scale."""

    values: Tensor
    scale: float = 1.0


def chunk_block(n_chunks: int) -> int:
    """BLOCK_CHUNKS: 1 for rewards that are there already."""
    return 16 if n_chunks > 1 else 1


def blocks(n_chunks: int) -> dict[str, int]:
    return {"BLOCK": 32 if n_chunks > 1 else 512, "BLOCK_CHUNKS": chunk_block(n_chunks)}


class PairwiseLoss(NamedTuple):
    """What `dpo_loss` and `rpo_loss` return, three scalars.

    loss: the only one that back-propagates, to the rewards.
    effective_contrasts: mean over rows of exp(entropy of the row's weights).
    accuracy: share of pairs with reward_w > reward_l; a tie counts a half.
    """

    loss: Tensor
    effective_contrasts: Tensor
    accuracy: Tensor


def launch(
    reward_w: Rewards, reward_l: Rewards, grad_w: Tensor, grad_l: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, rewards (2N,)) in one launch; fills grad_w (N,) and grad_l (N,)."""
    n_pairs, n_chunks = grad_w.shape[0], reward_w.values.shape[1]
    loss, effective, accuracy = (torch.empty((), dtype=torch.float32, device=grad_w.device) for _ in range(3))
    rewards = torch.empty(2 * n_pairs, dtype=torch.float32, device=grad_w.device)
    _dpo_loss_kernel[(1,)](
        reward_w.values,
        reward_l.values,
        rewards,
        loss,
        effective,
        accuracy,
        grad_w,
        grad_l,
        n_pairs,
        n_chunks,
        reward_w.values.stride(0),
        reward_l.values.stride(0),
        reward_w.scale,
        beta,
        label_smoothing,
        **blocks(n_chunks),
    )
    return loss, effective, accuracy, rewards


@operator(
    "dpo_loss",
    "(Tensor reward_w, Tensor reward_l, float beta, float label_smoothing) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _dpo_loss(
    reward_w: Tensor, reward_l: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, accuracy, dL/dreward_w (N,), dL/dreward_l (N,))."""
    if use_triton(reward_w):
        grads = torch.empty_like(reward_w), torch.empty_like(reward_l)
        settings = (beta, label_smoothing)
        loss, _, accuracy, _ = launch(Rewards(reward_w[:, None]), Rewards(reward_l[:, None]), *grads, *settings)
        return loss, accuracy, *grads
    losses, slope = torch_path(reward_w, reward_l, beta, label_smoothing)
    slope = slope / losses.shape[0]
    return losses.mean(), share_won(reward_w, reward_l), slope, -slope


@_dpo_loss.register_fake
def _(reward_w, reward_l, beta, label_smoothing):
    scalars = [reward_w.new_empty(()) for _ in range(2)]
    return *scalars, reward_w.new_empty(reward_w.shape), reward_l.new_empty(reward_l.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # no zeros, a launch each, for the outputs that nobody differentiates
    ctx.save_for_backward(output[2], output[3])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return None, None, None, None
    grad_w, grad_l = ctx.saved_tensors
    return grad_loss * grad_w, grad_loss * grad_l, None, None


_dpo_loss.register_autograd(_backward, setup_context=_setup_context)


def check_label_smoothing(op: str, label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"{op}: label_smoothing must be in [0, 0.5), got {label_smoothing}")


def dpo_loss(reward_w: Tensor, reward_l: Tensor, *, beta: float, label_smoothing: float = 0.0) -> PairwiseLoss:
    """-mean_i log sigmoid(beta/2 * (reward_w_i - reward_l_i)), label-smoothed.

    reward_w, reward_l: (N,) implicit rewards of winners and losers; half precision is upcast.
    beta: > 0, for rewards that are means over C*H*W (5000 in Diffusion-DPO's public launchers).
    label_smoothing: in [0, 0.5), the assumed share of flipped labels.

    Returns `PairwiseLoss(loss, effective_contrasts = 1, accuracy)`, fp32 (fp64 if a reward is fp64). NaN in a reward
    gives a NaN loss.
    Raises ValueError for an empty batch, shapes that differ, and settings out of bounds.
    Source: Diffusion-DPO, arXiv 2311.12908, equation 14.
    """
    op = "dpo_loss"
    check_rewards(op, reward_w, reward_l)
    check_positive(op, "beta", beta)
    if reward_w.shape != reward_l.shape:
        raise ValueError(f"{op}: reward_w has shape {tuple(reward_w.shape)}, reward_l has {tuple(reward_l.shape)}")
    check_label_smoothing(op, label_smoothing)
    dtype = accumulation_dtype(torch.promote_types(reward_w.dtype, reward_l.dtype))
    loss, accuracy, _, _ = _dpo_loss(reward_w.to(dtype), reward_l.to(dtype), float(beta), float(label_smoothing))
    return PairwiseLoss(loss, torch.ones_like(accuracy), accuracy.detach())
