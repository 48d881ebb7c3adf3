"""SFT, Diffusion-DPO and RPO by the order of work of the public scripts, to measure ours against.

As in diffusers' train_diffusion_dpo_sdxl.py and the DPO paper's train.py every step decodes its pictures, encodes them
with the VAE and its captions with the text encoders, runs policy and reference one after the other, and reads its
figures back with ``.item()``. For RPO, which has no public code, the CLIP embeddings are computed in the step too, as
the paper describes them. Weights, order of the data, noise, timesteps, clipping and optimizer are those of our
trainer, so that both sides do the same to their weights; noise and timesteps are handed in.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from fastpref.config import Config
from fastpref.data.buckets import Size
from fastpref.data.images import load_rgb, to_bucket
from fastpref.data.records import Record, check_row, open_records
from fastpref.models.loading import DTYPES, load_vae, model_dir_of, resolve_device
from fastpref.models.policy import load_policy
from fastpref.models.similarity import load_clip, resolve_clip_dir
from fastpref.models.text import load_text_stack
from fastpref.train.optim import build_optimizer, learning_rate_at

_VAE_BATCH = 8


class LiteralOffline:
    """The models of a recipe under the literal order of work.

    Args:
        records: numbers of the records that the trainer's store holds, in the store's order.
    """

    def __init__(self, config: Config, records: np.ndarray) -> None:
        if config.flips or config.posterior or config.caption_dropout or config.label_noise or config.safeguard:
            raise ValueError("the literal trainer has no flips, posterior, dropout, label noise or safeguard")
        if config.train != "lora" or config.init_lora is not None:
            raise ValueError("the literal trainer is for a LoRA that starts from nothing")
        self.config, device = config.model_copy(update={"compile": False}), resolve_device(config.device)
        self.device, folder, frozen = device, model_dir_of(config), DTYPES[config.precision]
        self.unet: Any = load_policy(self.config, folder, device, needs_reference=False).unet
        self.trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(config, self.trained)
        self.vae: Any = load_vae(folder, "fp64" if config.precision == "fp64" else config.vae_precision, device)
        self.texts = load_text_stack(folder, frozen, device, config.max_caption_tokens)
        self.clip = load_clip(resolve_clip_dir(str(config.clip)), device) if config.method == "rpo" else None
        self.noising = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        source = open_records(config.records)
        checked = [check_row(row) for row in source.rows(np.sort(records))]
        by_number = {record.index: record for record in checked if isinstance(record, Record)}
        self.records = [by_number[int(number)] for number in records]
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.done = 0

    def step(self, indices: np.ndarray, noise: Tensor, timesteps: Tensor) -> float:
        """One optimizer step on the pairs ``indices`` (n,), ``noise`` (n, C, h, w) and ``timesteps`` (n,) theirs."""
        losers = self.config.method != "sft"
        with self._span("pictures"):
            pictures, pixels = self._pictures(indices, losers)
        with self._span("VAE"):
            latents = self._latents(pixels)
        with self._span("text encoders"):
            captions = [self.records[i].caption for i in indices]
            prompt, pooled = self._encoded(captions)
        repeat = 2 if losers else 1
        eps, t = noise.to(self.device).repeat(repeat, 1, 1, 1), timesteps.to(self.device).repeat(repeat)
        noisy = self.noising.add_noise(latents, eps, t)
        target = eps if self.noising.config.prediction_type == "epsilon" else self.noising.get_velocity(latents, eps, t)
        inputs = (noisy, t, prompt.repeat(repeat, 1, 1), self._conditions(pooled, len(indices), repeat))
        with self._span("policy forward"):
            errors = self._errors(inputs, target)
        loss, figures = errors.mean(), {}
        if losers:
            with self._span("reference"), torch.no_grad():
                self.unet.disable_adapters()
                reference = self._errors(inputs, target)
                self.unet.enable_adapters()
            loss, figures = self._preference(errors, reference, captions, pictures)
        with self._span("backward"):
            loss.backward()
        with self._span("optimizer"):
            if self.config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
            self.optimizer.param_groups[0]["lr"] = learning_rate_at(self.config, self.done)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.done += 1
        logs = {"loss": loss.detach().item()} | {name: value.detach().item() for name, value in figures.items()}
        return logs["loss"]

    def _pictures(self, indices: np.ndarray, losers: bool) -> tuple[list[Any], Tensor]:
        """Decoded pictures of the batch, winners first, and their pixels in [-1, 1]."""
        size: Size = (self.config.resolution, self.config.resolution)
        sides = [self.records[i].winner for i in indices] + [self.records[i].loser for i in indices if losers]
        found = [load_rgb(side, self.config.max_image_pixels) for side in sides]
        cropped = [to_bucket(picture, size) for picture in found]
        pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 127.5 - 1.0 for p in cropped])
        return found, pixels

    @torch.no_grad()
    def _latents(self, pixels: Tensor) -> Tensor:
        rows = [
            self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist.mode()
            for part in pixels.split(_VAE_BATCH)
        ]
        dtype = torch.float64 if self.config.precision == "fp64" else torch.float32
        shift = self.vae.config.shift_factor or 0.0
        return ((torch.cat(rows).float() - shift) * self.vae.config.scaling_factor).to(dtype)

    @torch.no_grad()
    def _encoded(self, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        return self.texts.encode(captions)

    def _conditions(self, pooled: Tensor | None, pairs: int, repeat: int) -> dict[str, Tensor] | None:
        if pooled is None:
            return None
        side = self.config.resolution
        ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=pooled.dtype).to(self.device)
        return {"text_embeds": pooled.repeat(repeat, 1), "time_ids": ids.repeat(repeat * pairs, 1)}

    def _errors(self, inputs: tuple[Any, ...], target: Tensor) -> Tensor:
        noisy, t, prompt, conditions = inputs
        dtype = DTYPES[self.config.precision]
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, dtype if half else torch.bfloat16, enabled=half):
            pred = self.unet(noisy.to(dtype), t, prompt.to(dtype), added_cond_kwargs=conditions).sample
        return F.mse_loss(pred.float() if pred.dtype != torch.float64 else pred, target, reduction="none").mean(
            dim=(1, 2, 3)
        )

    def _preference(
        self, errors: Tensor, reference: Tensor, captions: list[str], pictures: list[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """DPO's loss as the public script writes it, or RPO's over all pairs of the batch."""
        error_w, error_l = errors.chunk(2)
        reference_w, reference_l = reference.chunk(2)
        scale = -0.5 * self.config.beta
        inside = scale * ((error_w - error_l) - (reference_w - reference_l))
        if self.clip is None:
            loss = -F.logsigmoid(inside).mean()
        else:
            with self._span("CLIP"):
                omega = self._omega(captions, pictures)
            apart = scale * ((error_w - reference_w)[:, None] - (error_l - reference_l)[None, :])
            loss = -(omega * F.logsigmoid(apart)).sum(dim=1).mean()
        figures = {"raw_model_loss": errors.mean(), "ref_loss": reference.mean()}
        ties = 0.5 * (inside == 0).double().mean()
        return loss, figures | {"implicit_acc": (inside > 0).double().mean() + ties}

    def _omega(self, captions: list[str], pictures: list[Any]) -> Tensor:
        """How related each winner is to each loser, a softmax over the losers."""
        assert self.clip is not None
        text, images, sides = self.clip.text(captions), self._clip_images(pictures), []
        for image in images.chunk(2):
            sides.append(F.normalize(torch.cat([text, image], dim=1), dim=1))
        return (sides[0] @ sides[1].T / self.config.temperature).softmax(dim=1).to(self.device)

    def _clip_images(self, pictures: list[Any]) -> Tensor:
        assert self.clip is not None
        size: Size = (self.config.resolution, self.config.resolution)
        return self.clip.images([to_bucket(picture, size) for picture in pictures])

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began
