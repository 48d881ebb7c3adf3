"""From a plan of store rows to what the UNet sees, with all randomness drawn from keys.

A draw is (seed, epoch, sample id); it fixes noise, flip, posterior sample and caption dropout. The timestep belongs to
the contrast group: (seed, epoch, group). Nothing depends on the micro-batch or the rank a pair lands in.

Both pictures of a pair have one condition: DPO's derivation drops the partition function Z(c) only where winner and
loser share c. Were each told the size of its own file, the model could lower the loss by reading the size, which is
constant when it samples. By default SDXL is told of every pair that it is a whole picture of the training resolution,
which is what it is told when sampling; with ``size_conditioning: winner`` of both that they have the size and the crop
of the winner's file. RPO contrasts winner i with loser j of other pairs of the same bucket: under ``target`` all have
one size; under ``winner`` theirs may differ as their prompts do, by what belongs to the pair and not to the side.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from fastpref.config import Config
from fastpref.data.sampling import BatchPlan
from fastpref.data.store import ClipBatch, Store, StoreBatch
from fastpref.memory import moved, pinned
from fastpref.models.noise_schedule import NoiseSchedule
from fastpref.models.policy import Conditioning
from fastpref.models.time_ids import target_time_ids
from fastpref.objectives.rpo import combine_embeddings
from fastpref.process.ddpm import noising
from fastpref.train.profile import phase
from fastpref_kernels import Purpose, derive_keys, keyed_noise, keyed_uniform_u32

_U32 = 1 << 32
Pairs = TypeVar("Pairs", StoreBatch, ClipBatch)


@dataclass
class PairBatch:
    """n pairs ready for the UNet: winners in rows 0..n-1, then (unless only winners are trained) their losers."""

    noisy: torch.Tensor  # (n or 2n, C, H, W)
    target: torch.Tensor  # ε or v, like noisy
    timesteps: torch.Tensor  # (n or 2n,) int64
    conditioning: Conditioning
    pairs: int
    label: torch.Tensor | None = None  # (n,) where the store keeps ties as halves

    @property
    def rows(self) -> int:
        """Rows of one forward."""
        return len(self.noisy)


class BatchBuilder:
    """Builds :class:`PairBatch` from the store for one recipe."""

    def __init__(
        self, store: Store, schedule: NoiseSchedule, config: Config, device: torch.device, *, with_losers: bool
    ) -> None:
        self.store, self.schedule, self.config, self.device = store, schedule, config, device
        self.with_losers = with_losers
        self.winner_sized = config.size_conditioning == "winner"
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.noising = noising(schedule.alphas_cumprod, schedule.prediction_type).to(device, self.dtype)
        prompt, pooled = store.empty_prompt()
        self.empty_prompt_embeds, self.empty_pooled = self.moved(prompt), None if pooled is None else self.moved(pooled)

    def read(self, plan: BatchPlan, rows: slice) -> StoreBatch:
        """What the store holds of the pairs ``plan.indices[rows]``, flipped and exchanged as their keys say; for a GPU
        in pinned memory, so that the copy to it does not wait."""
        ids = torch.from_numpy(plan.indices[rows])
        flip = self._coin(plan, ids, "flip", 0.5).numpy() if self.store.manifest.flips else None
        stored = self.store.batch(plan.indices[rows], flip, sizes=self.winner_sized)
        stored = _exchange(stored, self._mislabelled(ids), ("latents", "posterior_std", "time_ids"))
        there = {field.name: getattr(stored, field.name) for field in fields(stored)}
        return StoreBatch(**{name: None if value is None else self._pin(value) for name, value in there.items()})

    def build(self, plan: BatchPlan, rows: slice, stored: StoreBatch | None = None) -> PairBatch:
        """The pairs ``plan.indices[rows]``, noised; ``stored`` is what :meth:`read` gave for them."""
        with phase("data"):
            stored = self.read(plan, rows) if stored is None else stored
            ids = torch.from_numpy(plan.indices[rows])
            repeat = 2 if self.with_losers else 1
            conditioning = self._conditioning(plan, ids, stored, repeat)
            label = self.moved(stored.label) if self.store.manifest.ties == "half" else None
        with phase("noise"):
            timesteps = self.moved(self._timesteps(plan, rows).repeat(repeat))
            clean = self._latents(plan, ids, stored)
            keys = self.moved(self._keys(plan, ids, "noise"))
            # Drawn once for both pictures of a pair and for the target: on a CPU it is most of what a batch costs.
            noise = keyed_noise(keys, tuple(clean.shape[1:]), self.dtype).repeat(repeat, 1, 1, 1)
            epsilon = self.schedule.prediction_type == "epsilon"
            needed = self.noising[: 2 if epsilon else 4]  # a gather is a launch
            a, s, *of_target = (x[timesteps].view(-1, 1, 1, 1) for x in needed)
            noisy = clean * a + noise * s
            target = noise if epsilon else noise * of_target[0] + clean * of_target[1]
        return PairBatch(noisy, target, timesteps, conditioning, len(ids), label)

    def embeddings(self, plan: BatchPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B, E)`` unit rows of all winners and losers of the global batch, in the store's memory or pinned; data, so
        every rank reads them itself."""
        wrong = self._mislabelled(torch.from_numpy(plan.indices))
        related = _exchange(self.store.clip_batch(plan.indices), wrong, ("image",))
        kind = self.config.embedding
        winner = combine_embeddings(kind, related.text, related.image_w)
        loser = combine_embeddings(kind, related.text, related.image_l)
        return self._pin(winner), self._pin(loser)

    def moved(self, values: torch.Tensor) -> torch.Tensor:
        """On the device, numbers in the working precision."""
        there = moved(values, self.device)
        return there.to(self.dtype) if values.is_floating_point() else there

    def _pin(self, values: torch.Tensor) -> torch.Tensor:
        return pinned(values) if self.device.type == "cuda" else values

    def _keys(self, plan: BatchPlan, ids: torch.Tensor, purpose: Purpose, draw: int = 0) -> torch.Tensor:
        return derive_keys(self.config.seed, plan.epoch, ids, draw, purpose)

    def _coin(self, plan: BatchPlan, ids: torch.Tensor, purpose: Purpose, share: float) -> torch.Tensor:
        return keyed_uniform_u32(self._keys(plan, ids, purpose)) < int(share * _U32)

    def _mislabelled(self, ids: torch.Tensor) -> torch.Tensor:
        """``(n,)`` bool; like a person's mistake it stays with the pair, so the epoch is left out of the key."""
        if not self.config.label_noise:
            return torch.zeros(len(ids), dtype=torch.bool)
        word = keyed_uniform_u32(derive_keys(self.config.seed, 0, ids, 0, "label"))
        return word < int(self.config.label_noise * _U32)

    def _timesteps(self, plan: BatchPlan, rows: slice) -> torch.Tensor:
        low, high = self.config.timestep_range or (0, self.schedule.num_train_timesteps)
        word = keyed_uniform_u32(self._keys(plan, torch.from_numpy(plan.groups[rows]), "timestep"))
        return low + ((word * (high - low)) >> 32)

    def _latents(self, plan: BatchPlan, ids: torch.Tensor, stored: StoreBatch) -> torch.Tensor:
        sides = [(stored.latents_w, stored.posterior_std_w)]
        if self.with_losers:
            sides.append((stored.latents_l, stored.posterior_std_l))
        clean = torch.cat([self.moved(mean) for mean, _ in sides])
        if sides[0][1] is None:
            return clean
        std = torch.cat([self.moved(s) for _, s in sides if s is not None])
        keys = self.moved(torch.cat([self._keys(plan, ids, "posterior", draw) for draw in range(len(sides))]))
        return clean + std * keyed_noise(keys, tuple(clean.shape[1:]), self.dtype)

    def _conditioning(self, plan: BatchPlan, ids: torch.Tensor, stored: StoreBatch, repeat: int) -> Conditioning:
        prompt = self.moved(stored.prompt_embeds)
        pooled = None
        if stored.pooled_prompt_embeds is not None:
            pooled = self.moved(stored.pooled_prompt_embeds)
        if self.config.caption_dropout:
            dropped = self.moved(self._coin(plan, ids, "caption", self.config.caption_dropout))
            prompt = torch.where(dropped[:, None, None], self.empty_prompt_embeds, prompt)
            if pooled is not None and self.empty_pooled is not None:
                pooled = torch.where(dropped[:, None], self.empty_pooled, pooled)
        if pooled is None:
            return Conditioning(prompt.repeat(repeat, 1, 1))
        size = self.store.size(int(ids[0]))
        sizes = target_time_ids(size, len(ids)) if stored.time_ids_w is None else stored.time_ids_w
        return Conditioning(prompt.repeat(repeat, 1, 1), pooled.repeat(repeat, 1), self.moved(sizes).repeat(repeat, 1))


def _exchange(pairs: Pairs, wrong: torch.Tensor, names: tuple[str, ...]) -> Pairs:
    """``pairs`` with the fields ``<name>_w`` and ``<name>_l`` exchanged in the rows that are ``wrong``."""
    if not bool(wrong.any()):
        return pairs
    changed = {}
    for name in names:
        winner, loser = getattr(pairs, f"{name}_w"), getattr(pairs, f"{name}_l")
        if winner is not None:
            mask = wrong.view(-1, *[1] * (winner.ndim - 1))
            changed[f"{name}_w"] = torch.where(mask, loser, winner)
            changed[f"{name}_l"] = torch.where(mask, winner, loser)
    return replace(pairs, **changed)
