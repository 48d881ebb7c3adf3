"""The reference in fp32, of the weights and inputs that a half-precision pass has.

Rounding a weight or a prompt to half precision changes policy and reference alike and is no noise; rounding what is
computed from them is. So what training rounds before its pass is rounded here too, and the rest is fp32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastpref.config import Config
from fastpref.models.half_pass import wide_names
from fastpref.models.loading import DTYPES
from fastpref.models.policy import Conditioning, Policy, autocasts, load_reference


def widened(config: Config) -> Config:
    """The settings of ``config``'s reference in fp32."""
    # An attention that was chosen may know half precision only, and any of them will do.
    return config.model_copy(update={"precision": "fp32", "attention": "auto", "engine": "local"})


class Fp32Reference(Policy):
    """The reference of a half-precision recipe, for :meth:`Policy.predict_reference` in fp32."""

    def __init__(self, config: Config, model_dir: Path, device: torch.device) -> None:
        wide = widened(config)
        loaded = load_reference(wide, model_dir, device)
        _round_weights(loaded.unet, config)
        super().__init__(loaded.unet, wide, device, loaded.reference_unet)
        self._half, self._narrow_ends = DTYPES[config.precision], autocasts(config)

    def predict_reference(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """As :meth:`Policy.predict_reference`; a GPU multiplies in TF32, 8 times finer than bf16 and not slow."""
        before = torch.get_float32_matmul_precision()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        try:
            return super().predict_reference(noisy, timesteps, conditioning)
        finally:
            torch.set_float32_matmul_precision(before)

    @torch.no_grad()
    def reference_pass(self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """As :meth:`Policy.reference_pass`, of inputs that are rounded as training rounds them."""
        pooled = conditioning.pooled_prompt_embeds
        if self._narrow_ends:
            noisy, pooled = noisy.to(self._half), None if pooled is None else pooled.to(self._half)
        prompts = conditioning.prompt_embeds.to(self._half)
        return super().reference_pass(
            noisy, timesteps, replace(conditioning, prompt_embeds=prompts, pooled_prompt_embeds=pooled)
        )


def _round_weights(unet: Any, config: Config) -> None:
    """Give weights the values that they have in the half-precision pass of ``config``."""
    half = DTYPES[config.precision]
    wide = set() if autocasts(config) else wide_names(unet)
    for name, parameter in unet.named_parameters():
        read_in_half = config.pure_bf16 or (config.train == "lora" and ".lora_" not in name)  # see load_policy
        if read_in_half or name not in wide:
            parameter.data = parameter.data.to(half).to(torch.float32)
