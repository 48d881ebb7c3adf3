"""Training the step-aware preference model (SPO, arXiv 2406.04314, section 3.2).

One optimizer step: draw the global batch; noise winner and loser with the same noise at the same timestep; predict x̂0
with the frozen base model under guidance, one step; decode; score both pictures against the prompt, conditioned on the
timestep; cross-entropy with the label, weighted by 1 / (pairs with that prompt), normalised over the global batch. The
weights are known beforehand and the loss is a sum over pairs, so micro-batches and ranks add up to the exact gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpref.config import Config
from fastpref.data.sampling import BatchPlan, Sampler
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.models.loading import DTYPES, folder_fingerprint
from fastpref.models.one_step import OneStep, load_one_step
from fastpref.models.step_preference import StepPreferenceModel
from fastpref.models.step_preference_file import (
    FOLDER_NAME,
    PreferenceFiles,
    load_step_preference,
    resolve_step_preference,
    save_step_preference,
)
from fastpref.models.work import Work
from fastpref.objectives.step_preference import preference_cross_entropy, prompt_weights
from fastpref.train.batch import BatchBuilder, PairBatch
from fastpref.train.engine import Engine, LocalEngine
from fastpref.train.inputs import check_unet, open_sampler, open_schedule, open_store
from fastpref.train.trainer import Trainer, take_averages


def open_trainer(config: Config, model_dir: Path, device: torch.device) -> StepPreferenceTrainer:
    """Check store, models and batch arithmetic, and load what is trained and what is frozen.

    Raises:
        UserError: anything that would stop the training later and can be known now.
    """
    files = resolve_step_preference(config.scorer, config.clip)
    store = open_store(config, model_dir)
    _check_store(config, store, files)
    sampler, schedule, work = open_sampler(config, store), open_schedule(config, model_dir), Work()
    master = torch.float64 if config.precision == "fp64" else torch.float32
    model = load_step_preference(files, device=device, dtype=master, seed=config.seed)
    model.recompute = config.gradient_checkpointing
    one_step = load_one_step(config, model_dir, device, schedule, store.empty_prompt(), work)
    check_unet(one_step.unet.unet, store, config)
    batches = BatchBuilder(store, schedule, config, device, with_losers=True)
    engine = LocalEngine(model, config)
    return StepPreferenceTrainer(config, model, files, one_step, sampler, batches, engine, work)


@dataclass
class StepPreferenceTrainer(Trainer):
    """All that a step needs; :meth:`step` is the method."""

    config: Config
    model: StepPreferenceModel
    files: PreferenceFiles
    one_step: OneStep
    sampler: Sampler
    batches: BatchBuilder
    engine: Engine
    counted: Work
    skipped: int = 0

    def __post_init__(self) -> None:
        self._first_scale = self.model.clip.logit_scale.detach().exp().double()

    def describe(self) -> str:
        return f"{len(self.batches.store)} pairs"

    def work(self) -> Work:
        return self.counted

    def restore_work(self, work: Work) -> None:
        vars(self.counted).update(vars(work))  # the same object counts in the UNet and the decoder

    def step(self, step: int) -> dict[str, Any]:
        """One optimizer step (0-based); returns its metrics over the global batch."""
        plan = self.sampler.batch(step)
        weights = prompt_weights(torch.from_numpy(self.batches.store.pairs_per_caption(plan.indices)))
        parts = []
        for rows in self.micro_batches(self.config.batch_size):
            batch = self.batches.build(plan, rows)
            winner, loser = self._scores(batch, self.batches.store.captions(plan.indices[rows]))
            label = self._labels(plan, rows, batch).to(winner)
            weighted = weights[rows].to(winner) * preference_cross_entropy(winner, loser, label)
            if bool(torch.isfinite(weighted).all()):
                self.engine.backward(weighted.sum())
            parts.append(torch.stack([winner, loser, label, weighted]).detach())
        results = self.engine.gather(torch.cat(parts, dim=1))
        loss = float(results[3].double().sum())
        norm, rate = self.update(step, loss)
        return {"step": step + 1, "loss": loss, **_figures(results), "grad_norm": norm, "lr": rate}

    def export(self, run_dir: Path) -> None:
        """The folder ``step_preference_model/``."""
        take_averages(self.model.trainable, self.engine)
        save_step_preference(self.model, self.files, run_dir / FOLDER_NAME)

    def _scores(self, batch: PairBatch, captions: list[str]) -> torch.Tensor:
        """(2, n): the winners' scores and the losers', with their graph."""
        images = self.one_step.images(batch.noisy, batch.timesteps, batch.conditioning)
        distinct = list(dict.fromkeys(captions))
        place = {caption: row for row, caption in enumerate(distinct)}
        own = torch.tensor([place[caption] for caption in captions], device=images.device)
        with self._autocast():
            texts = self.model.embed_texts(distinct).index_select(0, own)
            pictures = self.model.embed_images(images, batch.timesteps)
        self.counted.text_forwards += len(distinct)
        self.counted.scorer_forwards += len(images)
        return self.model.score(pictures, texts.repeat(2, 1)).view(2, -1)

    def _labels(self, plan: BatchPlan, rows: slice, batch: PairBatch) -> torch.Tensor:
        """(n,) probability that the winner is preferred."""
        if self.config.relabel is None:
            return torch.ones(batch.pairs) if batch.label is None else batch.label
        clip = self.batches.store.clip_batch(plan.indices[rows])
        gap = self._first_scale.cpu() * ((clip.image_w - clip.image_l).double() * clip.text.double()).sum(dim=1)
        surplus = torch.tanh(gap / 2)  # p_w - p_l of a softmax over the two scores
        return 0.5 + 0.5 * torch.sign(surplus) * (surplus.abs() > self.config.relabel)

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self.config.precision]
        if dtype in (torch.float32, torch.float64):
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=dtype)


def _figures(results: torch.Tensor) -> dict[str, float | None]:
    """Means over the pairs of ``results``: rows winner's score, loser's score, label and so on. Ties have no winner."""
    winner, loser, label = results[:3].double()
    right = ((winner - loser) * (label - 0.5) > 0)[label != 0.5]
    return {
        "score_winner": float(winner.mean()),
        "score_loser": float(loser.mean()),
        "margin": float((winner - loser).mean()),
        "accuracy": float(right.double().mean()) if len(right) else None,
    }


def _check_store(config: Config, store: Store, files: PreferenceFiles) -> None:
    if config.relabel is None:
        return
    if files.weights is not None:
        raise UserError("relabel needs the scores of a plain CLIP", str(files.weights), "set scorer to a CLIP folder")
    if store.manifest.clip_fingerprint != folder_fingerprint(files.clip_dir):
        what = "relabel needs the pictures' embeddings by the CLIP that is trained"
        raise UserError(what, config.store, f"prepare with clip={files.clip_dir}")
