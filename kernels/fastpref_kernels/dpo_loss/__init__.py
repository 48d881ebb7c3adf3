"""The pairwise preference loss of Diffusion-DPO.

    u_i  = beta/2 * (reward_w_i - reward_l_i)
    loss = -mean_i [ (1 - s) * log sigmoid(u_i) + s * log sigmoid(-u_i) ]        s = label_smoothing

Shapes: reward_w, reward_l (N,) -> scalar, in fp32 (fp64 if a reward is fp64).
Bytes per pair: forward 16 (two reads; both derivatives written), backward 16. One launch of one
program: the mean has one order.
Source: Diffusion-DPO, arXiv 2311.12908, equation 14; label smoothing as in conservative DPO (Mitchell 2023)."""

# mypy: allow-incomplete-defs, allow-untyped-defs
from __future__ import annotations

from torch import Tensor, ones_like, promote_types

from ..common.checks import check_beta, check_label_smoothing, check_rewards
from ..common.dispatch import accumulation_dtype, use_triton
from ..common.operator import operator
from ..common.pairwise import PairwiseLoss, register_stored_gradients, times_beta, without_gradient
from ..common.rows import share_won
from .torch import dpo_loss as torch_path
from .triton import launch


@operator(
    "dpo_loss",
    "(Tensor reward_w, Tensor reward_l, float beta, float label_smoothing) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _dpo_loss(
    reward_w: Tensor, reward_l: Tensor, beta: float, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy, dL/dreward_w (N,), dL/dreward_l (N,))."""
    if use_triton(reward_w):
        return launch(reward_w, reward_l, beta, label_smoothing)
    losses, slope = torch_path(reward_w, reward_l, beta, label_smoothing)
    slope = slope / losses.shape[0]
    loss = losses.mean()
    return loss, ones_like(loss), share_won(reward_w, reward_l), slope, -slope


@_dpo_loss.register_fake
def _(reward_w, reward_l, beta, label_smoothing):
    scalars = [reward_w.new_empty(()) for _ in range(3)]
    return *scalars, reward_w.new_empty(reward_w.shape), reward_l.new_empty(reward_l.shape)


register_stored_gradients(_dpo_loss, first=3, n_inputs=4)


def dpo_loss(reward_w: Tensor, reward_l: Tensor, *, beta: float | Tensor, label_smoothing: float = 0.0) -> PairwiseLoss:
    """-mean_i log sigmoid(beta/2 * (reward_w_i - reward_l_i)), label-smoothed.

    reward_w, reward_l: (N,) implicit rewards of winners and losers; half precision is upcast.
    beta: > 0, for rewards that are means over C*H*W (5000 in Diffusion-DPO's public launchers). A number, or a scalar
        tensor, whose value is not checked and which multiplies the rewards before the op.
    label_smoothing: in [0, 0.5), the assumed share of flipped labels.

    Returns `PairwiseLoss(loss, effective_contrasts = 1, accuracy)`, fp32 (fp64 if a reward is fp64). NaN in a reward
    gives a NaN loss.
    Raises ValueError for an empty batch, shapes that differ, and settings out of bounds.
    Source: Diffusion-DPO, arXiv 2311.12908, equation 14.
    """
    op = "dpo_loss"
    check_rewards(op, reward_w, reward_l)
    check_beta(op, beta)
    if reward_w.shape != reward_l.shape:
        raise ValueError(f"{op}: reward_w has shape {tuple(reward_w.shape)}, reward_l has {tuple(reward_l.shape)}")
    check_label_smoothing(op, label_smoothing)
    dtype = accumulation_dtype(promote_types(reward_w.dtype, reward_l.dtype))
    *rewards, beta = times_beta(reward_w.to(dtype), reward_l.to(dtype), beta)
    loss, effective, accuracy, _, _ = _dpo_loss(*rewards, beta, float(label_smoothing))
    return PairwiseLoss(loss, without_gradient(effective), without_gradient(accuracy))
