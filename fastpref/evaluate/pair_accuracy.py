"""How often a preference model agrees with people on held-out pairs, at given timesteps.

At t > 0 both pictures of a pair are noised alike and what is scored is the base model's x̂0, as in training; at t = 0
the pictures are scored as they are (as the public SPO code evaluates). Ties have no winner and are left out.
"""

from __future__ import annotations

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
from fastpref.models.loading import (
    DTYPES,
    TextStack,
    load_noise_schedule,
    load_text_stack,
    resolve_device,
    resolve_model_dir,
)
from fastpref.models.one_step import OneStep, load_one_step
from fastpref.models.policy import Conditioning
from fastpref.models.step_preference import StepPreferenceModel
from fastpref.models.step_preference_file import load_step_preference, resolve_step_preference
from fastpref.models.work import Work
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
        ``pair_accuracy: {timestep: share of pairs whose winner has the higher score}``, ``pair_margin`` (mean of
        s_w - s_l, by timestep) and ``details`` with the number of pairs and the work.

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
        "pair_accuracy": {str(t): float(np.mean([m > 0 for m in values])) for t, values in margins.items()},
        "pair_margin": {str(t): float(np.mean(values)) for t, values in margins.items()},
        "details": {
            "pairs": len(margins[config.eval_timesteps[0]]),
            "prompts": len(captions),
            "guidance_scale": config.guidance_scale,
            "work": asdict(judge.work),
        },
    }


@dataclass
class _Judge:
    """A preference model and all that it takes to show it x̂0 of a pair."""

    model: StepPreferenceModel
    one_step: OneStep
    text: TextStack
    dtype: torch.dtype
    work: Work

    def margins(self, pairs: Sequence[Pair], timesteps: Sequence[int]) -> dict[int, list[float]]:
        """s_w - s_l of each pair, by timestep."""
        images = torch.stack([_pixels(image) for side in ("winner", "loser") for image in _side(pairs, side)])
        images = images.to(self.model.device, self.dtype)
        captions = [pair.caption for pair in pairs]
        distinct = list(dict.fromkeys(captions))
        own = torch.tensor([distinct.index(caption) for caption in captions])
        texts = self.model.embed_texts(distinct)[own].repeat(2, 1)
        self.work.text_forwards += len(distinct)
        noisy_ones = [t for t in timesteps if t > 0]
        conditioning = self._conditioning(distinct, own, images.shape[-1]) if noisy_ones else None
        latents = self._latents(images) if noisy_ones else None
        found = {}
        for t in timesteps:
            times = torch.full((len(images),), t, device=images.device)
            seen = images
            if t > 0:
                assert latents is not None and conditioning is not None
                seen = self.one_step.images(self._noised(latents, pairs, times), times, conditioning)
            scores = self.model.score(self.model.embed_images(seen, times), texts)
            self.work.scorer_forwards += len(images)
            winner, loser = scores.double().chunk(2)
            found[t] = (winner - loser).tolist()
        return found

    def _latents(self, images: torch.Tensor) -> torch.Tensor:
        vae = self.one_step.decoder.vae
        mean = vae.encode(images.to(vae.dtype)).latent_dist.mean.to(self.dtype)
        self.work.vae_encodes += len(images)
        return (mean - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    def _noised(self, latents: torch.Tensor, pairs: Sequence[Pair], times: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor([pair.index for pair in pairs])
        keys = derive_keys(0, 0, ids, int(times[0]), "sample").repeat(2).to(latents.device)
        alphas = self.one_step.schedule.alphas_cumprod.to(latents.device, latents.dtype)
        return add_keyed_noise(latents, keys, times, alphas)

    def _conditioning(self, captions: list[str], own: torch.Tensor, size: int) -> Conditioning:
        prompt, pooled = self.text.encode(captions)
        own = own.to(prompt.device).repeat(2)
        time_ids = None
        if pooled is not None:
            row = torch.tensor([size, size, 0, 0, size, size], device=prompt.device, dtype=self.dtype)
            time_ids, pooled = row.repeat(len(own), 1), pooled[own]
        return Conditioning(prompt[own], pooled, time_ids)


def _open_judge(config: Config, folder: Path | None) -> _Judge:
    model_dir, device, work = resolve_model_dir(config.model), resolve_device(config.device), Work()
    schedule = load_noise_schedule(model_dir)
    if max(config.eval_timesteps) >= schedule.num_train_timesteps:
        last = schedule.num_train_timesteps - 1
        raise UserError(f"eval_timesteps has {max(config.eval_timesteps)}, the model's last is {last}", "", "lower it")
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    files = resolve_step_preference(config.scorer if folder is None else str(folder), config.clip)
    model = load_step_preference(files, device=device, dtype=dtype, seed=config.seed)
    text = load_text_stack(model_dir, DTYPES[config.precision], device)
    one_step = load_one_step(config, model_dir, device, schedule, text.encode([""]), work)
    return _Judge(model, one_step, text, dtype, work)


def _held_out(config: Config) -> Iterator[Pair]:
    """The pairs whose captions are among the evaluation prompts, at the recipe's resolution."""
    records, size = config.eval_records, (config.resolution, config.resolution)
    if records == "emoji":
        from fastpref.emoji import HELDOUT_PARQUET

        records = str(HELDOUT_PARQUET)
    chosen = set(choose_prompts(read_captions(records), config.eval_prompts))
    for record in read_records(records):
        if not isinstance(record, Record) or record.label == 0.5 or record.caption.strip() not in chosen:
            continue
        try:
            winner, loser = (
                to_bucket(load_rgb(data, config.max_image_pixels), size) for data in (record.winner, record.loser)
            )
        except ImageError as error:
            raise UserError(error.reason, f"{records}, {record.where}", "evaluation needs every real image") from None
        yield Pair(record.index, winner, loser, record.caption.strip())


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
