"""The latent reward model of LPO (arXiv 2502.01051): half a diffusion UNet that judges noisy latents.

    score(x_t, t, prompt) = exp(logit_scale) · cos(P_v·pool(x_t, t, prompt), P_t·text(prompt))

pool joins the spatial means of every down stage (before it downsamples) and of the mid block; no up block, no VAE and
no x̂0 is needed. The mid block's means are enhanced as classifier-free guidance enhances a prediction (the paper's
visual feature enhancement): ``m_empty + s·(m_prompt - m_empty)``, where empty is the encoded empty prompt, for SDXL
too. text is the pooled row that SDXL's UNet is given, or the row of the end-of-text token for SD1.5.

Left out of the paper's method: its multi-preference consistent filtering of the pairs (filter the records beforehand)
and the training of the text encoders, which here stay the base model's. In their stead P_t is trained for SDXL as
well; it starts as the identity, or for SD1.5 as a given CLIP's text projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpref.memory import moved
from fastpref.models.guidance import with_empty
from fastpref.models.policy import Conditioning

_FIRST_LOGIT_SCALE = 2.6592  # ln(1 / 0.07), CLIP's (arXiv 2103.00020)
_INIT_STD = 0.02


class LatentRewardModel(nn.Module):
    """A scorer of noisy latents, differentiable in its weights.

    Args:
        unet: a UNet2DConditionModel; it loses its up blocks.
        text_width: of the text rows, and of both projections' results.
        guidance_scale: s above; 1 leaves out the rows of the empty prompt.
        seed: of the visual projection's weights.
        text_projection: (text_width, text_width) to start P_t from; None: the identity.
    """

    def __init__(
        self,
        unet: Any,
        text_width: int,
        guidance_scale: float,
        seed: int = 0,
        text_projection: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.guidance_scale = without_up_blocks(unet), guidance_scale
        stages = unet.config.block_out_channels
        self.visual_projection = nn.Linear(sum(stages) + stages[-1], text_width, bias=False)
        self.text_projection = nn.Linear(text_width, text_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(_FIRST_LOGIT_SCALE))
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.visual_projection.weight.normal_(std=_INIT_STD, generator=g)
            if text_projection is None:
                nn.init.eye_(self.text_projection.weight)
            else:
                self.text_projection.weight.copy_(text_projection)
        self.to(device=unet.device, dtype=unet.dtype)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """All weights by name."""
        return dict(self.named_parameters())

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.logit_scale.dtype

    def rows(self, latents: int) -> int:
        """Rows of the UNet that so many latents cost."""
        return latents if self.guidance_scale == 1.0 else 2 * latents

    def forward(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, empty: Conditioning, texts: Tensor
    ) -> Tensor:
        """Scores (n,) of noisy latents against their text rows (n, width); see :meth:`embed_latents`.

        Training calls this and not its parts, because ZeRO-3 gathers weights along forwards.
        """
        latents = self.embed_latents(noisy, timesteps, conditioning, empty)
        return self.score(latents, self.embed_texts(texts))

    def embed_latents(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning, empty: Conditioning
    ) -> Tensor:
        """(n, E) unit rows of noisy latents (n, C, h, w) at ``timesteps`` (n,).

        Args:
            conditioning: n rows. empty: one row, the encoded empty prompt; looked at unless the guidance scale is 1.
        """
        n = len(noisy)
        if self.guidance_scale != 1.0:
            conditioning = with_empty(conditioning, empty)
            noisy, timesteps = noisy.repeat(2, 1, 1, 1), timesteps.repeat(2)
        *stages, mid = self.pooled(noisy, timesteps, conditioning)
        if self.guidance_scale != 1.0:
            without, prompted = mid.chunk(2)
            mid = without + self.guidance_scale * (prompted - without)
            stages = [stage[n:] for stage in stages]
        return _unit(self.visual_projection(torch.cat([*stages, mid], dim=1)))

    def pooled(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Spatial means (n, channels) of each down stage and of the mid block."""
        unet, text = self.unet, conditioning.prompt_embeds.to(self.dtype)
        added = conditioning.kwargs(self.dtype).get("added_cond_kwargs")
        noisy = noisy.to(self.dtype)
        embedded = unet.time_embedding(unet.get_time_embed(sample=noisy, timestep=timesteps))
        more = unet.get_aug_embed(emb=embedded, encoder_hidden_states=text, added_cond_kwargs=added)
        embedded = embedded if more is None else embedded + more
        hidden, means = unet.conv_in(noisy), []
        for block in unet.down_blocks:
            hidden, states = _call(block, hidden, embedded, text)
            means.append(states[len(block.resnets) - 1].mean(dim=(2, 3)))
        return [*means, _call(unet.mid_block, hidden, embedded, text).mean(dim=(2, 3))]

    def embed_texts(self, rows: Tensor) -> Tensor:
        """(n, E) unit rows of the text rows (n, E) that :func:`text_rows` gives."""
        return _unit(self.text_projection(rows.to(self.dtype)))

    def score(self, latent_rows: Tensor, text_rows: Tensor) -> Tensor:
        """``exp(logit_scale) · cos``, (n,), of unit rows (n, E): row i with row i."""
        return self.logit_scale.to(latent_rows.dtype).exp() * (latent_rows * text_rows).sum(dim=-1)


def without_up_blocks(unet: Any) -> Any:
    """The same UNet, which from now on holds only what leads to its mid block."""
    unet.up_blocks = nn.ModuleList()
    unet.conv_norm_out = unet.conv_act = unet.conv_out = None
    return unet


def text_rows(conditioning: Conditioning, captions: Sequence[str], tokenizer: Any) -> Tensor:
    """(n, E): what the text encoder says of each caption as a whole.

    SDXL: the pooled row. SD1.5: the row of the first end-of-text token, which CLIP pools; ``tokenizer`` finds it. Of a
    caption in several blocks both are those of the first.
    """
    if conditioning.pooled_prompt_embeds is not None:
        return conditioning.pooled_prompt_embeds
    tokens = tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    ends = (tokens.input_ids == tokenizer.eos_token_id).int().argmax(dim=1)  # padding may be the same token
    embeds = conditioning.prompt_embeds
    return embeds[torch.arange(len(embeds), device=embeds.device), moved(ends, embeds.device)]


def _call(block: Any, hidden: Tensor, embedded: Tensor, text: Tensor) -> Any:
    if getattr(block, "has_cross_attention", False):
        return block(hidden, embedded, encoder_hidden_states=text)
    return block(hidden, embedded)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
