"""The step-wise preference loss in torch, on any device; a pair's ratios have the same bits in any batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..common.dispatch import accumulation_dtype
from ..common.rows import row_chunks, share_won, sum_rows
from ..common.steps import CHUNK, columns, empty_rows_like, guided


def _parts(n_rows: int, n_pairs: int, n_elements: int) -> Iterator[tuple[slice, slice, tuple[int, ...]]]:
    """(rows of the predictions, their pairs, sides: 0 the winner, 1 the loser), chunk by chunk."""
    shared = n_rows == n_pairs
    for first, sides in [(0, (0, 1))] if shared else [(0, (0,)), (n_pairs, (1,))]:
        for pairs in row_chunks(n_pairs, n_elements, CHUNK):
            yield slice(first + pairs.start, first + pairs.stop), pairs, sides


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def forward(
    predictions: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    latents: tuple[Tensor, Tensor, Tensor],
    coefficients: Tensor,
    guidance_scale: float,
    beta: float | Tensor,
    low: float,
    high: float,
) -> tuple[Tensor, ...]:
    """(loss, ratio_w (B,), ratio_l (B,), clipped share, accuracy, slopes (2, B)); bounds are of the log-ratio."""
    cond, uncond, ref_cond, ref_uncond = predictions
    x_t, *ends = latents
    dtype = accumulation_dtype(cond.dtype)
    n_rows, n_pairs, n_elements = cond.shape[0], ends[0].shape[0], cond[0].numel()
    _, _, drift, c, std = columns(coefficients, dtype)
    log_ratio = torch.empty(2, n_pairs, dtype=dtype, device=cond.device)
    for rows, pairs, sides in _parts(n_rows, n_pairs, n_elements):
        # the difference branch by branch: exactly 0 where the policy equals the reference
        shift = cond[rows].to(dtype).sub(ref_cond[rows].to(dtype)).flatten(1)
        if uncond is not None and ref_uncond is not None:
            base = uncond[rows].to(dtype).sub(ref_uncond[rows].to(dtype)).flatten(1)
            shift = shift.sub_(base).mul_(guidance_scale).add_(base)
        shift.mul_(c[pairs])
        pred = guided(cond[rows], _rows(uncond, rows), guidance_scale, dtype)
        x = x_t[rows].to(dtype).flatten(1)
        move = x.mul(drift[pairs]).add_(pred.mul_(c[pairs]))
        scale = 0.5 / (std[pairs] * std[pairs])
        for side in sides:
            distance = ends[side][pairs].to(dtype).flatten(1).sub(x).sub_(move)
            total = sum_rows(distance.mul_(2.0).add_(shift).mul_(shift))
            log_ratio[side, pairs] = total * scale[:, 0] / n_elements
    return _pair_loss(log_ratio, beta, low, high)


def _pair_loss(log_ratio: Tensor, beta: float | Tensor, low: float, high: float) -> tuple[Tensor, ...]:
    outside = (log_ratio < low) | (log_ratio > high)
    kept = log_ratio.clamp(low, high)
    u = beta * (kept[0] - kept[1])
    slope = torch.sigmoid(-u) * (beta / u.shape[0])
    slopes = torch.where(outside, 0.0, torch.stack([-slope, slope]))
    ratio_w, ratio_l = log_ratio.exp().unbind()
    return (
        -torch.nn.functional.logsigmoid(u).mean(),
        ratio_w.clone(),  # an output of a custom op may not be a view of another
        ratio_l.clone(),
        outside.to(u.dtype).mean(),
        share_won(log_ratio[0], log_ratio[1]),
        slopes,
    )


def backward(
    grad: Tensor,
    slopes: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    latents: tuple[Tensor, Tensor, Tensor],
    coefficients: Tensor,
    guidance_scale: float,
) -> list[Tensor]:
    """Gradients of eps_cond and, unless it is None, eps_uncond, in their memory order."""
    x_t, *ends = latents
    dtype = accumulation_dtype(cond.dtype)
    n_rows, n_pairs, n_elements = cond.shape[0], slopes.shape[1], cond[0].numel()
    _, _, drift, c, std = columns(coefficients, dtype)
    weights = slopes.unsqueeze(2) * (grad.to(dtype) * c / (std * std) / n_elements)
    places = [empty_rows_like(x) for x in (cond, uncond) if x is not None]
    scales = (guidance_scale, 1.0 - guidance_scale) if len(places) == 2 else (1.0,)
    for rows, pairs, sides in _parts(n_rows, n_pairs, n_elements):
        pred = guided(cond[rows], _rows(uncond, rows), guidance_scale, dtype)
        x = x_t[rows].to(dtype).flatten(1)
        move = x.mul(drift[pairs]).add_(pred.mul_(c[pairs]))
        total = torch.zeros_like(move)
        for side in sides:
            distance = ends[side][pairs].to(dtype).flatten(1).sub(x).sub_(move)
            total.add_(distance.mul_(weights[side, pairs]))
        for place, scale in zip(places, scales, strict=True):
            place[rows] = total.mul(scale).view_as(place[rows])
    return places
