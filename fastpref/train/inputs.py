"""What a method that trains on a prepared store reads, opened and checked against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpref.config import Config
from fastpref.data.records import read_captions
from fastpref.data.sampling import Sampler
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.models.loading import load_noise_schedule, model_family, model_fingerprint
from fastpref.models.noise_schedule import NoiseSchedule
from fastpref.models.timesteps import denoising_steps
from fastpref.rollout.pool import PoolSampler


def open_store(config: Config, model_dir: Path) -> Store:
    """The recipe's store; refused if it was made for another model or another length of captions."""
    store = Store.open(Path(config.store))
    store.check_model(model_fingerprint(model_dir), model_family(model_dir))
    held, wanted = store.manifest.max_caption_tokens, config.max_caption_tokens
    if held != wanted:
        todo = f"set max_caption_tokens={held}, or prepare a store with {wanted}"
        raise UserError(f"the store was prepared with max_caption_tokens={held}, not {wanted}", config.store, todo)
    return store


def open_sampler(config: Config, store: Store) -> Sampler:
    """Which pairs form each batch."""
    return Sampler(
        store.bucket_ids,
        batch_size=config.batch_size,
        group_size=config.group,
        seed=config.seed,
        sampling=config.sampling,
        embeddings=store.clip_text_all() if config.sampling == "related" else None,
        draws=config.draws,
    )


def open_schedule(config: Config, model_dir: Path) -> NoiseSchedule:
    """The model's noise schedule; refused if ``timestep_range`` leaves it."""
    schedule = load_noise_schedule(model_dir)
    if config.timestep_range is not None and config.timestep_range[1] > schedule.num_train_timesteps:
        raise UserError(f"timestep_range ends above {schedule.num_train_timesteps}", "timestep_range", "lower it")
    return schedule


def open_pool_sampler(config: Config, model_dir: Path, schedule: NoiseSchedule) -> PoolSampler:
    """How step-wise methods roll out; refused if no segment of steps lies in ``timestep_range``.

    The steps are one fewer than ``sample_steps`` where the grid has timestep 0 (:func:`denoising_steps`).
    """
    steps = denoising_steps(model_dir, config.sample_steps)
    low, high = config.timestep_range or (0, schedule.num_train_timesteps)
    plain = max(config.plain_steps, sum(step.t >= high for step in steps))
    end = sum(step.t >= low for step in steps)
    if end - plain <= config.inner_steps:
        what = f"no segment of {config.inner_steps + 1} steps lies in it behind {config.plain_steps} plain steps"
        where = "sample_steps" if config.timestep_range is None else "timestep_range"
        raise UserError(what, where, f"the steps are at {[step.t for step in steps]}")
    return PoolSampler(
        steps,
        schedule,
        plain,
        end,
        config.inner_steps,
        config.candidates,
        config.guidance_scale,
        config.eta,
        config.seed,
        config.score_at,
    )


def open_prompts(config: Config) -> list[str]:
    """What step-wise methods draw: ``prompts``, or else the records' captions; no prompt twice."""
    source = config.prompts or config.records
    if source == "emoji":
        from fastpref.emoji import TRAIN_PARQUET

        source = str(TRAIN_PARQUET)
    return read_captions(source)


def check_unet(unet: Any, store: Store, config: Config) -> None:
    """The UNet (which may come from another folder than the text encoders) takes what the store holds."""
    settings, where = unet.config, config.unet or config.model
    prompt, pooled = store.empty_prompt()
    channels, takes_pooled = store.manifest.latent_channels, settings.get("addition_embed_type") == "text_time"
    if takes_pooled != (pooled is not None):
        family = "SDXL" if takes_pooled else "SD1.5"
        raise UserError(f"the UNet is one of {family}, the store was made for {store.manifest.family}", where)
    for name, takes, holds in (
        ("in_channels", settings["in_channels"], channels),
        ("out_channels", settings["out_channels"], channels),
        ("cross_attention_dim", settings["cross_attention_dim"], prompt.shape[-1]),
    ):
        if takes != holds:
            raise UserError(f"{name} of the UNet is {takes}, the store needs {holds}", where, "use a UNet that fits")
