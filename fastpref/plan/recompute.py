"""Which ``gradient_checkpointing`` a run takes where its recipe leaves it open: the fastest that fits."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch.utils._pytree import tree_leaves

from fastpref.config_rules import SCORER_METHODS, STEPWISE_METHODS
from fastpref.errors import UserError
from fastpref.memory import free_bytes, total_bytes
from fastpref.models.loading import open_part
from fastpref.models.recompute import MODES
from fastpref.plan.cost import Batch
from fastpref.plan.memory import RESERVE
from fastpref.plan.models import beside_bytes, models_of, unet_values
from fastpref.plan.phases import round_bytes
from fastpref.plan.report import rank_bytes, with_mode

if TYPE_CHECKING:
    import torch

    from fastpref.config import Config
    from fastpref.train.world import World

_WIDTHS = (320, 640, 1280, 1280)  # diffusers' default, SD1.5's


class Choice(NamedTuple):
    """A mode, and the line that says why; empty if there was nothing to choose."""

    mode: str
    line: str = ""


def resolve_recomputation(config: Config, device: torch.device, world: World) -> Choice:
    """The mode of this run, on all ranks the same.

    Rank 0 counts. What has to fit is the least that is free on any rank's device, but for what ``plan`` keeps free. A
    recipe that cannot be counted recomputes nothing.
    """
    if config.gradient_checkpointing != "auto":
        return Choice(config.gradient_checkpointing)
    if config.method in SCORER_METHODS:
        return Choice(MODES[0])
    free = free_bytes(device)
    if device.type == "cpu":  # the ranks of a machine share it
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    free = -world.most(-free)
    choice = tuple(choose(config, world.size, free, total_bytes(device), device.type)) if world.is_main else ()
    return Choice(*world.from_main(choice))


def choose(config: Config, ranks: int, free: int, total: int, device: str = "cpu") -> Choice:
    """The first mode whose prediction leaves a share of ``total`` bytes free; if none does, the last."""
    limit, needs = free - RESERVE * total, dict[str, int]()
    try:  # open_part: what is wrong with the model's files is said in one line
        bound = open_part(lambda: bytes_at_most(config, ranks), Path(config.model))
        if bound <= limit:
            return Choice(MODES[0], f"gradient_checkpointing: {MODES[0]} (at most {_of(bound, free)})")
        for mode in MODES:
            needs[mode] = rank_bytes(with_mode(config, mode), ranks, device)
            if needs[mode] <= limit:
                break
    except UserError as error:  # a fault of the recipe, which whoever opens it says, or of the counting
        return Choice(MODES[0], f"gradient_checkpointing: {MODES[0]} (not predicted: {error})")
    mode, need = needs.popitem()
    said = f"predicted {_of(need, free)}"
    if need > limit:
        said += ", too much: see fastpref plan"
    if needs:
        said += "; " + ", ".join(f"{other} needs {_gigabytes(needs[other])}" for other in needs)
    return Choice(mode, f"gradient_checkpointing: {mode} ({said})")


def _of(need: int, free: int) -> str:
    return f"{_gigabytes(need)} of {_gigabytes(free)} GB free"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g}" if size < 999.5e9 else f"{size / 1e9:.0f}"


def bytes_at_most(config: Config, ranks: int) -> int:
    """More than any run of the recipe needs without recomputation: arithmetic alone, where counting takes seconds.

    A residual block keeps at most 12 tensors of the widest level beside it, a transformer block 34 of its own width
    and 8 of the prompt's length; all may be there in two dtypes. Scoring has no gradients: a VAE's decoder holds fewer
    than 6 tensors of twice its first width.
    """
    models, wide = models_of(config), 8 if config.precision == "fp64" else 4
    shapes = models.shapes
    widths = [int(width) for width in shapes.unet.get("block_out_channels", _WIDTHS)]
    layers = max(int(n) for n in tree_leaves(shapes.unet.get("transformer_layers_per_block", 1)))
    blocks = 2 * max(int(n) for n in tree_leaves(shapes.unet.get("layers_per_block", 2))) + 3  # down, up, middle
    row, (_, height, width) = 0, shapes.latent
    for level, own in enumerate(widths):
        positions = math.ceil(height / 2**level) * math.ceil(width / 2**level)
        kept = positions * (12 * max(widths[max(level - 1, 0) : level + 2]) + 34 * layers * own)
        row += 2 * wide * blocks * (kept + 8 * layers * own * shapes.tokens)
    guided = 2 if config.method in STEPWISE_METHODS and config.guidance_scale != 1.0 else 1
    rows = guided * max(2 * Batch.of(config, ranks).micro, config.rollout_batch_size * config.candidates)
    scored = 0
    if config.method in STEPWISE_METHODS:
        decoded = 12 * wide * int(models.parts.vae["block_out_channels"][0]) * config.resolution**2
        pools = round_bytes(config, models.segments, shapes.latent, config.rollout_prompts)
        scored = config.decode_batch_size * decoded + pools
    # of a weight: itself, a copy, its gradient, two moments, their average
    return rows * row + scored + 6 * wide * unet_values(config) + beside_bytes(config)
