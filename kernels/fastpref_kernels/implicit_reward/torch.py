"""The implicit reward in torch.

Every step is an element-wise operation that IEEE 754 rounds in one way only, the sum is a fixed tree over C*H*W: a
row has the same bits whatever the batch, the chunk or the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import accumulation_dtype
from ..common.rows import row_chunks, sum_rows
from ..keyed_noise.torch import keyed_noise
from ..keyed_noise.torch import rows as as_rows
from .targets import Source

_CHUNK = 1 << 17  # elements of a chunk; its few fp32 temporaries stay in the L2 cache


def _difference(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a - b in dtype, flattened to (rows, elements) in logical order."""
    upcast = a.to(dtype, memory_format=torch.contiguous_format, copy=True)
    return upcast.sub_(b.to(dtype)).flatten(1)


def _target(source: Source, rows: slice, like: Tensor) -> Tensor:
    """The target of some rows, recomputed from their keys if it is keyed."""
    if source.keys is None:
        assert source.tensor is not None
        return source.tensor[rows]
    dtype = accumulation_dtype(like.dtype)
    noise = keyed_noise(source.keys[rows], like.shape[1:], torch.float32).to(dtype)
    if source.tensor is None or source.p is None or source.q is None:
        return noise
    p, q = as_rows(source.p[rows], like), as_rows(source.q[rows], like)
    return noise.mul_(p).add_(source.tensor[rows].to(dtype) * q)


def forward(
    pred: Tensor, source: Source, ref_pred: Tensor | None, ref_error: Tensor | None, cross: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(reward (N,), error (N,), cross (N/2,) or (0,))."""
    dtype = accumulation_dtype(pred.dtype)
    rows, elements = pred.shape[0], pred[0].numel()
    reward = torch.empty(rows, dtype=dtype, device=pred.device)
    error = torch.empty_like(reward)
    inner = reward.new_empty(rows // 2 if cross else 0)

    def delta_of(chunk: slice) -> Tensor:
        """pred - target of a chunk, whose reward and error it also fills in."""
        target = _target(source, chunk, pred)
        delta = _difference(pred[chunk], target, dtype)
        if ref_pred is not None:
            # (r - t)^2 - (p - t)^2 as (r - p)(r - t + p - t): no cancellation between two large sums, and 0 when p = r
            total = _difference(ref_pred[chunk], target, dtype).add_(delta)
            reward[chunk] = sum_rows(total.mul_(_difference(ref_pred[chunk], pred[chunk], dtype)))
        error[chunk] = sum_rows(delta * delta)
        return delta

    for chunk in row_chunks(rows // 2 if cross else rows, elements, _CHUNK):
        delta = delta_of(chunk)
        if cross:
            delta_l = delta_of(slice(rows // 2 + chunk.start, rows // 2 + chunk.stop))
            inner[chunk] = sum_rows(delta.mul_(delta_l))
    error /= elements
    if ref_pred is not None:
        reward /= elements
    else:
        reward = -error if ref_error is None else ref_error.to(dtype) - error
    return reward, error, inner.div_(elements)


def backward(grad: Tensor, pred: Tensor, source: Source) -> Tensor:
    """-2/(C*H*W) * (pred - target) * grad in pred's dtype and memory order."""
    dtype = accumulation_dtype(pred.dtype)
    rows, elements = pred.shape[0], pred[0].numel()
    scale = (grad.to(dtype) * (-2.0 / elements)).unsqueeze(1)
    out = torch.empty_like(pred)
    for chunk in row_chunks(rows, elements, _CHUNK):
        delta = _difference(pred[chunk], _target(source, chunk, pred), dtype)
        out[chunk] = delta.mul_(scale[chunk]).view(pred[chunk].shape)
    return out
