"""How often a preference model agrees with people on held-out pairs, at given timesteps.

At t > 0 both pictures of a pair are noised alike. A step-aware model is shown the base model's x̂0 of them, as in
training, and at t = 0 the pictures as they are (as the public SPO code evaluates); a latent reward model is shown the
noisy latents themselves, and at t = 0 the clean ones. Ties have no winner and are left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from fastpref.config import Config
from fastpref.data.images import ImageError, load_rgb, to_bucket
from fastpref.data.records import Record, read_captions, read_records
from fastpref.errors import UserError
from fastpref.evaluate.runner import choose_prompts
from fastpref.evaluate.scores import win_values
from fastpref.models.caption_length import warn_of_cut
from fastpref.models.latent_reward import LatentRewardModel, text_rows
from fastpref.models.latent_reward_file import open_latent_reward
from fastpref.models.loading import (
    DTYPES,
    load_noise_schedule,
    load_vae,
    model_dir_of,
    model_fingerprint,
    resolve_device,
)
from fastpref.models.noise_schedule import NoiseSchedule
from fastpref.models.one_step import OneStep, load_one_step
from fastpref.models.policy import Conditioning
from fastpref.models.step_preference import StepPreferenceModel
from fastpref.models.step_preference_file import load_step_preference, resolve_step_preference
from fastpref.models.text import TextStack, load_text_stack
from fastpref.models.time_ids import target_time_ids
from fastpref.models.vae import encode
from fastpref.models.work import Work
from fastpref.process.ddpm import noising
from fastpref_kernels import add_keyed_noise, derive_keys


@dataclass(frozen=True)
class Pair:
    """A held-out preference without a tie; ``index`` is the record's, and keys its noise."""

    index: int
    winner: Image
    loser: Image
    caption: str


@torch.no_grad()
def evaluate_pair_accuracy(config: Config, *, folder: Path | None = None) -> dict[str, Any]:
    """Accuracy of a preference model on the pairs of the evaluation prompts.

    Args:
        folder: a trained model; None: the one that training starts from.

    Returns:
        ``pair_accuracy: {timestep: share of pairs whose winner has the higher score}``, where equal scores count a
        half, ``pair_margin`` (mean of s_w - s_l, by timestep) and ``details`` with the number of pairs and the work.

    Raises:
        UserError: a model or the records cannot be used, or there is no pair without a tie.
    """
    judge = _open_judge(config, folder)
    margins: dict[int, list[float]] = {t: [] for t in config.eval_timesteps}
    captions = set()
    for pairs in _batches(_held_out(config), max(1, config.eval_batch_size // 2)):
        captions |= {pair.caption for pair in pairs}
        for t, values in judge.margins(pairs, config.eval_timesteps).items():
            margins[t] += values
    if not captions:
        raise UserError("the evaluation records have no pair without a tie", config.eval_records)
    return {
        "pair_accuracy": {str(t): float(np.mean(win_values(np.zeros(1), np.array(m)))) for t, m in margins.items()},
        "pair_margin": {str(t): float(np.mean(values)) for t, values in margins.items()},
        "details": {
            "pairs": len(margins[config.eval_timesteps[0]]),
            "prompts": len(captions),
            "guidance_scale": config.guidance_scale,
            "work": asdict(judge.work),
        },
    }


@dataclass
class _Shown:
    """Winners, then losers, of some pairs: 2n pictures, n captions of which some may be alike."""

    images: torch.Tensor  # (2n, 3, H, W) in [-1, 1]
    prompts: list[str]  # the distinct captions
    own: torch.Tensor  # (2n,) place of a picture's caption among them
    keys: torch.Tensor  # (2n,) record numbers, alike for winner and loser
    latents: torch.Tensor | None = None  # (2n, C, h, w)
    conditioning: Conditioning | None = None  # 2n rows


@dataclass
class _Judge(ABC):
    """A preference model and all that it takes to show it a pair at a timestep."""

    vae: Any
    schedule: NoiseSchedule
    text: TextStack
    device: torch.device
    dtype: torch.dtype
    work: Work

    @abstractmethod
    def scores(self, shown: _Shown, times: torch.Tensor) -> torch.Tensor:
        """(2n,) at the timesteps ``times`` (2n,), which are all the same."""

    @abstractmethod
    def needs_latents(self, t: int) -> bool: ...

    def margins(self, pairs: Sequence[Pair], timesteps: Sequence[int]) -> dict[int, list[float]]:
        """s_w - s_l of each pair, by timestep."""
        images = torch.stack([_pixels(image) for side in ("winner", "loser") for image in _side(pairs, side)])
        captions = [pair.caption for pair in pairs]
        distinct = list(dict.fromkeys(captions))
        own = torch.tensor([distinct.index(caption) for caption in captions]).repeat(2)
        keys = torch.tensor([pair.index for pair in pairs]).repeat(2)
        shown = _Shown(images.to(self.device, self.dtype), distinct, own, keys)
        if any(self.needs_latents(t) for t in timesteps):
            shown.conditioning = self._conditioning(shown)
            shown.latents = self._latents(shown.images)
        found = {}
        for t in timesteps:
            times = torch.full((len(images),), t, device=self.device)
            winner, loser = self.scores(shown, times).double().chunk(2)
            found[t] = (winner - loser).tolist()
        return found

    def noised(self, shown: _Shown, times: torch.Tensor) -> torch.Tensor:
        """The latents at a timestep; at 0 as they are."""
        assert shown.latents is not None
        t = int(times[0])
        if t == 0:
            return shown.latents
        keys = derive_keys(0, 0, shown.keys, t, "sample").to(shown.latents.device)
        rows = noising(self.schedule.alphas_cumprod, self.schedule.prediction_type).at(times.cpu())
        a, s, _, _ = rows.to(shown.latents.device, torch.promote_types(shown.latents.dtype, torch.float32))
        return add_keyed_noise(shown.latents, keys, a, s)

    def _latents(self, images: torch.Tensor) -> torch.Tensor:
        mean = encode(self.vae, images).mean.to(self.dtype)
        self.work.vae_encodes += len(images)
        return (mean - (getattr(self.vae.config, "shift_factor", None) or 0.0)) * self.vae.config.scaling_factor

    def _conditioning(self, shown: _Shown) -> Conditioning:
        prompt, pooled = self.text.encode(shown.prompts)
        own = shown.own.to(prompt.device)
        time_ids = None
        if pooled is not None:
            height, width = shown.images.shape[-2:]
            time_ids, pooled = target_time_ids((height, width), len(own)).to(prompt.device), pooled[own]
        return Conditioning(prompt[own], pooled, time_ids)


@dataclass
class _PictureJudge(_Judge):
    model: StepPreferenceModel
    one_step: OneStep
    texts: tuple[list[str], torch.Tensor] | None = None  # of the newest pairs

    def needs_latents(self, t: int) -> bool:
        return t > 0

    def scores(self, shown: _Shown, times: torch.Tensor) -> torch.Tensor:
        seen = shown.images
        if int(times[0]) > 0:
            assert shown.conditioning is not None
            seen = self.one_step.images(self.noised(shown, times), times, shown.conditioning)
        self.work.scorer_forwards += len(seen)
        return self.model.score(self.model.embed_images(seen, times), self._texts(shown.prompts)[shown.own])

    def _texts(self, prompts: list[str]) -> torch.Tensor:
        if self.texts is None or self.texts[0] != prompts:
            self.texts = prompts, self.model.embed_texts(prompts)
            self.work.text_forwards += len(prompts)
        return self.texts[1]


@dataclass
class _LatentJudge(_Judge):
    model: LatentRewardModel
    empty: Conditioning

    def needs_latents(self, t: int) -> bool:
        return True

    def scores(self, shown: _Shown, times: torch.Tensor) -> torch.Tensor:
        assert shown.conditioning is not None
        prompts = [shown.prompts[place] for place in shown.own.tolist()]
        texts = text_rows(shown.conditioning, prompts, self.text.tokenizers[0])
        rows = self.model.embed_latents(self.noised(shown, times), times, shown.conditioning, self.empty)
        self.work.scorer_forwards += self.model.rows(len(rows))
        return self.model.score(rows, self.model.embed_texts(texts))


def _open_judge(config: Config, folder: Path | None) -> _Judge:
    model_dir, device, work = (
        model_dir_of(config),
        resolve_device(config.device),
        Work(),
    )
    schedule = load_noise_schedule(model_dir)
    if max(config.eval_timesteps) >= schedule.num_train_timesteps:
        last = schedule.num_train_timesteps - 1
        raise UserError(f"eval_timesteps has {max(config.eval_timesteps)}, the model's last is {last}", "", "lower it")
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    text = load_text_stack(model_dir, DTYPES[config.precision], device, config.max_caption_tokens)
    prompt, pooled = text.encode([""])
    vae = load_vae(model_dir, "fp64" if config.precision == "fp64" else config.vae_precision, device)
    if config.method == "lrm":
        start = config if folder is None else config.model_copy(update={"scorer": str(folder)})
        model, _ = open_latent_reward(
            start,
            model_dir,
            device,
            dtype=dtype,
            text_width=(prompt if pooled is None else pooled).shape[-1],
            sizes=[] if start.scorer else [(config.resolution, config.resolution)],  # a UNet takes any size
            model_fingerprint=model_fingerprint(model_dir),
        )
        return _LatentJudge(vae, schedule, text, device, dtype, work, model, Conditioning(prompt, pooled))
    files = resolve_step_preference(config.scorer if folder is None else str(folder), config.clip)
    clip = load_step_preference(files, device=device, dtype=dtype, seed=config.seed)
    one_step = load_one_step(config, model_dir, device, schedule, (prompt, pooled), work)
    return _PictureJudge(vae, schedule, text, device, dtype, work, clip, one_step)


def _held_out(config: Config) -> Iterator[Pair]:
    """The pairs whose captions are among the evaluation prompts, at the recipe's resolution."""
    records, size = config.eval_records, (config.resolution, config.resolution)
    if records == "emoji":
        from fastpref.emoji import HELDOUT_PARQUET

        records = str(HELDOUT_PARQUET)
    chosen = set(choose_prompts(read_captions(records), config.eval_prompts))
    warn_of_cut(model_dir_of(config), config.max_caption_tokens, chosen)
    for record in read_records(records):
        if not isinstance(record, Record) or record.label == 0.5 or record.caption not in chosen:
            continue
        try:
            winner, loser = (
                to_bucket(load_rgb(data, config.max_image_pixels), size) for data in (record.winner, record.loser)
            )
        except ImageError as error:
            raise UserError(error.reason, f"{records}, {record.where}", "evaluation needs every real image") from None
        yield Pair(record.index, winner, loser, record.caption)


def _batches(pairs: Iterator[Pair], size: int) -> Iterator[list[Pair]]:
    batch: list[Pair] = []
    for pair in pairs:
        batch.append(pair)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _side(pairs: Sequence[Pair], side: str) -> list[Image]:
    return [getattr(pair, side) for pair in pairs]


def _pixels(image: Image) -> torch.Tensor:
    """RGB to (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).double() / 127.5 - 1.0
