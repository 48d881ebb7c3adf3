"""Training what judges denoising steps: the step-aware preference model of SPO (arXiv 2406.04314, section 3.2) and the
latent reward model of LPO (arXiv 2502.01051).

One optimizer step: draw the global batch; noise winner and loser with the same noise at the same timestep; score both
against the prompt; cross-entropy with the label, weighted by 1 / (pairs with that prompt), normalised over the global
batch. The weights are known beforehand and the loss is a sum over pairs, so micro-batches and ranks add up to the exact
gradient.

The step-aware model is shown the x̂0 that the frozen base model predicts in one guided step, decoded; the latent one
looks at the noisy latents themselves.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from fastpref.config import Config
from fastpref.data.sampling import BatchPlan, Sampler
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.memory import moved
from fastpref.models.latent_reward import LatentRewardModel, text_rows
from fastpref.models.latent_reward_file import (
    FOLDER_NAME as LATENT_FOLDER_NAME,
)
from fastpref.models.latent_reward_file import (
    LatentRewardConfig,
    is_latent_reward,
    open_latent_reward,
    save_latent_reward,
)
from fastpref.models.loading import DTYPES, folder_fingerprint
from fastpref.models.one_step import OneStep, load_one_step
from fastpref.models.policy import Conditioning
from fastpref.models.recompute import recomputed_region, set_recomputation
from fastpref.models.step_preference import StepPreferenceModel
from fastpref.models.step_preference_file import (
    FOLDER_NAME,
    PreferenceFiles,
    load_step_preference,
    resolve_step_preference,
    save_step_preference,
)
from fastpref.models.text import load_block_tokenizers
from fastpref.models.work import Work
from fastpref.objectives.step_preference import preference_cross_entropy, prompt_weights
from fastpref.train.batch import BatchBuilder, PairBatch
from fastpref.train.engine import Engine, open_engine
from fastpref.train.figures import Arriving, won
from fastpref.train.inputs import check_unet, open_sampler, open_schedule, open_store
from fastpref.train.loader import Loader
from fastpref.train.optim import learning_rate_at
from fastpref.train.profile import phase
from fastpref.train.trainer import Trainer, check_trained
from fastpref.train.world import World


def open_trainer(
    config: Config, model_dir: Path, device: torch.device, world: World | None = None
) -> PreferenceTrainer:
    """Check store, models and batch arithmetic, and load what is trained and what is frozen.

    Raises:
        UserError: anything that would stop the training later and can be known now.
    """
    if config.method == "lrm":
        return _open_latent(config, model_dir, device, world or World())
    if is_latent_reward(config.scorer):
        todo = "give a CLIP or a step-aware preference model, or use method=lrm"
        raise UserError("a latent reward model is no start for method spm", str(config.scorer), todo)
    files = resolve_step_preference(config.scorer, config.clip)
    store = open_store(config, model_dir)
    _check_store(config, store, files)
    sampler, schedule, work = open_sampler(config, store), open_schedule(config, model_dir), Work()
    model = load_step_preference(files, device=device, dtype=_master(config), seed=config.seed)
    model.region = recomputed_region(config.gradient_checkpointing)
    one_step = load_one_step(config, model_dir, device, schedule, store.empty_prompt(), work)
    check_unet(one_step.unet.unet, store, config)
    batches = BatchBuilder(store, schedule, config, device, with_losers=True)
    engine = open_engine(model, config, world)
    return StepPreferenceTrainer(config, sampler, batches, engine, work, model, files, one_step)


def _open_latent(config: Config, model_dir: Path, device: torch.device, world: World) -> LatentRewardTrainer:
    if config.relabel is not None:
        todo = "remove it: method lrm takes the records' labels"
        raise UserError("relabel needs the scores of a CLIP", "relabel", todo)
    store = open_store(config, model_dir)
    sampler, schedule = open_sampler(config, store), open_schedule(config, model_dir)
    prompt, pooled = store.empty_prompt()
    sizes = [(height, width) for width, height in store.manifest.buckets]
    width, fingerprint = (prompt if pooled is None else pooled).shape[-1], store.manifest.model_fingerprint
    model, facts = open_latent_reward(
        config,
        model_dir,
        device,
        dtype=_master(config),
        text_width=width,
        sizes=sizes,
        model_fingerprint=fingerprint,
    )
    set_recomputation(model.unet, config.gradient_checkpointing)
    check_unet(model.unet, store, config)
    tokenizer = load_block_tokenizers(model_dir, config.max_caption_tokens)[0].tokenizer
    batches = BatchBuilder(store, schedule, config, device, with_losers=True)
    empty = Conditioning(batches.empty_prompt_embeds, batches.empty_pooled)
    engine = open_engine(model, config, world)
    return LatentRewardTrainer(config, sampler, batches, engine, Work(), model, facts, empty, tokenizer)


def _master(config: Config) -> torch.dtype:
    return torch.float64 if config.precision == "fp64" else torch.float32


@dataclass
class PreferenceTrainer(Trainer):
    """All that a step needs; :meth:`step` is the method, :meth:`_scores` what the two models differ in."""

    config: Config
    sampler: Sampler
    batches: BatchBuilder
    engine: Engine
    counted: Work

    def __post_init__(self) -> None:
        self.skipped = 0

    @abstractmethod
    def _scores(self, batch: PairBatch, captions: list[str]) -> torch.Tensor:
        """(2, n): the winners' scores and the losers', with their graph."""

    def describe(self) -> str:
        return f"{len(self.batches.store)} pairs"

    def verify(self) -> None:
        self.batches.store.verify()

    def work(self) -> Work:
        return self.counted

    def restore_work(self, work: Work) -> None:
        vars(self.counted).update(vars(work))  # the same object counts in the UNet and the decoder

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step (0-based); returns its metrics over the global batch."""
        return self.launch(step)()

    def launch(self, step: int) -> Callable[[], dict[str, Any]]:
        """The step without waiting for the device; its numbers are asked for afterwards."""
        rate = learning_rate_at(self.config, step)
        self.engine.begin(step, rate)
        plan, store = self.sampler.batch(step), self.batches.store
        weights = prompt_weights(torch.from_numpy(store.pairs_per_caption(plan.indices)))
        parts = []
        for number, rows in enumerate(self._loader.micro_batches):
            with phase("data"):
                stored = self._loader.take(step, number).stored
            batch, captions = self.batches.build(plan, rows, stored), store.captions(plan.indices[rows])
            with phase("policy forward"):
                winner, loser = self._scores(batch, captions)
            label = moved(self._labels(plan, rows, batch).to(winner.dtype), winner.device)
            with phase("loss"):
                weighted = moved(weights[rows].to(winner.dtype), winner.device)
                weighted = weighted * preference_cross_entropy(winner, loser, label)
            with phase("backward"):
                self.engine.backward(weighted.sum())
            parts.append(torch.stack([winner, loser, label, weighted]).detach())
        with phase("communication"):
            results = self.engine.world.gather(torch.cat(parts, dim=1))
        loss = results[3].double().sum()
        with phase("optimizer"):
            norm = self.engine.launch(rate, loss)
        with phase("logging"):
            figures = Arriving({"loss": loss, **_figures(results), "grad_norm": norm}, winner.device)
        return partial(self._metrics, step, figures, rate)

    @cached_property
    def _loader(self) -> Loader:
        micro = self.micro_batches(self.config.batch_size)
        return Loader(self.sampler, self.batches, micro, with_embeddings=False)

    def _metrics(self, step: int, figures: Arriving, rate: float) -> dict[str, Any]:
        found = self.checked(step, figures.read())
        if math.isnan(found["accuracy"] or 0.0):
            found["accuracy"] = None  # ties only
        return {"step": step + 1, **found, "lr": rate}

    def _labels(self, plan: BatchPlan, rows: slice, batch: PairBatch) -> torch.Tensor:
        """(n,) probability that the winner is preferred."""
        return torch.ones(batch.pairs) if batch.label is None else batch.label

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self.config.precision]
        if dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.batches.device.type, dtype=dtype)


@dataclass
class StepPreferenceTrainer(PreferenceTrainer):
    """Trains a step-aware preference model."""

    model: StepPreferenceModel
    files: PreferenceFiles
    one_step: OneStep

    def __post_init__(self) -> None:
        super().__post_init__()
        self._first_scale = self.model.clip.logit_scale.detach().exp().double().cpu()

    def export(self, run_dir: Path) -> None:
        """The folder ``step_preference_model/``."""
        check_trained(self.model.trainable, run_dir)
        save_step_preference(self.model, self.files, run_dir / FOLDER_NAME)

    def _scores(self, batch: PairBatch, captions: list[str]) -> torch.Tensor:
        images = self.one_step.images(batch.noisy, batch.timesteps, batch.conditioning)
        distinct = list(dict.fromkeys(captions))
        place = {caption: row for row, caption in enumerate(distinct)}
        own = moved(torch.tensor([place[caption] for caption in [*captions, *captions]]), images.device)
        with self._autocast():
            scores = self.model(images, batch.timesteps, distinct, own)
        self.counted.text_forwards += len(distinct)
        self.counted.scorer_forwards += len(images)
        return scores.view(2, -1)

    def _labels(self, plan: BatchPlan, rows: slice, batch: PairBatch) -> torch.Tensor:
        """With ``relabel`` by the scores that the CLIP gave the real pictures before training."""
        if self.config.relabel is None:
            return super()._labels(plan, rows, batch)
        clip = self.batches.store.clip_batch(plan.indices[rows])
        gap = self._first_scale * ((clip.image_w - clip.image_l).double() * clip.text.double()).sum(dim=1)
        surplus = torch.tanh(gap / 2)  # p_w - p_l of a softmax over the two scores
        return 0.5 + 0.5 * torch.sign(surplus) * (surplus.abs() > self.config.relabel)


@dataclass
class LatentRewardTrainer(PreferenceTrainer):
    """Trains a latent reward model."""

    model: LatentRewardModel
    facts: LatentRewardConfig
    empty: Conditioning  # the encoded empty prompt
    tokenizer: Any

    def export(self, run_dir: Path) -> None:
        """The folder ``latent_reward_model/``."""
        check_trained(self.model.trainable, run_dir)
        save_latent_reward(self.model, self.facts, run_dir / LATENT_FOLDER_NAME)

    def _scores(self, batch: PairBatch, captions: list[str]) -> torch.Tensor:
        texts = text_rows(batch.conditioning, [*captions, *captions], self.tokenizer)
        with self._autocast():
            scores = self.model(batch.noisy, batch.timesteps, batch.conditioning, self.empty, texts)
        self.counted.scorer_forwards += self.model.rows(batch.rows)
        return scores.view(2, -1)


def _figures(results: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over the pairs of ``results``: rows winner's score, loser's score, label and so on. A label of one half has
    no winner; equal scores count a half."""
    winner, loser, label = results[:3].double()
    decided = label != 0.5
    right = decided * torch.where(label > 0.5, won(winner, loser), won(loser, winner))
    return {
        "score_winner": winner.mean(),
        "score_loser": loser.mean(),
        "margin": (winner - loser).mean(),
        "accuracy": right.sum() / decided.sum(),
    }


def _check_store(config: Config, store: Store, files: PreferenceFiles) -> None:
    if config.relabel is None:
        return
    if files.weights is not None:
        raise UserError("relabel needs the scores of a plain CLIP", str(files.weights), "set scorer to a CLIP folder")
    if store.manifest.clip_fingerprint != folder_fingerprint(files.clip_dir):
        what = "relabel needs the pictures' embeddings by the CLIP that is trained"
        raise UserError(what, config.store, f"prepare with clip={files.clip_dir}")
