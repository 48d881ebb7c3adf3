"""The frozen base model's guess of the finished picture from any noisy latent: one guided forward, one decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpref.config import Config
from fastpref.models.guidance import empty_conditioning, guided, predicted_x0
from fastpref.models.loading import DTYPES, load_unet, load_vae
from fastpref.models.noise_schedule import NoiseSchedule
from fastpref.models.policy import Conditioning, call_unet
from fastpref.models.vae import decode
from fastpref.models.work import Work


class LatentDecoder:
    """A VAE's decoder that never sees more than ``chunk`` latents at once, nor more than :mod:`fastpref.models.vae`
    gives it."""

    def __init__(self, vae: Any, chunk: int, work: Work) -> None:
        self.vae, self.chunk, self.work = vae, chunk, work

    @torch.no_grad()
    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, h, w), scaled as the UNet takes them, to pictures (N, 3, H, W) in [-1, 1] or a bit beyond.

        fp32, or fp64 if the VAE is.
        """
        parts = [decode(self.vae, part) for part in latents.split(self.chunk)]
        self.work.vae_decodes += len(latents)
        return torch.cat(parts)


def load_decoder(config: Config, model_dir: Path, device: torch.device, work: Work) -> LatentDecoder:
    """The decoder of ``model_dir``'s VAE in ``config.vae_precision`` (fp64 if ``precision`` is), for a scorer."""
    precision = "fp64" if config.precision == "fp64" else config.vae_precision
    vae = load_vae(model_dir, precision, device, judged_in=config.precision)
    return LatentDecoder(vae, config.decode_batch_size, work)


class FrozenUNet:
    """A UNet that is not trained; rows that pass through it are counted."""

    def __init__(self, unet: Any, dtype: torch.dtype, work: Work) -> None:
        self.unet, self.dtype, self.work = unet, dtype, work

    @torch.no_grad()
    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The prediction (N, C, H, W)."""
        self.work.unet_forwards += len(noisy)
        return call_unet(self.unet, noisy, timesteps, conditioning, self.dtype)


@dataclass
class OneStep:
    """x̂0 under guidance, decoded."""

    unet: FrozenUNet
    decoder: LatentDecoder
    schedule: NoiseSchedule
    empty: Conditioning
    guidance_scale: float

    @torch.no_grad()
    def latents(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """x̂0 (N, C, h, w) of ``noisy``, in its dtype."""
        prediction = guided(self.unet.predict, noisy, timesteps, conditioning, self.empty, self.guidance_scale)
        return predicted_x0(prediction, noisy, timesteps, self.schedule)

    def images(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The pictures (N, 3, H, W) they promise, in [-1, 1] or a bit beyond."""
        return self.decoder.images(self.latents(noisy, timesteps, conditioning))


def load_one_step(
    config: Config,
    model_dir: Path,
    device: torch.device,
    schedule: NoiseSchedule,
    empty_prompt: tuple[torch.Tensor, torch.Tensor | None],
    work: Work,
) -> OneStep:
    """The UNet of ``model_dir`` (or ``config.unet``) and its VAE, both frozen.

    The UNet is in ``config.precision``, the VAE in ``config.vae_precision`` (fp64 if ``precision`` is).

    Args:
        empty_prompt: ``prompt_embeds (1, L, D)`` and, for SDXL, ``pooled_prompt_embeds (1, P)``.
    """
    dtype = DTYPES[config.precision]
    unet = load_unet(model_dir, dtype, config.unet).to(device).eval().requires_grad_(False)
    return OneStep(
        FrozenUNet(unet, dtype, work),
        load_decoder(config, model_dir, device, work),
        schedule,
        empty_conditioning(model_dir, *empty_prompt),
        config.guidance_scale,
    )
