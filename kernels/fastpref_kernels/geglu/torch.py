"""GEGLU by torch's gelu and its gradient, some rows at a time; half types are computed in fp32 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dispatch import accumulation_dtype
from ..common.memory_format import rows_of

_CHUNK = 1 << 18  # elements of out in a chunk: its temporaries stay in the cache and in the allocator's hands


def forward(hidden: Tensor) -> Tensor:
    columns = hidden.shape[-1] // 2
    out = hidden.new_empty(*hidden.shape[:-1], columns)
    dtype = accumulation_dtype(hidden.dtype)
    source, target = rows_of(hidden), rows_of(out)
    step = max(1, _CHUNK // columns)
    for start in range(0, source.shape[0], step):
        rows = slice(start, start + step)
        value, gate = source[rows].to(dtype).chunk(2, -1)
        if dtype == hidden.dtype:
            torch.ops.aten.gelu.out(gate, out=target[rows]).mul_(value)  # nothing to allocate
        else:
            torch.mul(torch.nn.functional.gelu(gate), value, out=target[rows])
    return out


def backward(grad: Tensor, hidden: Tensor) -> Tensor:
    columns = grad.shape[-1]
    grad_hidden = hidden.new_empty(hidden.shape)
    dtype = accumulation_dtype(hidden.dtype)
    grads, source, target = rows_of(grad), rows_of(hidden), rows_of(grad_hidden)
    step = max(1, _CHUNK // columns)
    for start in range(0, source.shape[0], step):
        rows = slice(start, start + step)
        value, gate = source[rows].to(dtype).chunk(2, -1)
        g = grads[rows].to(dtype)
        grad_value, grad_gate = target[rows].chunk(2, -1)
        torch.mul(torch.nn.functional.gelu(gate), g, out=grad_value)
        if dtype == hidden.dtype:
            torch.ops.aten.gelu_backward.grad_input(g * value, gate, grad_input=grad_gate)
        else:
            grad_gate.copy_(torch.ops.aten.gelu_backward(g * value, gate))
    return grad_hidden
