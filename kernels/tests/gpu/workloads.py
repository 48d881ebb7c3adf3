"""Every op at any size, beside eager torch that computes the same: for tests on a GPU, byte counts and benchmarks."""

from __future__ import annotations

import torch
from cases import Workload, workloads
from cases.case import Inputs
from torch import Tensor

__all__ = ["WORKLOADS", "Workload", "gradients", "leaves"]

WORKLOADS = workloads()


def gradients(outputs: tuple[Tensor, ...], inputs: Inputs, wrt: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Of the outputs, each weighted with fixed pseudo-random numbers of its shape."""
    weights = []
    for x in outputs:
        wave = torch.sin(torch.arange(x.numel(), device=x.device, dtype=torch.float64) * 12.9898).view(x.shape)
        weights.append(wave.to(x.dtype) if x.dim() else torch.ones_like(x))
    return torch.autograd.grad(outputs, [inputs[name] for name in wrt], weights)


def leaves(inputs: Inputs, wrt: tuple[str, ...], dtype: torch.dtype | None = None) -> Inputs:
    """A copy whose `wrt` require gradients; floating tensors in `dtype` if one is given."""
    fresh = {}
    for name, x in inputs.items():
        x = x.detach().clone()
        if dtype is not None and x.dtype.is_floating_point:
            x = x.to(dtype)
        fresh[name] = x.requires_grad_(name in wrt)
    return fresh
