"""The low-rank linear layer by BLAS, on every device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..common.memory_format import rows_of


def _as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast changes no dtype; where it is off, switching it off would only take time."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _scaled(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """scale * x @ y, rounded once."""
    return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scale)  # beta 0: the first is not read


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(y (..., O), t = scale * x A^T (rows, r))."""
    with _as_given(x):
        rows = rows_of(x)
        t = _scaled(rows, lora_a.to(x.dtype).T, scale)
        y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        y.addmm_(t, lora_b.to(x.dtype).T)
        return y.view(*x.shape[:-1], weight.shape[0]), t


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    t: Tensor,
    scale: float,
    needs_x: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB), empty where not needed."""
    with _as_given(x):
        rows, grads = rows_of(x), rows_of(grad).contiguous()
        u = _scaled(grads, lora_b.to(x.dtype), scale)
        grad_x, grad_a, grad_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
        if needs_x:
            grad_x = (grads @ weight).addmm_(u, lora_a.to(x.dtype)).view(x.shape)
        if needs_lora:
            grad_a, grad_b = (u.T @ rows).to(lora_a.dtype), (grads.T @ t).to(lora_b.dtype)
        return grad_x, grad_a, grad_b
