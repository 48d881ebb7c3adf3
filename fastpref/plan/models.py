"""The models of a recipe as a plan sees them: configurations and file headers, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastpref.config import Config
from fastpref.config_rules import STEPWISE_METHODS
from fastpref.models.caption_length import BLOCKS
from fastpref.models.checkpoint import read_facts
from fastpref.models.loading import Family, model_dir_of, model_family, unet_config, unet_source, vae_scale_factor
from fastpref.models.public import UNETS
from fastpref.models.weights import stored_values, tensor_facts
from fastpref.plan.count import Shapes
from fastpref.plan.phases import Parts
from fastpref.train.inputs import open_pool_sampler, open_schedule


@dataclass(frozen=True)
class Models:
    """What is planned with."""

    shapes: Shapes
    parts: Parts
    segments: int  # of a rollout, at most


def models_of(config: Config, family: Family | None = None) -> Models:
    """Of the recipe; with ``family``'s public base model, if it is given and the recipe's is not on disk."""
    steps = (config.sample_steps - config.plain_steps) // (config.inner_steps + 1)
    if family is not None and not on_disk(config):
        return Models(_public_shapes(config, family), Parts.public(family), steps)
    if Path(config.model).is_file():  # its header says all, so nothing is converted for a plan
        own = read_facts(Path(config.model)).family
        return Models(_public_shapes(config, own), Parts.public(own), steps)
    folder = model_dir_of(config)
    unet, parts = unet_config(folder, config.unet), Parts.of_folder(folder, model_family(folder))
    side = config.resolution // vae_scale_factor(folder)
    tokens = int(parts.text_encoders[0].get("max_position_embeddings", 77)) * BLOCKS[config.max_caption_tokens]
    shapes = Shapes(unet, (int(unet.get("in_channels", 4)), side, side), tokens)
    if config.method in STEPWISE_METHODS:
        steps = len(open_pool_sampler(config, folder, open_schedule(config, folder)).segments)
    return Models(shapes, parts, steps)


def _public_shapes(config: Config, family: Family) -> Shapes:
    side = config.resolution // 8
    return Shapes(dict(UNETS[family]), (4, side, side), 77 * BLOCKS[config.max_caption_tokens])


def on_disk(config: Config) -> bool:
    """Whether the recipe's model is here."""
    return config.model == "emoji" or Path(config.model).exists()


def unet_values(config: Config) -> int:
    """Values in the weights of the recipe's UNet, of which headers are read at most."""
    if config.unet is None and Path(config.model).is_file():
        return read_facts(Path(config.model)).values["unet"]
    source = unet_source(model_dir_of(config), config.unet)
    return sum(shape.numel() for _, _, shape in tensor_facts(source)) if source.is_file() else stored_values(source)


def beside_bytes(config: Config) -> int:
    """Bytes of the models that a rollout keeps beside the UNet; an offline run needs none."""
    if config.method not in STEPWISE_METHODS or not on_disk(config):
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
