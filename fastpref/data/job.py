"""A prepare job: the settings of a config resolved against the model and the records, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastpref.config import Config
from fastpref.data.buckets import Size, bucket_granularity, make_buckets
from fastpref.data.images import DECODING
from fastpref.data.manifest import FORMAT_VERSION
from fastpref.data.scan import ScanRules
from fastpref.data.sources import Source
from fastpref.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """Numbers read from the model's config files; no weights are loaded for them."""

    vae_scale_factor: int
    unet_downsampling: int
    latent_channels: int
    scaling_factor: float
    shift_factor: float
    text_tokens: int  # positions of a block
    text_width: int
    pooled_width: int  # 0 for SD1.5
    clip_width: int  # 0 without CLIP


@dataclass(frozen=True)
class Job:
    """What ``prepare`` does; ``fingerprint`` covers everything that decides the store's content."""

    records: str
    model_dir: Path
    clip_dir: Path | None
    family: Literal["sdxl", "sd15"]
    model_fingerprint: str
    clip_fingerprint: str | None
    shape: ModelShape
    buckets: list[Size]
    resolution: int
    ties: Literal["drop", "half", "keep"]
    identical: Literal["drop", "keep"]
    posterior: bool
    flips: bool
    vae_precision: str
    dtype: str
    text_dtype: str
    shard_size: int
    batch_size: int
    max_pixels: int
    max_caption_tokens: Literal[77, 150, 225]
    max_enlargement: float | None
    max_reject_share: float
    fingerprint: str

    @property
    def scan_rules(self) -> ScanRules:
        """What the scan leaves out."""
        drop = {"drop_ties": self.ties == "drop", "drop_identical": self.identical == "drop"}
        return ScanRules(**drop, max_pixels=self.max_pixels, max_enlargement=self.max_enlargement, buckets=self.buckets)


def make_job(config: Config, source: Source) -> Job:
    """Resolve a config.

    Raises:
        UserError: the model or CLIP is missing or unsupported, or the resolution does not fit the VAE or the buckets.
    """
    from fastpref.models.loading import folder_fingerprint, model_dir_of, model_family, model_fingerprint
    from fastpref.models.similarity import resolve_clip_dir

    model_dir = model_dir_of(config)
    clip_dir = None if config.clip is None else resolve_clip_dir(config.clip)
    family = model_family(model_dir)
    shape = read_shape(model_dir, family, clip_dir)
    half = config.precision in ("bf16", "fp16")
    settings: dict[str, Any] = {
        "family": family,
        "model_fingerprint": model_fingerprint(model_dir),
        "clip_fingerprint": None if clip_dir is None else folder_fingerprint(clip_dir),
        "buckets": _buckets(config, shape),
        "resolution": config.resolution,
        "ties": config.ties,
        "identical": config.identical,
        "posterior": config.posterior,
        "flips": config.flips,
        "vae_precision": config.vae_precision,
        # fp16 keeps three more bits of a latent than bf16, and latents are of order one.
        "dtype": "float16" if half else "float32",
        "text_dtype": {"bf16": "bfloat16", "fp16": "float16"}.get(config.precision, "float32"),
        "shard_size": config.shard_size,
        "max_pixels": config.max_image_pixels,
        "max_enlargement": config.max_enlargement,
        "max_caption_tokens": config.max_caption_tokens,
    }
    content = {"format_version": FORMAT_VERSION, "decoding": DECODING, "records": source.fingerprint(), **settings}
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Job(
        records=config.records,
        model_dir=model_dir,
        clip_dir=clip_dir,
        shape=shape,
        batch_size=config.prepare_batch_size,
        max_reject_share=config.max_reject_share,
        fingerprint=fingerprint,
        **settings,
    )


def read_shape(model_dir: Path, family: str, clip_dir: Path | None) -> ModelShape:
    """The :class:`ModelShape` of a pipeline folder and a CLIP folder, from their JSON files."""
    vae, unet = _json(model_dir / "vae/config.json"), _json(model_dir / "unet/config.json")
    text = _json(model_dir / "text_encoder/config.json")
    text_2 = _json(model_dir / "text_encoder_2/config.json") if family == "sdxl" else {}
    if vae.get("latents_mean") is not None:
        raise UserError("a VAE with latents_mean is not supported", f"{model_dir}/vae", "use SDXL's or SD1.5's")
    try:
        return ModelShape(
            vae_scale_factor=2 ** (len(vae["block_out_channels"]) - 1),
            unet_downsampling=2 ** (len(unet["block_out_channels"]) - 1),
            latent_channels=vae["latent_channels"],
            scaling_factor=float(vae["scaling_factor"]),
            shift_factor=float(vae.get("shift_factor") or 0.0),
            text_tokens=text["max_position_embeddings"],
            text_width=text["hidden_size"] + text_2.get("hidden_size", 0),
            pooled_width=text_2["projection_dim"] if text_2 else 0,
            clip_width=0 if clip_dir is None else _json(clip_dir / "config.json").get("projection_dim", 512),
        )
    except KeyError as error:
        raise UserError(
            f"a config file of the model has no key {error}", str(model_dir), "is the folder whole?"
        ) from error


def _buckets(config: Config, shape: ModelShape) -> list[Size]:
    if config.resolution % shape.vae_scale_factor:
        todo = f"the VAE shrinks pictures by {shape.vae_scale_factor}"
        raise UserError(f"resolution is {config.resolution}, must be a multiple of {shape.vae_scale_factor}", "", todo)
    if not config.buckets:
        return [(config.resolution, config.resolution)]
    granularity = bucket_granularity(config.resolution, shape.vae_scale_factor, shape.unet_downsampling)
    return make_buckets(config.resolution, granularity)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("cannot read the model's config file", str(path), str(error)) from error
