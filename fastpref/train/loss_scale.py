"""The first loss scale of fp16, found on the first batches instead of by skipping them.

fp16 ends at 65504, and how large gradients are depends on method, beta and model. A scaler that starts too high skips
steps until it has come down, and what those steps were to learn is lost. So until the first update the gradient of
every objective is tried beforehand, and the scale is halved until that is finite with some headroom, which is for
batches whose gradients are larger. From then on the scaler's own rule holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from fastpref.config import Config
from fastpref.train.world import World

FIRST_SCALE = 65536.0
_HEADROOM = 16.0


def searches(config: Config) -> bool:
    """Whether a first scale has to be found, which differentiates a graph twice."""
    if config.precision == "fp16" and config.compile:
        torch._functorch.config.donated_buffer = False  # a compiled backward that reuses its inputs works once
    return config.precision == "fp16"


def bearable_scale(
    objective: torch.Tensor,
    parameters: Sequence[torch.nn.Parameter],
    scale: float,
    world: World,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """The largest of ``scale``, ``scale/2`` … 1 at which 16 times the gradient of ``objective`` is finite everywhere.

    Changes no gradient and keeps the graph. Returns ``scale`` itself where the objective is not finite or no scale
    helps: then the scale is not at fault. Waits for the device; every process has to call it equally often.

    Args:
        around: each differentiation happens inside one.
    """
    tried = scale
    while tried >= 1.0:
        with around():
            finite = _is_finite(objective * (tried * _HEADROOM), parameters)
        if not world.most(int(not finite and bool(torch.isfinite(objective)))):
            return tried
        tried /= 2
    return scale


def _is_finite(objective: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> bool:
    found = torch.autograd.grad(objective, list(parameters), retain_graph=True, allow_unused=True)
    return all(bool(torch.isfinite(gradient).all()) for gradient in found if gradient is not None)
