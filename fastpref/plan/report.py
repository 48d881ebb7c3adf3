"""The plan of a recipe: does it fit, on how many GPUs, at what cost, and what is the nearest that does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fastpref.config import Config, parse_config
from fastpref.config_rules import OFFLINE_METHODS, SCORER_METHODS, STEPWISE_METHODS
from fastpref.data.manifest import MANIFEST
from fastpref.errors import UserError
from fastpref.memory import resident_bytes
from fastpref.models.loading import Family, open_part
from fastpref.models.recompute import MODES
from fastpref.plan.cost import Batch, flops, store_line, traffic_bytes
from fastpref.plan.count import Shapes, StepCount, count_step
from fastpref.plan.devices import device_bytes
from fastpref.plan.memory import Memory, fits, memory_of
from fastpref.plan.models import Models, models_of
from fastpref.plan.phases import Need, Scoring, count_prepare, count_reference, count_scoring, round_bytes
from fastpref.train.deepspeed_config import read_settings, zero_stage

_MOST_GPUS = 1024


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on ``gpus`` of a ``device``."""

    config: Config
    mode: str  # of gradient_checkpointing; with auto the first that fits, else the last
    gpus: int
    device: str
    models: Models
    count: StepCount
    batch: Batch
    memories: list[Memory]
    scoring: Scoring | None  # spo and lpo
    preparing: dict[str, Need]  # of commands that come before training, each a process of its own
    not_counted: list[str]
    traffic: list[int]  # bytes sent by a rank in a step, under each of them
    flops: int  # of a step over all ranks
    store: str
    nearest: str = ""  # empty if the recipe fits as it is

    @property
    def by_mode(self) -> dict[str, int]:
        """Bytes of training with every mode of ``gradient_checkpointing``, under its :attr:`best`."""
        plans = {mode: _plan(with_mode(self.config, mode), self.gpus, self.device, self.models) for mode in MODES}
        return {mode: plan.peak(plan.best) for mode, plan in plans.items()}

    @property
    def best(self) -> Memory:
        """Of the least stage that fits; if none does, of the one that needs least."""
        device = device_bytes(self.device)
        return next((m for m in self.memories if fits(self.peak(m), device)), min(self.memories, key=self.peak))

    def peak(self, memory: Memory) -> int:
        """Bytes of training under one of ``memories``: in a step, or while it scores a rollout."""
        return _peak(memory, self.scoring)

    def scoring_total(self, memory: Memory) -> int:
        """Bytes while a rollout is scored."""
        assert self.scoring is not None
        return _scoring_total(memory, self.scoring)

    @property
    def fits(self) -> bool:
        """Whether every phase leaves the reserve free."""
        device = device_bytes(self.device)
        return all(fits(need, device) for need in (self.peak(self.best), *(n.total for n in self.preparing.values())))


def _peak(memory: Memory, scoring: Scoring | None) -> int:
    return memory.total if scoring is None else max(memory.total, _scoring_total(memory, scoring))


def _scoring_total(memory: Memory, scoring: Scoring) -> int:
    """No gradients, and none of a step's activations."""
    return memory.total - memory.gradients - memory.activations + scoring.activations


def make_plan(config: Config, gpus: int, device: str, family: Family | None = None) -> Plan:
    """Count a recipe.

    Args:
        device: a name of :mod:`fastpref.plan.devices`, or 'cpu' for this machine.
        family: 'sdxl' or 'sd15': plan with the public base model where the recipe's is not on disk.

    Raises:
        UserError: no model, an unknown device, a method that is not planned, or more ranks than pairs.
    """
    if config.method in SCORER_METHODS:
        raise UserError(f"method {config.method} is not planned", "method", "plan is for sft, dpo, rpo, spo and lpo")
    if gpus > config.batch_size:
        raise UserError(f"{gpus} GPUs but {config.batch_size} pairs in a batch", "--gpus", "raise batch_size")
    if gpus > 1 and config.step_in_backward:
        raise UserError("step_in_backward is for one process", "step_in_backward", "set it to false or --gpus to 1")
    device_bytes(device)  # refuses an unknown one
    plan = _plan(config, gpus, device, models_of(config, family))
    if plan.fits:
        return plan
    nearest = next((name for name, other in _nearby(plan) if other.fits), "nothing near it fits")
    return replace(plan, nearest=nearest)


def rank_bytes(config: Config, ranks: int, device: str = "cpu") -> int:
    """What a run on ``ranks`` takes of the memory of one, as its recipe is: engine, ZeRO stage, model on disk.

    Args:
        device: 'cpu' or 'cuda', on which dtypes depend.
    """
    batch, models = Batch.of(config, ranks), models_of(config)
    stage = zero_stage(config, read_settings(config)) if config.engine == "deepspeed" else 0
    scoring, beside = _scoring(config, models, device, ranks)
    return _peak(memory_of(config, _count(config, models.shapes, batch), stage, ranks, beside), scoring)


def with_mode(config: Config, mode: str) -> Config:
    """The recipe with another ``gradient_checkpointing``."""
    return config.model_copy(update={"gradient_checkpointing": mode})


def _count(config: Config, shapes: Shapes, batch: Batch) -> StepCount:
    # what the count does not depend on, or counts as eager
    unseen: dict[str, object] = {"compile": False, "cuda_graphs": False}
    if not config.step_in_backward:
        unseen["optimizer"] = "adamw"
    if config.attention in ("xformers", "flash"):
        unseen["attention"] = "sdpa"  # they keep the same, and are nothing for fake tensors
    seen = config.model_copy(update=unseen | {"name": "run", "output_dir": "runs"})
    sizes = (json.dumps(shapes.unet), shapes.latent, shapes.tokens, batch.micro)
    return _counted(seen.model_dump_json(), *sizes, batch.rounds > 1)


def _plan(config: Config, gpus: int, device: str, models: Models) -> Plan:
    if config.gradient_checkpointing == "auto":
        for mode in MODES:
            plan = _plan(with_mode(config, mode), gpus, device, models)
            if fits(plan.peak(plan.best), device_bytes(device)):
                break
        return replace(plan, config=config)
    batch, shapes = Batch.of(config, gpus), models.shapes
    count = _count(config if gpus == 1 else config.model_copy(update={"engine": "deepspeed"}), shapes, batch)
    process, kind = (_process_bytes(config), "cpu") if device == "cpu" else (0, "cuda")
    scoring, beside = _scoring(config, models, kind, gpus)
    preparing, not_counted = _preparing(config, models, kind, process)
    stages = (0,) if gpus == 1 else (1, 2, 3)
    memories = [memory_of(config, count, stage, gpus, process + beside) for stage in stages]
    values = math.prod(shapes.latent)
    return Plan(
        config=config,
        mode=config.gradient_checkpointing,
        gpus=gpus,
        device=device,
        models=models,
        count=count,
        batch=batch,
        memories=memories,
        scoring=scoring,
        preparing=preparing,
        not_counted=not_counted + ([] if scoring is None else scoring.not_counted),
        traffic=[traffic_bytes(config, count, batch, stage, gpus) for stage in stages],
        flops=flops(config, count, batch, gpus),
        store=store_line(config, values, shapes.tokens * int(shapes.unet["cross_attention_dim"])),
    )


def _scoring(config: Config, models: Models, device: str, ranks: int) -> tuple[Scoring | None, int]:
    """Of a rollout: its scoring, and bytes that are there beside training, models and a round's transitions."""
    if config.method not in STEPWISE_METHODS:
        return None, 0
    shapes, segments = models.shapes, models.segments
    found = open_part(lambda: count_scoring(config, models.parts, shapes, device, segments), Path(config.model))
    prompts = math.ceil(config.rollout_prompts / ranks)
    return found, found.resident + round_bytes(config, segments, shapes.latent, prompts)


def _preparing(config: Config, models: Models, device: str, process: int) -> tuple[dict[str, Need], list[str]]:
    """What has to run before training and is not done, as far as it can be seen."""
    needs: dict[str, Need] = {}
    not_counted: list[str] = []
    if config.method in OFFLINE_METHODS and not (Path(config.store) / MANIFEST).is_file():
        counted = open_part(lambda: count_prepare(config, models.parts, device), Path(config.model))
        needs["prepare"], not_counted = counted
    if config.reference == "ledger":
        needs["prepare --reference"] = open_part(lambda: count_reference(config, models.shapes), Path(config.model))
    return {name: need._replace(weights=need.weights + process) for name, need in needs.items()}, not_counted


@cache
def _counted(config: str, unet: str, latent: tuple[int, int, int], tokens: int, pairs: int, several: bool) -> StepCount:
    shapes = Shapes(json.loads(unet), latent, tokens)
    return count_step(Config.model_validate_json(config), shapes, pairs, several=several)


def _nearby(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Changes of the recipe, the least first: memory for time, then fewer bits, then more GPUs."""
    config, settings = plan.config, plan.config.model_dump()
    changes: dict[str, object] = {}
    tries: list[dict[str, object]] = [{"gradient_checkpointing": mode} for mode in _above(plan.mode)]
    tries.append({"micro_batch_size": 1})
    limit = device_bytes(plan.device)
    if plan.scoring is not None and not fits(plan.scoring_total(plan.best), limit):
        tries.insert(0, {"decode_batch_size": 1})
    if not all(fits(need.total, limit) for need in plan.preparing.values()):
        tries.insert(0, {"prepare_batch_size": 1})
    if config.accumulation == "keep_graphs":
        tries.insert(0, {"accumulation": "rewards_first"})
    if config.optimizer == "adamw":
        tries.append({"optimizer": "adamw8bit"})
    for change in tries:
        if all(settings[key] == value for key, value in change.items()) or not _allowed(settings | changes | change):
            continue
        changes |= change
        other = parse_config(settings | changes)
        yield _named(changes, plan.gpus), _plan(other, plan.gpus, plan.device, plan.models)
    gpus = 2 * plan.gpus
    while gpus <= min(_MOST_GPUS, config.batch_size) and not config.step_in_backward:
        other = parse_config(settings | changes)
        yield _named(changes, gpus), _plan(other, gpus, plan.device, plan.models)
        gpus *= 2


def _above(mode: str) -> tuple[str, ...]:
    """The modes that need less memory."""
    return MODES[MODES.index(mode) + 1 :]


def _allowed(settings: dict[str, object]) -> bool:
    try:
        parse_config(settings)
    except UserError:
        return False
    return True


def _named(changes: dict[str, object], gpus: int) -> str:
    parts = [f"{key}={str(value).lower()}" for key, value in changes.items()]
    return " ".join([*parts, f"on {gpus} GPU{'s' if gpus > 1 else ''}"])


def _process_bytes(config: Config) -> int:
    """Of this process, when it has imported what a training imports."""
    import pyarrow.parquet  # noqa: F401
    import transformers  # noqa: F401

    import fastpref.train.job

    if config.method in STEPWISE_METHODS:
        import fastpref.train.stepwise
    else:
        import fastpref.train.offline  # noqa: F401
    return resident_bytes()
