"""Latent reward models on disk: a folder with ``config.json`` and the weights as safetensors.

The UNet's weights have diffusers' names under ``unet.``; beside them are ``visual_projection.weight``,
``text_projection.weight`` and ``logit_scale``.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastpref.atomic import write_json, write_tensors
from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.models.latent_reward import LatentRewardModel
from fastpref.models.loading import Family, load_unet, model_family, open_part, read_part_json
from fastpref.models.similarity import resolve_clip_dir
from fastpref.models.state_dict import read_state_dict, refuse
from fastpref.models.weights import weights_of

FOLDER_NAME = "latent_reward_model"
WEIGHTS_NAME = "latent_reward_model.safetensors"
CONFIG_NAME = "config.json"
_KIND: Literal["latent_reward_model"] = "latent_reward_model"


class LatentRewardConfig(BaseModel):
    """What a folder says of its model: how to build it, and what it was trained for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["latent_reward_model"] = _KIND
    family: Family
    unet: dict[str, Any]  # UNet2DConditionModel's configuration
    text_width: int = Field(ge=1)
    guidance_scale: float = Field(ge=1)
    sizes: list[tuple[int, int]] = Field(min_length=1)  # (height, width) in pixels of the pictures trained on
    model_fingerprint: str  # of the VAE, the text encoders and the tokenizers
    max_caption_tokens: Literal[77, 150, 225] = 77

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.unet["in_channels"])


def is_latent_reward(scorer: str | Path | None) -> bool:
    """Whether a config's ``scorer`` is a folder of a latent reward model."""
    return scorer is not None and (Path(scorer) / WEIGHTS_NAME).is_file()


def open_latent_reward(
    config: Config,
    model_dir: Path,
    device: torch.device | str,
    *,
    dtype: torch.dtype,
    text_width: int,
    sizes: list[tuple[int, int]],
    model_fingerprint: str,
) -> tuple[LatentRewardModel, LatentRewardConfig]:
    """What ``method: lrm`` starts from, in eval mode: the folder ``config.scorer``, or the UNet of ``model_dir``.

    A new one has the visual projection drawn from ``config.seed`` and, for SD1.5, the text projection of
    ``config.clip`` if that is set.

    Raises:
        UserError: the folder is no latent reward model or one for another model, or the UNet or the text projection
            cannot be used.
    """
    family = model_family(model_dir)
    facts: dict[str, Any] = {"text_width": text_width, "sizes": sizes, "model_fingerprint": model_fingerprint}
    facts["max_caption_tokens"] = config.max_caption_tokens
    if config.scorer is not None:
        model, own = load_latent_reward(Path(config.scorer), device=device, dtype=dtype)
        check_latent_reward(own, config.scorer, family=family, channels=own.channels, **facts)
        model.guidance_scale = config.guidance_scale
        return model, own.model_copy(update={"guidance_scale": config.guidance_scale})
    base = load_unet(model_dir, dtype, config.unet)
    settings = {key: value for key, value in base.config.items() if not key.startswith("_")}
    projection = None if family == "sdxl" or config.clip is None else _text_projection(config.clip, text_width)
    model = LatentRewardModel(base, text_width, config.guidance_scale, config.seed, projection)
    facts |= {"family": family, "unet": settings, "guidance_scale": config.guidance_scale}
    return model.to(device).eval(), LatentRewardConfig.model_validate(facts)


def load_latent_reward(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[LatentRewardModel, LatentRewardConfig]:
    """The model of a folder, in eval mode.

    Raises:
        UserError: no such folder, another kind of one, or a file is missing, damaged or of another layout.
    """
    from diffusers import UNet2DConditionModel

    config = read_latent_reward_config(folder)
    state = read_state_dict(folder / WEIGHTS_NAME)

    def build() -> LatentRewardModel:
        with torch.device("meta"):  # the weights are in the file
            return LatentRewardModel(
                UNet2DConditionModel.from_config(config.unet), config.text_width, config.guidance_scale
            )

    model = open_part(build, folder / CONFIG_NAME)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    wrong = [name for name in expected.keys() & state.keys() if state[name].shape != expected[name]]
    refuse(folder / WEIGHTS_NAME, expected.keys() - state.keys(), state.keys() - expected.keys(), wrong)
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True)
    return model.to(device=device, dtype=dtype).eval(), config


def read_latent_reward_config(folder: Path) -> LatentRewardConfig:
    """``config.json`` of a folder; :class:`UserError` if it is none of a latent reward model."""
    path, todo = folder / CONFIG_NAME, "give the latent_reward_model folder that method lrm wrote"
    if not folder.is_dir() or not is_latent_reward(folder):
        raise UserError("no latent reward model there", str(folder), todo)
    settings = read_part_json(path)
    try:
        return LatentRewardConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise UserError(f"no configuration of a latent reward model, {what}", str(path), todo) from None


def save_latent_reward(model: LatentRewardModel, config: LatentRewardConfig, folder: Path) -> None:
    """Write ``folder`` whole or not at all."""
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    write_tensors(draft / WEIGHTS_NAME, model.state_dict())
    write_json(draft / CONFIG_NAME, config.model_dump(mode="json"))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)


def check_latent_reward(
    config: LatentRewardConfig,
    where: str | Path,
    *,
    family: str,
    channels: int,
    text_width: int,
    sizes: list[tuple[int, int]],
    model_fingerprint: str,
    max_caption_tokens: int,
) -> None:
    """Raise :class:`UserError` unless the model judges latents of this family, VAE, prompt encoding and size."""
    if config.family != family:
        what = f"the latent reward model is one for {config.family}, the model is {family}"
        raise UserError(what, str(where), "train one for this model with method=lrm")
    if config.channels != channels or config.text_width != text_width:
        what = (
            f"the latent reward model takes {config.channels} latent channels and text rows of {config.text_width}, "
            f"the model has {channels} and {text_width}"
        )
        raise UserError(what, str(where), "train one for this model with method=lrm")
    strange = [size for size in sizes if size not in config.sizes]
    if strange:
        (height, width), (h, w) = strange[0], config.sizes[0]
        what = f"the latent reward model was trained on pictures of {w}x{h} pixels, these are of {width}x{height}"
        raise UserError(what, str(where), f"set resolution={h} or train one at this size")
    if config.max_caption_tokens != max_caption_tokens:
        own = config.max_caption_tokens
        what = f"the latent reward model was trained with max_caption_tokens={own}, not {max_caption_tokens}"
        raise UserError(what, str(where), f"set max_caption_tokens={own} or train one with method=lrm")
    if config.model_fingerprint != model_fingerprint:
        what = "the latent reward model was trained with another VAE or other text encoders"
        raise UserError(what, str(where), "train one for this model with method=lrm")


def _text_projection(clip: str, width: int) -> torch.Tensor:
    from transformers import CLIPTextModelWithProjection

    folder = resolve_clip_dir(clip)
    options = weights_of(folder).options
    load = partial(CLIPTextModelWithProjection.from_pretrained, folder, dtype=torch.float32, **options)
    weight = open_part(load, folder).text_projection.weight.detach()
    if weight.shape != (width, width):
        what = f"the CLIP's text projection is {tuple(weight.shape)}, the model's text rows need {(width, width)}"
        raise UserError(what, str(folder), "set clip to the CLIP whose text encoder the model has, or to null")
    return weight
