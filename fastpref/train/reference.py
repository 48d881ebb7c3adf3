"""``fastpref prepare --reference``: the reference ledger of a recipe, and how training opens it.

It is computed in fp32, in forwards of ``prepare_batch_size`` pairs, for half-precision training too, of the weights as
they are there: then the logit ``β/2·Δreward`` has the noise of the policy's rounding alone, where a reference that is
rounded adds its own as soon as the LoRA has left zero (benchmarks/ledger_noise.py). With ``ledger_precision: training``
it is the pass of the training itself, ``micro_batch_size`` pairs a forward, whose roundings cancel until then.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastpref.config import Config
from fastpref.config_rules import LEDGER_METHODS
from fastpref.data.ledger import OWN_SIZES, Facts, Ledger, Part
from fastpref.data.prepare import rank_device
from fastpref.data.progress import Bars
from fastpref.data.sampling import BatchPlan, Sampler
from fastpref.data.store import Store
from fastpref.data.workspace import Ranks
from fastpref.errors import UserError
from fastpref.models.fp32_reference import Fp32Reference
from fastpref.models.fused_ops import fuses
from fastpref.models.loading import model_dir_of, resolve_device, unet_fingerprint
from fastpref.models.noise_schedule import NoiseSchedule
from fastpref.models.policy import Policy, autocasts, load_reference
from fastpref.models.time_ids import target_time_ids
from fastpref.train.batch import BatchBuilder, PairBatch
from fastpref.train.inputs import check_unet, open_sampler, open_schedule, open_store
from fastpref_kernels import implicit_reward


def open_ledger(config: Config, model_dir: Path, store: Store, sampler: Sampler, schedule: NoiseSchedule) -> Ledger:
    """The ledger that the recipe trains with.

    Raises:
        UserError: it is not there, made for something else, too short or damaged.
    """
    ledger = ledger_of(config, model_dir, store, sampler, schedule)
    ledger.check(steps_to_look_up(config, sampler))
    return ledger


def ledger_of(config: Config, model_dir: Path, store: Store, sampler: Sampler, schedule: NoiseSchedule) -> Ledger:
    """The recipe's ledger, whatever of it is there."""
    own = ("seed", "batch_size", "sampling", "timestep_range", "caption_dropout", "label_noise", "precision")
    half, rounded = in_half_precision(config), rounds_as_training(config)
    noise_levels = schedule.alphas_cumprod.numpy().tobytes() + schedule.prediction_type.encode()
    facts = Facts(
        reference=unet_fingerprint(model_dir, config.unet, config.init_lora),
        store=store.manifest.fingerprint,
        schedule=hashlib.sha256(noise_levels).hexdigest(),
        group_size=config.group,
        size_conditioning=sizes_told(config, store),
        micro_batch_size=config.micro_batch if rounded else None,
        autocast=autocasts(config) if half else None,
        fused_ops=fuses(config.fused_ops, resolve_device(config.device)) if rounded else None,
        ledger_precision=config.ledger_precision if half else None,
        **{name: getattr(config, name) for name in (*own, *(("attention", "compile") if rounded else ()))},
    )
    return Ledger(store.path, facts, sampler.batches_per_epoch)


def sizes_told(config: Config, store: Store) -> str:
    """``size_conditioning``, or OWN_SIZES where every picture of the store is told its own size under it.

    That is how all was made before the setting existed.
    """
    if store.manifest.family != "sdxl":
        return OWN_SIZES
    for bucket in np.unique(store.bucket_ids):
        at = np.flatnonzero(store.bucket_ids == bucket)
        winners, losers = store.time_ids(at)
        told = winners if config.size_conditioning == "winner" else target_time_ids(store.size(at[0]), len(at))
        if not (torch.equal(told, winners) and torch.equal(told, losers)):
            return config.size_conditioning
    return OWN_SIZES


def in_half_precision(config: Config) -> bool:
    """Whether predictions are rounded to 16 bits."""
    return config.precision in ("bf16", "fp16")


def rounds_as_training(config: Config) -> bool:
    """Whether the ledger is rounded to 16 bits, in the very pass of the training."""
    return in_half_precision(config) and config.ledger_precision == "training"


def pairs_per_call(config: Config) -> int:
    """Pairs of a forward of ``prepare --reference``."""
    return config.micro_batch if rounds_as_training(config) else config.prepare_batch_size


def steps_to_look_up(config: Config, sampler: Sampler) -> int:
    """Optimizer steps whose draws differ."""
    return min(config.steps, (config.draws or config.steps) * sampler.batches_per_epoch)


def open_reference(config: Config, model_dir: Path, device: torch.device) -> Policy:
    """The model that computes the recipe's ledger."""
    if in_half_precision(config) and not rounds_as_training(config):
        return Fp32Reference(config, model_dir, device)
    return load_reference(config, model_dir, device)


@dataclass(frozen=True)
class LedgerSummary:
    """What ``prepare --reference`` did, or would do."""

    path: Path
    steps: int
    draws: int
    rows: int  # that passed the reference in this call
    found: int  # parts of this rank that were there already
    seconds: float
    dry_run: bool = False

    def __str__(self) -> str:
        head = "dry run, nothing written" if self.dry_run else "up to date" if not self.rows else "reference ledger"
        lines = [f"{self.path}: {head}", f"  {self.steps} steps, {self.draws} draws of a pair"]
        lines.append(f"  {self.rows} rows through the reference, {self.seconds:.1f} s; {self.found} files were there")
        return "\n".join(lines)


def prepare_reference(config: Config, *, dry_run: bool = False, progress: bool = True) -> LedgerSummary:
    """Write what is missing of the recipe's ledger; each rank of a launcher takes its share of the parts.

    Raises:
        UserError: the recipe has no use for a ledger, or store and model do not fit.
    """
    started = time.perf_counter()
    if config.method not in LEDGER_METHODS:
        raise UserError(f"method {config.method} has no reference ledger", "method", "dpo and rpo have one")
    ranks = Ranks.from_env()
    model_dir, device = model_dir_of(config), rank_device(config, ranks)
    store, schedule = open_store(config, model_dir), open_schedule(config, model_dir)
    sampler = open_sampler(config, store)
    ledger = ledger_of(config, model_dir, store, sampler, schedule)
    steps = steps_to_look_up(config, sampler)
    wanted = [part for _, part in ranks.share(list(ledger.parts(steps)))]
    todo = [part for part in wanted if not (ledger.path / part.file).is_file()]
    rows = sum(2 * len(part.steps) * config.batch_size for part in todo)
    if todo and not dry_run:
        writer = _Writer(config, open_reference(config, model_dir, device), sampler, store, schedule)
        writer.write(ledger, todo, progress and ranks.rank == 0)
    draws, seconds = -(-steps // sampler.batches_per_epoch), time.perf_counter() - started
    return LedgerSummary(ledger.path, steps, draws, rows, len(wanted) - len(todo), seconds, dry_run)


class _Stretch(NamedTuple):
    """Pairs of one bucket, in the order of the steps, and where in a part they belong."""

    plan: BatchPlan
    steps: np.ndarray  # (n,) row of the part
    places: np.ndarray  # (n,) place in the batch


class _Writer:
    """Runs the reference over the draws of a recipe."""

    def __init__(
        self, config: Config, reference: Policy, sampler: Sampler, store: Store, schedule: NoiseSchedule
    ) -> None:
        check_unet(reference.unet, store, config)
        reference.share_prompts()
        self.config, self.reference, self.sampler, self.store = config, reference, sampler, store
        self.builder = BatchBuilder(store, schedule, config, reference.device, with_losers=True)
        self.pairs_per_call = pairs_per_call(config)

    def write(self, ledger: Ledger, parts: list[Part], progress: bool) -> None:
        """Write the parts, one file each."""
        ledger.begin()
        with Bars(progress, None) as bars:
            advance = bars.add("pairs through the reference", sum(len(p.steps) * self.config.batch_size for p in parts))
            for part in parts:
                errors = torch.empty(len(part.steps), 2, self.config.batch_size, dtype=ledger.dtype)
                for stretch in self._stretches(part):
                    self._fill(errors, stretch, advance)
                ledger.write(part, errors)

    def _stretches(self, part: Part) -> list[_Stretch]:
        """The part's batches joined by bucket, whose latents have one size."""
        start = part.draw * self.sampler.batches_per_epoch
        by_bucket: defaultdict[int, list[tuple[int, BatchPlan]]] = defaultdict(list)
        for at, step in enumerate(part.steps):
            plan = self.sampler.batch(start + step)
            by_bucket[int(self.store.bucket_ids[plan.indices[0]])].append((at, plan))
        joined = []
        for found in by_bucket.values():
            indices = np.concatenate([plan.indices for _, plan in found])
            groups = np.concatenate([plan.groups for _, plan in found])
            steps = np.repeat([at for at, _ in found], self.config.batch_size)
            places = np.tile(np.arange(self.config.batch_size), len(found))
            joined.append(_Stretch(BatchPlan(part.draw, indices, groups), steps, places))
        return joined

    def _fill(self, errors: torch.Tensor, stretch: _Stretch, advance: Callable[[int], None]) -> None:
        for start in range(0, len(stretch.steps), self.pairs_per_call):
            rows = slice(start, min(start + self.pairs_per_call, len(stretch.steps)))
            found = self._errors(self.builder.build(stretch.plan, rows)).view(2, -1).to("cpu", errors.dtype)
            errors[stretch.steps[rows], :, stretch.places[rows]] = found.T
            advance(rows.stop - rows.start)

    def _errors(self, batch: PairBatch) -> torch.Tensor:
        pred = self.reference.predict_reference(batch.noisy, batch.timesteps, batch.conditioning)
        return -implicit_reward(pred, batch.target)
