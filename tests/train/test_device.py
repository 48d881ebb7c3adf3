"""Steps of every method on a device that is not the CPU: see ``stand_in_gpu``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from stand_in_gpu import CUDA, StandInGpu

from fastpref.config import Config
from fastpref.models.loading import resolve_model_dir
from fastpref.train.job import _open_trainer
from fastpref.train.world import World

MakeConfig = Callable[..., Config]
OFFLINE = {
    "sft": ["method=sft"],
    "dpo": ["method=dpo", "safeguard=0.9", "ema_decay=0.9"],
    "dpo, micro-batches": ["method=dpo", "micro_batch_size=2", "caption_dropout=0.5"],
    "step in backward": ["method=dpo", "train=full", "step_in_backward=true"],
}


@pytest.mark.parametrize("name", OFFLINE)
def test_steps(sdxl_config: MakeConfig, name: str) -> None:
    config = sdxl_config(*OFFLINE[name], "batch_size=4")
    with StandInGpu() as gpu:
        trainer = _open_trainer(config, resolve_model_dir(config.model), CUDA, World())
        gpu.waits.clear()
        launched = [trainer.launch(step) for step in range(2)]
        assert not gpu.waits
        print([x() for x in launched])
