"""The implicit reward in torch.

Every step is an element-wise operation that IEEE 754 rounds in one way only, the sum is a fixed tree over C*H*W: a
row has the same bits whatever the batch, the chunk or the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import accumulation_dtype

_CHUNK = 1 << 17  # elements of a chunk; its few fp32 temporaries stay in the L2 cache


def _sum_rows(x: Tensor) -> Tensor:
    """Sum of the last dimension by halving; overwrites x."""
    length = x.shape[-1]
    while length > 1:
        half = length // 2
        x[..., :half] += x[..., half : 2 * half]
        if length % 2:
            x[..., 0] += x[..., length - 1]
        length = half
    return x[..., 0]


def _difference(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a - b in dtype, flattened to (rows, elements) in logical order."""
    upcast = a.to(dtype, memory_format=torch.contiguous_format, copy=True)
    return upcast.sub_(b.to(dtype)).flatten(1)


def forward(
    pred: Tensor, target: Tensor, ref_pred: Tensor | None, ref_error: Tensor | None, cross: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(reward (N,), error (N,), cross (N/2,) or (0,))."""
    dtype = accumulation_dtype(pred.dtype)
    rows, elements = pred.shape[0], pred[0].numel()
    reward = torch.empty(rows, dtype=dtype, device=pred.device)
    error = torch.empty_like(reward)
    step = max(1, _CHUNK // elements)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        delta = _difference(pred[chunk], target[chunk], dtype)
        if ref_pred is not None:
            # (r - t)^2 - (p - t)^2 as (r - p)(r - t + p - t): no cancellation between two large sums, and 0 when p = r
            total = _difference(ref_pred[chunk], target[chunk], dtype).add_(delta)
            reward[chunk] = _sum_rows(total.mul_(_difference(ref_pred[chunk], pred[chunk], dtype)))
        error[chunk] = _sum_rows(delta.mul_(delta))
    error /= elements
    if ref_pred is not None:
        reward /= elements
    else:
        reward = -error if ref_error is None else ref_error.to(dtype) - error
    return reward, error, _cross(pred, target, dtype) if cross else reward.new_empty(0)


def _cross(pred: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    pairs, elements = pred.shape[0] // 2, pred[0].numel()
    out = torch.empty(pairs, dtype=dtype, device=pred.device)
    step = max(1, _CHUNK // elements)
    for start in range(0, pairs, step):
        w = slice(start, min(start + step, pairs))
        loser = slice(pairs + w.start, pairs + w.stop)
        delta_w = _difference(pred[w], target[w], dtype)
        out[w] = _sum_rows(delta_w.mul_(_difference(pred[loser], target[loser], dtype)))
    return out.div_(elements)


def backward(grad: Tensor, pred: Tensor, target: Tensor) -> Tensor:
    """-2/(C*H*W) * (pred - target) * grad, contiguous, in pred's dtype."""
    dtype = accumulation_dtype(pred.dtype)
    rows, elements = pred.shape[0], pred[0].numel()
    scale = (grad.to(dtype) * (-2.0 / elements)).unsqueeze(1)
    out = torch.empty_like(pred, memory_format=torch.contiguous_format)
    flat = out.view(rows, elements)
    step = max(1, _CHUNK // elements)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        flat[chunk] = _difference(pred[chunk], target[chunk], dtype).mul_(scale[chunk])
    return out
