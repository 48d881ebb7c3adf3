from __future__ import annotations

from torch import Tensor


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    grouped = x.double().reshape(x.shape[0], num_groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    variance = (grouped - mean).square().mean(-1, keepdim=True)
    z = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    by_channel = (-1, *[1] * (x.dim() - 2))
    if weight is not None:
        z = z * weight.double().view(by_channel)
    if bias is not None:
        z = z + bias.double().view(by_channel)
    return z * z.sigmoid()
