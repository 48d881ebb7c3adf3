"""Memory of what is not the step: ``prepare``, ``prepare --reference`` and the scoring of a rollout.

Counted like the step (:mod:`fastpref.plan.count`): the functions that these phases call, on fake tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpref.config import Config
from fastpref.data.encode import latent_rows
from fastpref.models.caption_length import BLOCKS
from fastpref.models.fp32_reference import widened
from fastpref.models.latent_reward import LatentRewardModel
from fastpref.models.latent_reward_file import is_latent_reward, read_latent_reward_config
from fastpref.models.loading import DTYPES, Family, read_part_json, vae_dtype
from fastpref.models.one_step import LatentDecoder
from fastpref.models.policy import make_reference
from fastpref.models.public import TEXT_ENCODERS, VAES
from fastpref.models.similarity import embed_ids, embed_pixels, resolve_clip_dir
from fastpref.models.step_preference import ClipScorer, Preprocess
from fastpref.models.step_preference_file import PreferenceFiles, resolve_step_preference
from fastpref.models.text import TextStack
from fastpref.models.weights import stored_values
from fastpref.models.work import Work
from fastpref.plan.count import META, Shapes, meta_model, with_fake_policy, with_fake_weights
from fastpref.plan.meter import PeakMemory
from fastpref.rollout.scorers import folded_values, import_callable, is_callable
from fastpref.rollout.step_scorers import PreferenceScorer
from fastpref.train.reference import in_half_precision, pairs_per_call, rounds_as_training
from fastpref_kernels import implicit_reward

_CPU = torch.device("cpu")
_STATISTICS = (0.5, 0.5, 0.5)  # of pictures; no shape depends on them


@dataclass(frozen=True)
class Parts:
    """The models beside the UNet as their ``config.json`` describe them."""

    family: Family
    vae: dict[str, Any]
    text_encoders: list[dict[str, Any]]

    @classmethod
    def of_folder(cls, folder: Path, family: Family) -> Parts:
        """A pipeline's."""
        names = ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)
        encoders = [read_part_json(folder / name / "config.json") for name in names]
        return cls(family, read_part_json(folder / "vae" / "config.json"), encoders)

    @classmethod
    def public(cls, family: Family) -> Parts:
        """The public base model's."""
        return cls(family, VAES[family], list(TEXT_ENCODERS[family].values()))


class Need(NamedTuple):
    """Bytes of the models of a phase, and the most that the rest takes at once."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True)
class Scoring:
    """What a rollout's scoring adds to training."""

    resident: int  # text encoders, scorer, VAE: there while training too
    activations: int
    not_counted: list[str] = field(default_factory=list)


def count_prepare(config: Config, parts: Parts, device: str) -> tuple[Need, list[str]]:
    """``fastpref prepare``: captions or pictures, whichever need more; and what is not counted."""
    here = config.clip is not None and _on_disk(config.clip)
    clip = read_part_json(resolve_clip_dir(str(config.clip)) / "config.json") if here else None
    models = json.dumps([parts.family, parts.vae, parts.text_encoders, clip])
    sizes = (config.prepare_batch_size, config.resolution, BLOCKS[config.max_caption_tokens])
    text = DTYPES[config.precision if config.precision in ("bf16", "fp16") else "fp32"]
    vae = vae_dtype(config.vae_precision, device)
    need = _prepare(models, *sizes, text, vae, config.posterior, config.flips)
    return need, [] if here or config.clip is None else ["the CLIP, which is not on disk"]


@cache
def _prepare(
    models: str, rows: int, side: int, blocks: int, text: torch.dtype, vae: torch.dtype, posterior: bool, flips: bool
) -> Need:
    family, vae_settings, encoder_settings, clip_settings = json.loads(models)
    model, encoders = _vae(vae_settings, vae), _text_encoders(encoder_settings, text)
    clip = None if clip_settings is None else _clip(clip_settings, torch.float32)
    beside = [] if clip is None else [clip]
    with FakeTensorMode():
        for part in (model, *encoders, *beside):
            with_fake_weights(part)

        def captions() -> None:
            lengths = [encoder.config.max_position_embeddings for encoder in encoders]
            ids = [torch.zeros(rows, blocks, length, dtype=torch.int64) for length in lengths]
            kept = TextStack(family, [], encoders, _CPU).encode_ids(ids)
            if clip is not None:
                tokens = torch.zeros(rows, clip.config.text_config.max_position_embeddings, dtype=torch.int64)
                embed_ids(clip, tokens, torch.ones_like(tokens))
            del kept

        def pictures() -> None:
            pixels = torch.zeros(rows, side, side, 3, dtype=torch.uint8)
            kept = latent_rows(model, pixels, posterior=posterior, flips=flips)
            if clip is not None:
                size = clip.config.vision_config.image_size
                embed_pixels(clip, torch.zeros(rows, 3, size, size))
            del kept

        needs = [_measured([*encoders, *beside], captions), _measured([model, *beside], pictures)]
    return max(needs, key=lambda need: need.total)


def count_reference(config: Config, shapes: Shapes) -> Need:
    """``fastpref prepare --reference``: one forward of the reference."""
    wide = in_half_precision(config) and not rounds_as_training(config)
    seen = (widened(config) if wide else config).model_copy(update={"compile": False, "init_lora": None})
    sizes = (json.dumps(shapes.unet), shapes.latent, shapes.tokens)
    return _reference(seen.model_dump_json(), *sizes, pairs_per_call(config))


@cache
def _reference(settings: str, unet: str, latent: tuple[int, int, int], tokens: int, pairs: int) -> Need:
    from diffusers import UNet2DConditionModel

    config, shapes = Config.model_validate_json(settings), Shapes(json.loads(unet), latent, tokens)
    model = meta_model(lambda: UNet2DConditionModel.from_config(shapes.unet), DTYPES[config.precision])
    made = make_reference(model, config, META)
    with FakeTensorMode():
        policy = with_fake_policy(made)
        policy.share_prompts()

        def errors() -> None:
            noisy, timesteps, conditioning = shapes.inputs(policy, 2 * pairs)
            target = torch.empty_like(noisy)
            implicit_reward(policy.predict_reference(noisy, timesteps, conditioning), target)

        return _measured([policy.unet], errors)


def count_scoring(config: Config, parts: Parts, shapes: Shapes, device: str, timesteps: int) -> Scoring:
    """The scoring of a rollout, ``decode_batch_size`` candidates at a time.

    Args:
        timesteps: how many the scorer is asked for; a step-aware preference model is folded at them.
    """
    dtype, rows, source = DTYPES[config.precision], config.decode_batch_size, config.scorer
    text, vae = _text_bytes(json.dumps(parts.text_encoders), dtype), json.dumps(parts.vae)
    precision = "fp64" if config.precision == "fp64" else config.vae_precision
    kind = vae_dtype(precision, device, judged_in=config.precision)
    if source is not None and is_callable(source):
        if getattr(import_callable(source), "takes", "images") == "latents":
            return Scoring(text, 0, ["the scorer's own memory"])
        need = _decoding(vae, "null", kind, dtype, shapes.latent, rows)
        return Scoring(text + need.weights, need.activations, ["the scorer's own memory"])
    if is_latent_reward(source):
        facts = read_latent_reward_config(Path(str(source)))
        need = _latent(facts.model_dump_json(), dtype, json.dumps(shapes.unet), shapes.latent, shapes.tokens, rows)
        return Scoring(text + need.weights, need.activations)
    if config.method == "lpo":
        return Scoring(text, 0, ["the scorer, which is not on disk"])
    if not all(map(_on_disk, filter(None, (source, config.clip)))):
        need = _decoding(vae, "null", kind, dtype, shapes.latent, rows)
        return Scoring(text + need.weights, need.activations, ["the scorer, which is not on disk"])
    files = resolve_step_preference(source, config.clip)
    clip = read_part_json(files.clip_dir / "config.json")
    need = _decoding(vae, json.dumps(clip), kind, dtype, shapes.latent, rows)
    extra = _folded_bytes(files, clip, dtype, timesteps)
    if config.small_decoder is not None:  # the VAE, which its agreement is measured with, needs more than it
        extra += stored_values(Path(config.small_decoder)) * dtype.itemsize
    return Scoring(text + need.weights + extra, need.activations)


@cache
def _decoding(
    vae: str, clip: str, kind: torch.dtype, scorer_kind: torch.dtype, latent: tuple[int, int, int], rows: int
) -> Need:
    model, settings = _vae(json.loads(vae), kind), json.loads(clip)
    judge = None if settings is None else _clip(settings, scorer_kind)
    with FakeTensorMode():
        decoder = LatentDecoder(with_fake_weights(model), rows, Work())

        def latents() -> torch.Tensor:
            return torch.empty(rows, *latent, dtype=torch.promote_types(scorer_kind, torch.float32))

        if judge is None:
            return _measured([model], lambda: (decoder.images(latents()) / 2 + 0.5).clamp(0, 1))
        size = Preprocess(judge.config.vision_config.image_size, _STATISTICS, _STATISTICS)
        scorer = PreferenceScorer(ClipScorer(with_fake_weights(judge), None, size), decoder, Work())
        return _measured([model, judge], lambda: scorer.rows(latents(), 0))


@cache
def _latent(facts: str, dtype: torch.dtype, unet: str, latent: tuple[int, int, int], tokens: int, rows: int) -> Need:
    from diffusers import UNet2DConditionModel

    own, shapes = json.loads(facts), Shapes(json.loads(unet), latent, tokens)

    def build() -> LatentRewardModel:
        half = UNet2DConditionModel.from_config(own["unet"])
        return LatentRewardModel(half, own["text_width"], own["guidance_scale"])

    model = meta_model(build, dtype)
    with FakeTensorMode():
        with_fake_weights(model)

        def embed() -> None:
            noisy = torch.empty(rows, *latent, dtype=torch.promote_types(dtype, torch.float32))
            told, empty = shapes.conditioning(rows, dtype), shapes.conditioning(1, dtype)
            model.embed_latents(noisy, torch.zeros(rows, dtype=torch.int64), told, empty)

        return _measured([model], embed)


def round_bytes(config: Config, segments: int, latent: tuple[int, int, int], prompts: int) -> int:
    """Of a round of ``prompts`` prompts: the pools until they are judged, then the transitions, if all pairs are kept.

    x̂0 is counted for every scorer, though one of noisy latents has none.
    """
    item = 8 if config.precision == "fp64" else 4
    length = config.inner_steps + 1
    pools = config.candidates * (length + 1) + 1  # paths, x̂0, start
    return prompts * segments * max(pools, 4 * length) * math.prod(latent) * item


def _measured(models: list[Any], run: Callable[[], Any]) -> Need:
    """Bytes of fake ``models``, and the peak of ``run`` beside them."""
    known = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    with torch.no_grad(), PeakMemory(known) as memory:
        run()
    return Need(sum(tensor.nbytes for tensor in known), memory.peak)


def _vae(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    return meta_model(lambda: AutoencoderKL.from_config(settings), dtype)


def _clip(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import CLIPConfig, CLIPModel

    return meta_model(lambda: CLIPModel(CLIPConfig.from_dict(settings)), dtype)


def _text_encoders(settings: list[dict[str, Any]], dtype: torch.dtype) -> list[Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds: tuple[Any, ...] = (CLIPTextModel, CLIPTextModelWithProjection)
    configs = [CLIPTextConfig.from_dict(own) for own in settings]
    return [meta_model(partial(kind, own), dtype) for kind, own in zip(kinds, configs, strict=False)]


@cache
def _text_bytes(settings: str, dtype: torch.dtype) -> int:
    models = _text_encoders(json.loads(settings), dtype)
    return sum(tensor.nbytes for model in models for tensor in (*model.parameters(), *model.buffers()))


def _folded_bytes(files: PreferenceFiles, clip: dict[str, Any], dtype: torch.dtype, timesteps: int) -> int:
    """Of the folded weights that a step-aware preference model has in memory."""
    if files.weights is None:
        return 0
    from transformers import CLIPConfig

    values, kept = folded_values(CLIPConfig.from_dict(clip).vision_config)
    return min(kept, timesteps) * values * dtype.itemsize


def _on_disk(path: str) -> bool:
    return path == "emoji" or Path(path).exists()
