from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize


def rpo_loss(
    reward_w: Tensor,
    reward_l: Tensor,
    emb_w: Tensor,
    emb_l: Tensor,
    beta: float,
    temperature: float,
    weight: str = "outside",
    group_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, effective contrasts, accuracy), a group at a time with its whole contrast matrix."""
    rows, columns = group_size or len(reward_w), group_size or len(reward_l)
    losses, effective, margins = [], [], []
    for g in range(len(reward_w) // rows):
        i, j = slice(g * rows, (g + 1) * rows), slice(g * columns, (g + 1) * columns)
        contrast = reward_w[i].double()[:, None] - reward_l[j].double()[None, :]
        u = beta / 2 * contrast
        if weight == "uniform":
            omega = torch.full_like(u, 1 / columns)
        else:
            cosine = normalize(emb_w[i].double(), eps=1e-12) @ normalize(emb_l[j].double(), eps=1e-12).T
            omega = torch.softmax(cosine / temperature, dim=1)
        if weight == "inside":
            losses.append(-logsigmoid(omega * u).flatten())
        else:
            losses.append(-(omega * logsigmoid(u)).sum(1))
        effective.append(torch.special.entr(omega).sum(1).exp())
        margins.append(contrast.diagonal() if rows == columns else contrast.flatten())
    return torch.cat(losses).mean(), torch.cat(effective).mean(), (1 + torch.cat(margins).sign()).mean() / 2
