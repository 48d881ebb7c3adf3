"""What SDXL is told of a picture's size, in one place: training, scoring and rollout are told what sampling is."""

from __future__ import annotations

import torch


def target_time_ids(size: tuple[int, int], rows: int) -> torch.Tensor:
    """``(rows, 6)`` fp32: the time ids of a whole picture of ``size`` = (height, width) pixels.

    Original size, crop 0, target size: what diffusers' pipeline tells the UNet when it draws a picture of that size.
    """
    height, width = size
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(rows, 6)
