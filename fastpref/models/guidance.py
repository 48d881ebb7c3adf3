"""Classifier-free guidance and the picture that a noisy latent promises, for any UNet that predicts ε or v."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from fastpref.memory import moved
from fastpref.models.loading import model_family, read_part_json
from fastpref.models.noise_schedule import NoiseSchedule
from fastpref.models.policy import Conditioning
from fastpref.process.ddpm import x0_coefficients


class Predict(Protocol):
    """(noisy (N, C, H, W), timesteps (N,), conditioning of N rows) to a prediction like noisy."""

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, /) -> torch.Tensor: ...


def guided(
    predict: Predict,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    empty: Conditioning,
    guidance_scale: float,
) -> torch.Tensor:
    """``e_empty + s·(e_prompt - e_empty)``, from one call of 2N rows; s = 1 is one of N rows (arXiv 2207.12598).

    Args:
        conditioning: N rows. empty: one row, what guidance leads away from (see :func:`empty_conditioning`).

    Returns:
        (N, C, H, W) in the dtype of ``noisy``; carries a graph if ``predict`` does.
    """
    prompted, without = GuidedRows(predict, conditioning, empty, guidance_scale)(noisy, timesteps)
    prompted = prompted.to(noisy.dtype)
    if without is None:
        return prompted
    without = without.to(noisy.dtype)
    return without + guidance_scale * (prompted - without)


class GuidedRows:
    """Both predictions that guidance combines, for N rows that keep their prompts over many calls.

    Args:
        conditioning: N rows. empty: one row. guidance_scale: 1 is no guidance, one UNet row each instead of two.
    """

    def __init__(
        self, predict: Predict, conditioning: Conditioning, empty: Conditioning, guidance_scale: float
    ) -> None:
        self.predict, self.two = predict, guidance_scale != 1.0
        self.conditioning = with_empty(conditioning, empty) if self.two else conditioning

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(with the prompt, without it or None), each (N, C, H, W) as ``predict`` gives them, from one call."""
        return both_predictions(self.predict, noisy, timesteps, self.conditioning, two=self.two)


def both_predictions(
    predict: Predict, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, *, two: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :class:`GuidedRows` gives them; ``conditioning`` has a row for each of the UNet's, 2N if ``two``."""
    if not two:
        return predict(noisy, timesteps, conditioning), None
    without, prompted = predict(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), conditioning).chunk(2)
    return prompted, without


def with_empty(conditioning: Conditioning, empty: Conditioning) -> Conditioning:
    """2N rows: N times the empty prompt, then ``conditioning``; both halves have its time ids."""
    rows = len(conditioning.prompt_embeds)

    def joined(one: torch.Tensor, many: torch.Tensor) -> torch.Tensor:
        return torch.cat([moved(one, many.device).to(many.dtype).expand(rows, *one.shape[1:]), many])

    pooled, time_ids = conditioning.pooled_prompt_embeds, conditioning.time_ids
    if pooled is not None:
        assert empty.pooled_prompt_embeds is not None
        pooled = joined(empty.pooled_prompt_embeds, pooled)
    return Conditioning(
        joined(empty.prompt_embeds, conditioning.prompt_embeds),
        pooled,
        None if time_ids is None else time_ids.repeat(2, 1),
    )


def empty_conditioning(model_dir: Path, prompt_embeds: torch.Tensor, pooled: torch.Tensor | None) -> Conditioning:
    """What the pipeline takes for no prompt: the encoded empty prompt, or zeros where its folder says so (SDXL base).

    Args:
        prompt_embeds: (1, L, D) of the empty prompt. pooled: (1, P), SDXL only.
    """
    if model_family(model_dir) == "sdxl" and read_part_json(model_dir / "model_index.json").get(
        "force_zeros_for_empty_prompt", True
    ):
        return Conditioning(torch.zeros_like(prompt_embeds), None if pooled is None else torch.zeros_like(pooled))
    return Conditioning(prompt_embeds, pooled)


def predicted_x0(
    prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor, schedule: NoiseSchedule
) -> torch.Tensor:
    """x̂0 of ``noisy`` (N, C, H, W): ``(x_t - √(1-ᾱ)·ε) / √ᾱ``, or ``√ᾱ·x_t - √(1-ᾱ)·v`` (arXiv 2202.00512)."""
    abar = moved(schedule.alphas_cumprod, noisy.device)[timesteps].view(-1, 1, 1, 1)
    u, w = (x.to(noisy.dtype) for x in x0_coefficients(abar, schedule.prediction_type))
    return u * noisy + w * prediction
