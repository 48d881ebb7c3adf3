"""The bundled SDXL: UNet and both text encoders, trained together on latents of both styles with no style word."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastpref.emoji import IMAGE_SIZE
from fastpref.emoji.random_models import text_config
from fastpref.models.time_ids import target_time_ids

CHANNELS = (48, 96, 192)
TEXT_WIDTH = 96
TEXT_LAYERS = 3  # SDXL reads the penultimate layer, so two of them act on the prompt embeddings
TIME_ID_WIDTH = 16
CAPTION_DROPOUT = 0.1
SNR_GAMMA = 5.0


def new_scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise schedule: scaled-linear betas, 1000 timesteps, epsilon prediction."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )


def new_unet(channels: tuple[int, ...] = CHANNELS) -> UNet2DConditionModel:
    """An untrained SDXL UNet for 4x16x16 latents; attention at 8x8 and 4x4 only."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=tuple(max(1, c // 32) for c in channels),  # diffusers' name for the number of heads
        norm_num_groups=16,
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_ID_WIDTH,
    )


class TextToLatents(nn.Module):
    """What is trained in one go: the UNet and the two text encoders that feed it."""

    def __init__(self, tokenizer: CLIPTokenizer, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        config = text_config(tokenizer, TEXT_WIDTH, TEXT_LAYERS, TEXT_WIDTH)
        self.text_encoder = CLIPTextModel(config)
        self.text_encoder_2 = CLIPTextModelWithProjection(config)
        for encoder in (self.text_encoder, self.text_encoder_2):
            # CLIP's initial embeddings (std 0.02) leave the concepts indistinguishable for thousands of steps.
            nn.init.normal_(encoder.get_input_embeddings().weight, std=0.2)
        self.unet = new_unet()
        self.predict = self.unet.forward

    def encode(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """SDXL's prompt embeddings (N, L, 2 x width) and pooled embedding (N, width) of token ids (N, L)."""
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Predicted noise for scaled noisy latents (N, 4, 16, 16)."""
        prompt_embeds, pooled = self.encode(input_ids)
        conditions = {"text_embeds": pooled, "time_ids": target_time_ids((IMAGE_SIZE, IMAGE_SIZE), len(noisy))}
        return self.predict(noisy, timesteps, prompt_embeds, added_cond_kwargs=conditions, return_dict=False)[0]


@dataclass(frozen=True)
class LatentWorld:
    """Scaled latents (2, N, 4, 16, 16), flat then line art, token ids (N, L), those of the empty prompt (L,)."""

    latents: Tensor
    input_ids: Tensor
    empty_ids: Tensor
    alphas_cumprod: Tensor

    def loss(
        self, model: TextToLatents, batch: int, generator: torch.Generator, *, flat_share: float = 0.5
    ) -> dict[str, Tensor]:
        """Min-SNR-weighted epsilon loss (Hang et al. 2023, gamma 5) on captions drawn with a style by coin each.

        Args:
            flat_share: probability of flat colour.
        """
        _, captions, *shape = self.latents.shape
        index = torch.randint(captions, (batch,), generator=generator)
        clean = self.latents[(torch.rand(batch, generator=generator) >= flat_share).long(), index]
        dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        input_ids = torch.where(dropped[:, None], self.empty_ids, self.input_ids[index])
        # One timestep in each of ``batch`` equal slices of the schedule: less variance at the same law.
        slices = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
        timesteps = (slices * (len(self.alphas_cumprod) / batch)).long()
        noise = torch.randn((batch, *shape), generator=generator)
        abar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        mse = (model(noisy, timesteps, input_ids).float() - noise).pow(2).mean((1, 2, 3))
        snr = (abar / (1 - abar)).flatten()
        return {"loss": (mse * snr.clamp_max(SNR_GAMMA) / snr).mean(), "mse": mse.detach().mean()}
