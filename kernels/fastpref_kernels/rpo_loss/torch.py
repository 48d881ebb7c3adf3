"""The similarity-weighted contrastive loss in torch, streamed over tiles of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..common.rows import share_won

_TILE = 1 << 19  # contrasts of a tile: 2 MB of fp32, of which about six are alive; rows enough for a fast matmul


def _inverse_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-12).reciprocal()


def rpo_loss(
    reward_w: Tensor,
    reward_l: Tensor,
    emb_w: Tensor | None,
    emb_l: Tensor | None,
    beta: float,
    temperature: float,
    weight: str,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row sums of omega * loss (M,), exp(entropy) (M,), and the derivatives of the sum of the former: (M,) and (N,).

    weight "inside" gives row sums of the loss of omega * u. The rows are split into `groups` equal blocks.
    """
    rw, rl = reward_w.view(groups, -1, 1), reward_l.view(groups, 1, -1)
    rows, columns = rw.shape[1], rl.shape[2]
    loss, effective, grad_w = (torch.empty_like(rw[..., 0]) for _ in range(3))
    grad_l = torch.zeros_like(rl[:, 0])
    row_step = min(rows, max(1, _TILE // columns))
    group_step = max(1, _TILE // (row_step * columns))
    if emb_w is None or emb_l is None or weight == "uniform":
        ew = el = scale_l = None
        effective.fill_(columns)
    else:
        ew = emb_w.reshape(groups, rows, -1)
        el = emb_l.reshape(groups, columns, -1).to(rw.dtype)
        scale_l = _inverse_norm(el).div_(temperature).unsqueeze(1)
    for first in range(0, groups, group_step):
        group = slice(first, first + group_step)
        for start in range(0, rows, row_step):
            tile = (group, slice(start, start + row_step))
            u = (rw[tile] - rl[group]) * (0.5 * beta)
            omega: Tensor | float = 1.0 / columns
            if ew is not None and el is not None and scale_l is not None:
                winners = ew[tile].to(rw.dtype)
                similarity = torch.matmul(winners * _inverse_norm(winners).unsqueeze(-1), el[group].mT).mul_(
                    scale_l[group]
                )
                log_omega = torch.log_softmax(similarity, dim=-1)
                omega = torch.exp(log_omega, out=similarity)
                effective[tile] = log_omega.mul_(omega).sum(-1).neg_().exp_()
            if weight == "inside":
                u *= omega
                loss[tile] = -logsigmoid(u).sum(-1)
            else:
                loss[tile] = -(logsigmoid(u).mul_(omega)).sum(-1)
            slope = u.neg_().sigmoid_().mul_(omega)
            grad_w[tile] = slope.sum(-1).mul_(-0.5 * beta)
            grad_l[group] += slope.sum(-2).mul_(0.5 * beta)
    return loss.flatten(), effective.flatten(), grad_w.flatten(), grad_l.flatten()


def accuracy(reward_w: Tensor, reward_l: Tensor) -> Tensor:
    """Share of pairs with reward_w > reward_l, a tie a half; of all contrasts if M != N, counted by sorting."""
    if reward_w.shape == reward_l.shape:
        return share_won(reward_w, reward_l)
    losers, winners = reward_l.sort().values, reward_w.contiguous()
    below, up_to = (torch.searchsorted(losers, winners, right=right) for right in (False, True))
    won = torch.where(reward_w.isnan(), 0, below + up_to).to(reward_w.dtype)
    return won.mean() / (2 * reward_l.shape[0])
