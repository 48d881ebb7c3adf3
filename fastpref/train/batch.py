"""From a plan of store rows to what the UNet sees, with all randomness drawn from keys.

A draw is (seed, epoch, sample id); it fixes noise, flip, posterior sample and caption dropout. The timestep belongs to
the contrast group: (seed, epoch, group). Nothing depends on the micro-batch or the rank a pair lands in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fastpref.config import Config
from fastpref.data.sampling import BatchPlan
from fastpref.data.store import ClipBatch, Store, StoreBatch
from fastpref.models.loading import NoiseSchedule
from fastpref.models.policy import Conditioning
from fastpref.objectives.rpo import combine_embeddings
from fastpref_kernels import add_keyed_noise, derive_keys, keyed_noise, keyed_uniform_u32

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
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.alphas_cumprod = schedule.alphas_cumprod.to(device, self.dtype)
        self.empty_prompt_embeds, self.empty_pooled = store.empty_prompt()

    def build(self, plan: BatchPlan, rows: slice) -> PairBatch:
        """The pairs ``plan.indices[rows]``, noised."""
        ids = torch.from_numpy(plan.indices[rows])
        flip = self._coin(plan, ids, "flip", 0.5).numpy() if self.store.manifest.flips else None
        stored = self.store.batch(plan.indices[rows], flip)
        stored = _exchange(stored, self._mislabelled(ids), ("latents", "posterior_std", "time_ids"))
        repeat = 2 if self.with_losers else 1
        keys = self._keys(plan, ids, "noise").repeat(repeat).to(self.device)
        timesteps = self._timesteps(plan, rows).repeat(repeat).to(self.device)
        clean = self._latents(plan, ids, stored)
        noise = keyed_noise(keys, tuple(clean.shape[1:]), self.dtype)
        noisy = add_keyed_noise(clean, keys, timesteps, self.alphas_cumprod)
        return PairBatch(
            noisy=noisy,
            target=noise if self.schedule.prediction_type == "epsilon" else self._velocity(clean, noise, timesteps),
            timesteps=timesteps,
            conditioning=self._conditioning(plan, ids, stored, repeat),
            pairs=len(ids),
            label=stored.label.to(self.device, self.dtype) if self.store.manifest.ties == "half" else None,
        )

    def embeddings(self, plan: BatchPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """``(B, E)`` unit rows of all winners and losers of the global batch; data, so every rank reads them itself."""
        wrong = self._mislabelled(torch.from_numpy(plan.indices))
        related = _exchange(self.store.clip_batch(plan.indices), wrong, ("image",))
        kind = self.config.embedding
        winner = combine_embeddings(kind, related.text, related.image_w)
        loser = combine_embeddings(kind, related.text, related.image_l)
        return winner.to(self.device, self.dtype), loser.to(self.device, self.dtype)

    def _keys(self, plan: BatchPlan, ids: torch.Tensor, purpose: str, draw: int = 0) -> torch.Tensor:
        return derive_keys(self.config.seed, plan.epoch, ids, draw, purpose)

    def _coin(self, plan: BatchPlan, ids: torch.Tensor, purpose: str, share: float) -> torch.Tensor:
        return keyed_uniform_u32(self._keys(plan, ids, purpose)) < int(share * _U32)

    def _mislabelled(self, ids: torch.Tensor) -> torch.Tensor:
        """``(n,)`` bool; like a person's mistake it stays with the pair, so the epoch is left out of the key."""
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
        clean = torch.cat([mean for mean, _ in sides]).to(self.device, self.dtype)
        if sides[0][1] is None:
            return clean
        std = torch.cat([s for _, s in sides if s is not None]).to(self.device, self.dtype)
        keys = torch.cat([self._keys(plan, ids, "posterior", draw) for draw in range(len(sides))]).to(self.device)
        return clean + std * keyed_noise(keys, tuple(clean.shape[1:]), self.dtype)

    def _velocity(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

    def _conditioning(self, plan: BatchPlan, ids: torch.Tensor, stored: StoreBatch, repeat: int) -> Conditioning:
        prompt = stored.prompt_embeds.to(self.device, self.dtype)
        pooled = None
        if stored.pooled_prompt_embeds is not None:
            pooled = stored.pooled_prompt_embeds.to(self.device, self.dtype)
        if self.config.caption_dropout:
            dropped = self._coin(plan, ids, "caption", self.config.caption_dropout).to(self.device)
            prompt = torch.where(dropped[:, None, None], self.empty_prompt_embeds.to(self.device, self.dtype), prompt)
            if pooled is not None and self.empty_pooled is not None:
                pooled = torch.where(dropped[:, None], self.empty_pooled.to(self.device, self.dtype), pooled)
        time_ids = None
        if stored.time_ids_w is not None:
            sides = [stored.time_ids_w, stored.time_ids_l][:repeat]
            time_ids = torch.cat(sides).to(self.device, self.dtype)
        return Conditioning(prompt.repeat(repeat, 1, 1), None if pooled is None else pooled.repeat(repeat, 1), time_ids)


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
