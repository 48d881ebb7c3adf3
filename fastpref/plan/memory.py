"""Bytes on one GPU: what ZeRO divides among ranks, and what everyone holds.

They are the bytes of live tensors. On a CPU glibc keeps freed blocks below 32 MB for itself: a run of the bundled model
without recomputation has a peak RSS about 15 % above them unless MALLOC_MMAP_THRESHOLD_ is set. A run with
recomputation gives them back (:func:`fastpref.memory.give_back_freed_blocks`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastpref.config import Config
from fastpref.models.policy import master_dtype
from fastpref.plan.count import StepCount

RESERVE = 0.1  # of a device's memory, left free: prediction and measurement differ, and allocators waste
_BUCKET = 500_000_000  # values; DeepSpeed's default reduce_bucket_size
_LIVE = 1_000_000_000  # values; DeepSpeed's default stage3_max_live_parameters
_MIN_8BIT = 4096  # bitsandbytes keeps fp32 moments of smaller tensors
_BLOCK = 256  # values that share a scale in 8 bits


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank under a ZeRO stage; 0 is everything on every rank, as in one process."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def memory_of(config: Config, count: StepCount, stage: int, gpus: int, resident: int) -> Memory:
    """What one of ``gpus`` ranks needs (Rajbhandari et al., arXiv 1910.02054, section 5).

    DeepSpeed keeps a second fp32 copy of the trained weights, divided among the ranks, from stage 1 on.

    Args:
        resident: bytes that are there beside training: the process itself, frozen text encoders, VAE and scorer.
    """
    optimizer = optimizer_bytes(config, count.shapes)
    ema = count.trained if config.ema_decay is not None else 0
    weights = count.frozen + count.trained + ema
    gradients, activations = count.gradients, count.activations
    if stage == 0:
        gradients = 0 if config.step_in_backward else gradients
        together = count.peak - gradients  # they need not peak at the same time
        return Memory(0, weights, gradients, optimizer, max(together, 0), resident)
    bucket = min(_BUCKET, count.trained_values) * 4
    optimizer = math.ceil((optimizer + count.trained) / gpus)
    if stage == 1:
        return Memory(1, weights, gradients, optimizer, activations, resident + bucket)
    gradients = math.ceil(gradients / gpus)
    if stage == 2:  # its communication overlaps: two buckets
        return Memory(2, weights, gradients, optimizer, activations, resident + 2 * bucket)
    values = count.trained_values + count.frozen // 2
    gathered = min(weights, min(_LIVE, values) * math.ceil(weights / values))
    return Memory(3, math.ceil(weights / gpus), gradients, optimizer, activations, resident + bucket + gathered)


def optimizer_bytes(config: Config, shapes: list[torch.Size]) -> int:
    """Bytes of the state over trained tensors of these shapes."""
    wide = 8 if master_dtype(config) == torch.float64 else 4
    return sum(_state_bytes(config.optimizer, shape, wide) for shape in shapes)


def _state_bytes(optimizer: str, shape: torch.Size, wide: int) -> int:
    values = math.prod(shape)
    if optimizer == "adafactor":
        if len(shape) < 2:
            return values * wide + 4
        return (values // shape[-1] + values // shape[-2]) * wide + 4
    if optimizer == "adamw":
        return 2 * values * wide + 4
    moments = 1 if optimizer == "lion8bit" else 2
    if values < _MIN_8BIT:
        return moments * values * 4
    return moments * (values + 4 * math.ceil(values / _BLOCK))


def fits(needed: int, device: int) -> bool:
    """Whether so many bytes leave the reserve free."""
    return needed <= device * (1 - RESERVE)
