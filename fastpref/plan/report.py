"""The plan of a recipe: does it fit, on how many GPUs, at what cost, and what is the nearest that does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from rich.console import Group
from rich.table import Table

from fastpref.config import Config, parse_config
from fastpref.config_rules import SCORER_METHODS, STEPWISE_METHODS
from fastpref.errors import UserError
from fastpref.memory import resident_bytes
from fastpref.models.caption_length import BLOCKS
from fastpref.models.checkpoint import read_facts
from fastpref.models.loading import model_dir_of, read_part_json, unet_config, unet_source, vae_scale_factor
from fastpref.models.public import UNETS
from fastpref.models.recompute import MODES
from fastpref.models.weights import stored_values, tensor_facts
from fastpref.plan.cost import Batch, flops, store_line, traffic_bytes
from fastpref.plan.count import Shapes, StepCount, count_step
from fastpref.plan.devices import device_bytes
from fastpref.plan.memory import RESERVE, Memory, fits, memory_of
from fastpref.train.deepspeed_config import read_settings, zero_stage

_MOST_GPUS = 1024


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on ``gpus`` of a ``device``."""

    config: Config
    mode: str  # of gradient_checkpointing; with auto the first that fits, else the last
    gpus: int
    device: str
    shapes: Shapes
    count: StepCount
    batch: Batch
    memories: list[Memory]
    traffic: list[int]  # bytes sent by a rank in a step, under each of them
    flops: int  # of a step over all ranks
    store: str
    nearest: str = ""  # empty if the recipe fits as it is

    @property
    def by_mode(self) -> dict[str, Memory]:
        """The least that every mode of ``gradient_checkpointing`` needs, as :attr:`best`."""
        return {mode: _plan(with_mode(self.config, mode), self.gpus, self.device, self.shapes).best for mode in MODES}

    @property
    def best(self) -> Memory:
        """Of the least stage that fits; if none does, of the one that needs least."""
        device = device_bytes(self.device)
        return next((m for m in self.memories if fits(m, device)), min(self.memories, key=lambda m: m.total))


def make_plan(config: Config, gpus: int, device: str, family: str | None = None) -> Plan:
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
    shapes, limit = shapes_of(config, family), device_bytes(device)
    plan = _plan(config, gpus, device, shapes)
    if fits(plan.best, limit):
        return plan
    nearest = next((name for name, other in _nearby(plan) if fits(other.best, limit)), "nothing near it fits")
    return replace(plan, nearest=nearest)


def rank_bytes(config: Config, ranks: int) -> int:
    """What a run on ``ranks`` takes of the memory of one, as its recipe is: engine, ZeRO stage, model on disk."""
    batch = Batch.of(config, ranks)
    stage = zero_stage(config, read_settings(config)) if config.engine == "deepspeed" else 0
    return memory_of(config, _count(config, shapes_of(config), batch), stage, ranks, beside_bytes(config)).total


def with_mode(config: Config, mode: str) -> Config:
    """The recipe with another ``gradient_checkpointing``."""
    return config.model_copy(update={"gradient_checkpointing": mode})


def _count(config: Config, shapes: Shapes, batch: Batch) -> StepCount:
    unseen: dict[str, object] = {
        "compile": False,
        "cuda_graphs": False,
    }  # what the count does not depend on, or counts as eager
    if not config.step_in_backward:
        unseen["optimizer"] = "adamw"
    if config.attention in ("xformers", "flash"):
        unseen["attention"] = "sdpa"  # they keep the same, and are nothing for fake tensors
    seen = config.model_copy(update=unseen | {"name": "run", "output_dir": "runs"})
    sizes = (json.dumps(shapes.unet), shapes.latent, shapes.tokens, batch.micro)
    return _counted(seen.model_dump_json(), *sizes, batch.rounds > 1)


def _plan(config: Config, gpus: int, device: str, shapes: Shapes) -> Plan:
    if config.gradient_checkpointing == "auto":
        plans = (_plan(with_mode(config, mode), gpus, device, shapes) for mode in MODES)
        for plan in plans:
            if fits(plan.best, device_bytes(device)):
                break
        return replace(plan, config=config)
    batch = Batch.of(config, gpus)
    split = config if gpus == 1 else config.model_copy(update={"engine": "deepspeed"})
    count = _count(split, shapes, batch)
    resident = (_process_bytes(config) if device == "cpu" else 0) + beside_bytes(config)
    stages = (0,) if gpus == 1 else (1, 2, 3)
    memories = [memory_of(config, count, stage, gpus, resident) for stage in stages]
    traffic = [traffic_bytes(config, count, batch, stage, gpus) for stage in stages]
    values = shapes.latent[0] * shapes.latent[1] * shapes.latent[2]
    store = store_line(config, values, shapes.tokens * int(shapes.unet["cross_attention_dim"]))
    work, mode = flops(config, count, batch, gpus), config.gradient_checkpointing
    return Plan(config, mode, gpus, device, shapes, count, batch, memories, traffic, work, store)


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
    if config.accumulation == "keep_graphs":
        tries.insert(0, {"accumulation": "rewards_first"})
    if config.optimizer == "adamw":
        tries.append({"optimizer": "adamw8bit"})
    for change in tries:
        if all(settings[key] == value for key, value in change.items()) or not _allowed(settings | changes | change):
            continue
        changes |= change
        other = parse_config(settings | changes)
        yield _named(changes, plan.gpus), _plan(other, plan.gpus, plan.device, plan.shapes)
    gpus = 2 * plan.gpus
    while gpus <= min(_MOST_GPUS, config.batch_size) and not config.step_in_backward:
        other = parse_config(settings | changes)
        yield _named(changes, gpus), _plan(other, gpus, plan.device, plan.shapes)
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


def shapes_of(config: Config, family: str | None = None) -> Shapes:
    """Of the recipe's model; of ``family``'s public base model, if it is given and the model is not on disk."""
    if family is not None and not _here(config):
        return _public_shapes(config, family)
    if Path(config.model).is_file():  # its header says all, so nothing is converted for a plan
        return _public_shapes(config, read_facts(Path(config.model)).family)
    blocks = BLOCKS[config.max_caption_tokens]
    folder = model_dir_of(config)
    unet = unet_config(folder, config.unet)
    side = config.resolution // vae_scale_factor(folder)
    tokens = read_part_json(folder / "text_encoder" / "config.json").get("max_position_embeddings", 77)
    return Shapes(unet, (int(unet.get("in_channels", 4)), side, side), int(tokens) * blocks)


def _public_shapes(config: Config, family: str) -> Shapes:
    side = config.resolution // 8
    return Shapes(dict(UNETS[family]), (4, side, side), 77 * BLOCKS[config.max_caption_tokens])


def unet_values(config: Config) -> int:
    """Values in the weights of the recipe's UNet, of which headers are read at most."""
    if config.unet is None and Path(config.model).is_file():
        return read_facts(Path(config.model)).values["unet"]
    source = unet_source(model_dir_of(config), config.unet)
    return sum(shape.numel() for _, _, shape in tensor_facts(source)) if source.is_file() else stored_values(source)


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


def _here(config: Config) -> bool:
    return config.model == "emoji" or Path(config.model).exists()


def beside_bytes(config: Config) -> int:
    """Bytes of the models that a rollout keeps beside the UNet; an offline run needs none."""
    if config.method not in STEPWISE_METHODS or not _here(config):
        return 0
    wide = 4 if config.precision in ("fp32", "fp64") else 2
    folders = [Path(found) for found in (config.scorer, config.clip) if found is not None]
    if Path(config.model).is_file():
        values = read_facts(Path(config.model)).values
        own = sum(values.values()) - values["unet"]
    else:
        model = model_dir_of(config)
        own = sum(stored_values(model / name) for name in ("text_encoder", "text_encoder_2", "vae"))
    return wide * (own + sum(stored_values(folder) for folder in folders))


def render(plan: Plan) -> Group:
    """The plan for a terminal."""
    config, count, batch, limit = plan.config, plan.count, plan.batch, device_bytes(plan.device)
    table = Table("GB per GPU", *(_stage(memory.stage) for memory in plan.memories))
    for part in ("weights", "gradients", "optimizer", "activations", "buffers", "total"):
        table.add_row(part, *(f"{getattr(memory, part) / 1e9:.2f}" for memory in plan.memories))
    table.add_row("fits", *("yes" if fits(memory, limit) else "no" for memory in plan.memories))
    table.add_row("sent per step", *(f"{sent / 1e9:.2f}" for sent in plan.traffic))
    unit = "transitions" if config.method in STEPWISE_METHODS else "pairs"
    arithmetic = f"{batch.pairs} {unit} = {plan.gpus} GPUs x {batch.rounds} x {batch.micro} per forward"
    if batch.micro * batch.rounds * plan.gpus != batch.pairs:
        arithmetic += ", the last ones smaller"
    lines = [
        f"{config.method}, {count.trained_values:,} trained values of {count.trained / 1e9:.2f} GB, "
        f"{count.frozen / 1e9:.2f} GB frozen; {plan.device} has {limit / 1e9:.0f} GB, {RESERVE:.0%} of it kept free",
        f"batch: {arithmetic}",
        f"gradient_checkpointing: {_modes(plan)}",
        f"work: {plan.flops / 1e12:.2f} TFLOP a step" + _rollout(plan),
        f"store: {plan.store}",
    ]
    if config.method in STEPWISE_METHODS and not _here(config):
        lines.append("not counted, the model not being here: text encoders and VAE")
    verdict = "fits" if not plan.nearest else f"does not fit; nearest that does: {plan.nearest}"
    return Group(table, *lines, verdict)


def _modes(plan: Plan) -> str:
    needs = ", ".join(f"{mode} {memory.total / 1e9:.2f} GB" for mode, memory in plan.by_mode.items())
    return f"{needs}; {'auto takes' if plan.config.gradient_checkpointing == 'auto' else 'here'} {plan.mode}"


def _rollout(plan: Plan) -> str:
    found = plan.count.rollout_flops
    return f", {found / 1e12:.2f} TFLOP a UNet call over the candidates of a rollout batch" if found else ""


def _stage(stage: int) -> str:
    return "one process" if stage == 0 else f"ZeRO-{stage}"
