"""Steps with and without CUDA graphs, as tests on the stand-in GPU and on a real one run them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fastpref.config import Config
from fastpref.train.job import TrainJob
from fastpref.train.reference import prepare_reference
from fastpref.train.trainer import PolicyTrainer
from fastpref.watch import Watch

WAITING = ("elif bool(finite)", "self.optimizer.step()")  # Adafactor
STEPS = 4  # plain, recorded, replayed twice
STEPWISE = [
    *("sample_steps=6", "plain_steps=2", "candidates=2", "rollout_prompts=2", "score_threshold=0"),
    "micro_batch_size=1",
]
METHODS = {
    "dpo, bf16": ["method=dpo", "safeguard=0.9", "ema_decay=0.9", "gradient_checkpointing=true", "precision=bf16"],
    "rpo, rewards first, fp16": ["method=rpo", "micro_batch_size=1", "group_size=2", "precision=fp16"],
    "rpo, all graphs, bf16": ["method=rpo", "micro_batch_size=1", "accumulation=keep_graphs", "precision=bf16"],
    "rpo, full, a copy as reference": ["method=rpo", "train=full", "reference=copy", "precision=bf16"],
    "spo, bf16": ["method=spo", "precision=bf16", *STEPWISE],
    "rpo, ledger, adafactor": ["method=rpo", "reference=ledger", "max_grad_norm=null", "optimizer=adafactor"],
}


def trained(
    config: Config, run_dir: Path, watched: Callable[[], AbstractContextManager[Any]]
) -> tuple[list[dict[str, Any]], list[torch.Tensor], PolicyTrainer]:
    """Metrics, weights and trainer after STEPS steps; the last records nothing new.

    Args:
        watched: is around the last step, to see that it waits for nothing.
    """
    if config.reference == "ledger":
        prepare_reference(config, progress=False)
    trainer = TrainJob.open(config).trainer
    assert isinstance(trainer, PolicyTrainer)
    run_dir.mkdir()
    trainer.begin(run_dir, Watch())
    launched = [trainer.launch(step) for step in range(STEPS - 1)]
    known = _recorded(trainer)
    with watched():
        launched.append(trainer.launch(STEPS - 1))
    assert _recorded(trainer) == known
    metrics = [found() for found in launched]
    weights = [parameter.detach().cpu() for parameter in trainer.policy.trainable.values()]
    trainer.close()
    return metrics, weights, trainer


def _recorded(trainer: PolicyTrainer) -> set[Any]:
    works = trainer.graphs._works.values() if trainer.graphs is not None else ()
    return {(work.forward, work.backward) for shapes in works for work in shapes.values()}
