"""The pairwise preference loss of Diffusion-DPO.

    u_i  = beta/2 * (reward_w_i - reward_l_i)
    loss = -mean_i [ (1 - s) * log sigmoid(u_i) + s * log sigmoid(-u_i) ]        s = label_smoothing

Shapes: reward_w, reward_l (N,) -> scalar, in fp32 (fp64 if a reward is fp64).
Bytes per pair: forward 16 (two reads, the loss and its derivative), backward 12.
Source: Diffusion-DPO, arXiv 2311.12908, equation 14; label smoothing as in conservative DPO (Mitchell 2023)."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_positive, check_rewards
from ._dispatch import accumulation_dtype, jit, tl, use_triton
from .cpu.dpo_loss import dpo_loss as torch_path

_BLOCK = 256


class PairwiseLoss(NamedTuple):
    """What `dpo_loss` and `rpo_loss` return, three scalars.

    loss: the only one that back-propagates, to the rewards.
    effective_contrasts: mean over rows of exp(entropy of the row's weights).
    accuracy: share of pairs with reward_w > reward_l.
    """

    loss: Tensor
    effective_contrasts: Tensor
    accuracy: Tensor


@jit
def log_sigmoid_and_slope(u):
    """(log sigmoid(u), sigmoid(-u)) without overflow; the second is the derivative of the first."""
    e = tl.exp(-tl.abs(u))
    return tl.minimum(u, 0.0) - tl.log(1.0 + e), tl.where(u >= 0.0, e, 1.0) / (1.0 + e)


@jit
def _dpo_loss_kernel(
    reward_w_ptr, reward_l_ptr, loss_ptr, slope_ptr, n_pairs, beta, label_smoothing, BLOCK_SIZE: tl.constexpr
):
    """Loss of each pair and its derivative with respect to reward_w."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = i < n_pairs
    reward_w = tl.load(reward_w_ptr + i, mask=mask, other=0.0)
    reward_l = tl.load(reward_l_ptr + i, mask=mask, other=0.0)
    u = (reward_w - reward_l) * (0.5 * beta)
    kept, kept_slope = log_sigmoid_and_slope(u)
    flipped, flipped_slope = log_sigmoid_and_slope(-u)
    tl.store(loss_ptr + i, -(1.0 - label_smoothing) * kept - label_smoothing * flipped, mask=mask)
    slope = -(1.0 - label_smoothing) * kept_slope + label_smoothing * flipped_slope
    tl.store(slope_ptr + i, slope * (0.5 * beta), mask=mask)


def _launch(reward_w: Tensor, reward_l: Tensor, beta: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
    reward_w, reward_l = reward_w.contiguous(), reward_l.contiguous()
    n_pairs = reward_w.shape[0]
    loss, slope = torch.empty_like(reward_w), torch.empty_like(reward_w)
    grid = (-(-n_pairs // _BLOCK),)
    _dpo_loss_kernel[grid](reward_w, reward_l, loss, slope, n_pairs, beta, label_smoothing, BLOCK_SIZE=_BLOCK)
    return loss, slope


@torch.library.custom_op(
    "fastpref_kernels::dpo_loss",
    mutates_args=(),
    schema="(Tensor reward_w, Tensor reward_l, float beta, float label_smoothing) -> (Tensor, Tensor, Tensor)",
)
def _dpo_loss(reward_w: Tensor, reward_l: Tensor, beta: float, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, accuracy, derivative of the loss with respect to reward_w (N,))."""
    path = _launch if use_triton(reward_w) else torch_path
    loss, slope = path(reward_w, reward_l, beta, label_smoothing)
    accuracy = (reward_w > reward_l).to(loss.dtype).mean()
    return loss.mean(), accuracy, slope / loss.shape[0]


@_dpo_loss.register_fake
def _(reward_w, reward_l, beta, label_smoothing):
    return reward_w.new_empty(()), reward_w.new_empty(()), torch.empty_like(reward_w)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (slope,) = ctx.saved_tensors
    grad_w = grad_loss * slope
    return grad_w, -grad_w, None, None


_dpo_loss.register_autograd(_backward, setup_context=_setup_context)


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
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"{op}: label_smoothing must be in [0, 0.5), got {label_smoothing}")
    dtype = accumulation_dtype(torch.promote_types(reward_w.dtype, reward_l.dtype))
    loss, accuracy, _ = _dpo_loss(reward_w.to(dtype), reward_l.to(dtype), float(beta), float(label_smoothing))
    return PairwiseLoss(loss, torch.ones_like(accuracy), accuracy.detach())
