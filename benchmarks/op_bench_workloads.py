"""The kernel tests' workloads at real sizes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "tests"))

from gpu.workloads import WORKLOADS, Workload

LATENTS = [(n, 4, side, side) for side in (128, 64) for n in (2, 8, 32, 128)]  # SDXL, SD1.5
SHAPES = {
    "rpo_loss": [(n, 256) for n in (64, 256, 1024, 4096, 16384)],
    "dpo_loss": [(n, 1) for n in (16, 128, 2048)],
    "group_norm_silu": [(2, 320, 128, 128), (2, 640, 64, 64), (2, 1280, 32, 32), (2, 320, 64, 64)],
    "geglu": [(8192, 5120), (2048, 10240), (8192, 2560)],
    "lora_linear": [(8192, 640, 640, 64), (2048, 1280, 1280, 64), (2048, 1280, 10240, 64)],
}


def all_sizes() -> list[tuple[Workload, tuple[int, ...]]]:
    """Every workload at every real size of its op."""
    return [(w, shape) for w in WORKLOADS.values() for shape in SHAPES.get(w.op, LATENTS)]


def text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
