"""The step-aware preference model of SPO (arXiv 2406.04314): a CLIP whose vision tower knows the timestep.

    score(x̂0, t, prompt) = exp(logit_scale) · cos(image(x̂0, t), text(prompt))

Timestep t enters by adaLN (arXiv 2212.09748): h = SiLU(MLP(cos and sin of t)); each layer maps h to shift, scale and
gate of its attention and of its MLP, ``x + gate · f(LN(x)·(1 + scale) + shift)``, and the final layer norm gets a shift
and a scale. At initialisation shifts and scales are 0 and gates 1: the model is the CLIP. The text tower has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpref.memory import moved
from fastpref.models.recompute import Region

FREQUENCIES = 256
_PERIOD = 10_000.0
_INIT_STD = 0.02


@dataclass(frozen=True)
class Preprocess:
    """How decoded pictures become CLIP's pixels: its image size, mean and standard deviation."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] to (N, 3, size, size), as the public SPO code scores: the shorter side to ``size`` by
        torch's bicubic without antialiasing, centre crop, clamp to [0, 1], normalise."""
        height, width = images.shape[-2:]
        scale = self.size / min(height, width)
        new = (int(height * scale + 0.5), int(width * scale + 0.5))
        if new != (height, width):
            images = F.interpolate(images, size=new, mode="bicubic", align_corners=False)
        top, left = (round((side - self.size) / 2) for side in new)
        images = images[..., top : top + self.size, left : left + self.size]
        mean, std = (self._of_channels(values, images) for values in (self.mean, self.std))
        return ((images / 2 + 0.5).clamp(0, 1) - mean) / std

    @staticmethod
    def _of_channels(values: tuple[float, ...], images: Tensor) -> Tensor:
        return moved(torch.tensor(values, dtype=images.dtype), images.device)[:, None, None]


class ClipScorer(nn.Module):
    """A CLIP as a scorer of decoded pictures, differentiable in its weights."""

    def __init__(self, clip: Any, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.preprocess = clip, tokenizer, preprocess

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.clip.logit_scale.dtype

    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """(n, E) unit rows; longer captions are cut at the tokenizer's or the text tower's length."""
        longest = self.clip.config.text_config.max_position_embeddings
        length = min(self.tokenizer.model_max_length, longest)
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        # No padding mask: the text tower is causal and is read at the end of the caption.
        pooled = self.clip.text_model(input_ids=moved(tokens.input_ids, self.device)).pooler_output
        return _unit(self.clip.text_projection(pooled))

    def embed_images(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """(n, E) unit rows of decoded pictures (n, 3, H, W) in [-1, 1]; the plain CLIP ignores ``timesteps`` (n,)."""
        pooled = self.clip.vision_model(pixel_values=self._pixels(images)).pooler_output
        return _unit(self.clip.visual_projection(pooled))

    def score(self, image_rows: Tensor, text_rows: Tensor) -> Tensor:
        """``exp(logit_scale) · cos``, (n,), of unit rows (n, E): row i with row i."""
        scale = self.clip.logit_scale.to(image_rows.dtype).exp()
        return scale * (image_rows * text_rows).sum(dim=-1)

    def _pixels(self, images: Tensor) -> Tensor:
        return self.preprocess(images.to(self.device)).to(self.dtype)


class StepPreferenceModel(ClipScorer):
    """A CLIP with adaLN on its vision tower; equal to the CLIP until it is trained.

    Args:
        clip: a transformers CLIPModel of any size.
        seed: of the timestep MLP's weights.
    """

    def __init__(self, clip: Any, tokenizer: Any, preprocess: Preprocess, seed: int = 0) -> None:
        super().__init__(clip, tokenizer, preprocess)
        width, layers = clip.config.vision_config.hidden_size, clip.config.vision_config.num_hidden_layers
        self.region: Region | None = None  # of a vision layer, if its backward computes something again
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.time_mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
            self.modulations = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(layers))
            self.final_modulation = nn.Linear(width, 2 * width)
            for linear in (self.time_mlp[0], self.time_mlp[2]):
                nn.init.normal_(linear.weight, std=_INIT_STD)
        for linear in (*self.modulations, self.final_modulation):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            for linear in self.modulations:
                linear.bias.view(6, width)[[2, 5]] = 1.0
        self.to(device=clip.logit_scale.device, dtype=clip.logit_scale.dtype)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """All weights by name."""
        return dict(self.named_parameters())

    @property
    def read_from_outside(self) -> tuple[str, ...]:
        """The weights that another module's forward than their own looks at."""
        return ("clip.logit_scale", "clip.text_model.embeddings.position_embedding.weight")

    def forward(self, images: Tensor, timesteps: Tensor, captions: Sequence[str], own: Tensor) -> Tensor:
        """Scores (n,) of decoded pictures at their timesteps, each against ``captions[own]``, ``own`` (n,) int.

        Training calls this and not its parts, because ZeRO-3 gathers weights along forwards.
        """
        texts = self.embed_texts(captions).index_select(0, own)
        return self.score(self.embed_images(images, timesteps), texts)

    def embed_images(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """(n, E) unit rows of decoded pictures (n, 3, H, W) in [-1, 1], seen as x̂0 at ``timesteps`` (n,) int."""
        vision = self.clip.vision_model
        condition = self._condition(timesteps)
        hidden = vision.pre_layrnorm(vision.embeddings(self._pixels(images)))
        for layer, modulation in zip(vision.encoder.layers, self.modulations, strict=True):
            if self.region is not None and torch.is_grad_enabled():
                hidden = self.region(_layer, layer, modulation, hidden, condition)
            else:
                hidden = _layer(layer, modulation, hidden, condition)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        pooled = vision.post_layernorm(hidden[:, 0]) * (1 + scale) + shift
        return _unit(self.clip.visual_projection(pooled))

    def fold(self, timesteps: Sequence[int], resident: int | None = None) -> FoldedPreferenceModel:
        """This model at fixed timesteps with no adaLN left to compute; see :class:`FoldedPreferenceModel`."""
        return FoldedPreferenceModel(self, timesteps, resident)

    def _condition(self, timesteps: Tensor) -> Tensor:
        return F.silu(self.time_mlp(timestep_features(moved(timesteps, self.device)).to(self.dtype)))


class FoldedPreferenceModel(ClipScorer):
    """A step-aware preference model at fixed timesteps: at each of them a plain CLIP with the timestep in its weights.

    ``LN(x)·(1 + scale) + shift`` is a layer norm of other weight and bias, ``gate · f(x)`` an ``out_proj`` or ``fc2``
    with scaled rows. What is kept of a timestep are its modulations, ``6·layers + 2`` vectors; the weights made of
    them (``5·width²`` values a layer) exist for the ``resident`` timesteps used last, by default for all. It holds the
    CLIP's weights by reference, and neither the timestep MLP nor the modulating layers. Inference only.
    """

    def __init__(self, model: StepPreferenceModel, timesteps: Sequence[int], resident: int | None = None) -> None:
        super().__init__(model.clip, model.tokenizer, model.preprocess)
        self.timesteps = sorted({int(t) for t in timesteps})
        self._resident = resident or len(self.timesteps)
        self._folded: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            condition = model._condition(torch.tensor(self.timesteps))
            wide = torch.promote_types(model.dtype, torch.float32)  # half weights are rounded once, when folded
            layers = torch.stack([modulation(condition).to(wide) for modulation in model.modulations], dim=1)
            final = model.final_modulation(condition).to(wide)
        self._modulations = dict(
            zip(self.timesteps, zip(layers.unflatten(-1, (6, -1)), final, strict=True), strict=True)
        )

    @torch.no_grad()
    def embed_images(self, images: Tensor, timesteps: Tensor) -> Tensor:
        """As :meth:`StepPreferenceModel.embed_images`; ValueError for a timestep that is not folded."""
        pixels, rows = self._pixels(images), None
        for timestep in timesteps.unique().tolist():
            chosen = moved((timesteps == timestep).nonzero().flatten(), self.device)
            weights = self.vision_weights(timestep)
            output = torch.func.functional_call(self.clip.vision_model, weights, (pixels[chosen],))
            part = _unit(self.clip.visual_projection(output.pooler_output))
            rows = part.new_empty(len(images), part.shape[-1]) if rows is None else rows
            rows[chosen] = part
        assert rows is not None
        return rows

    def vision_weights(self, timestep: int) -> dict[str, Tensor]:
        """The vision tower's weights that depend on the timestep, under their CLIPVisionModel names."""
        if timestep not in self._modulations:
            raise ValueError(f"timestep {timestep} is not folded, only {self.timesteps} are")
        weights = self._folded.pop(timestep, None)
        if weights is None:
            while len(self._folded) >= self._resident:
                self._folded.pop(next(iter(self._folded)))
            weights = self._fold(*self._modulations[timestep])
        self._folded[timestep] = weights  # the newest at the end
        return weights

    @torch.no_grad()
    def _fold(self, layers: Tensor, final: Tensor) -> dict[str, Tensor]:
        vision, weights = self.clip.vision_model, {}

        def keep(name: str, value: Tensor, like: Tensor) -> None:
            weights[name] = value.to(like.dtype)

        def norm(name: str, module: nn.LayerNorm, shift: Tensor, scale: Tensor) -> None:
            keep(f"{name}.weight", module.weight * (1 + scale), module.weight)
            keep(f"{name}.bias", module.bias * (1 + scale) + shift, module.bias)

        def gated(name: str, module: nn.Linear, gate: Tensor) -> None:
            keep(f"{name}.weight", module.weight * gate[:, None], module.weight)
            keep(f"{name}.bias", module.bias * gate, module.bias)

        for index, (layer, modulation) in enumerate(zip(vision.encoder.layers, layers, strict=True)):
            at, (shift, scale, gate, mlp_shift, mlp_scale, mlp_gate) = f"encoder.layers.{index}", modulation
            norm(f"{at}.layer_norm1", layer.layer_norm1, shift, scale)
            gated(f"{at}.self_attn.out_proj", layer.self_attn.out_proj, gate)
            norm(f"{at}.layer_norm2", layer.layer_norm2, mlp_shift, mlp_scale)
            gated(f"{at}.mlp.fc2", layer.mlp.fc2, mlp_gate)
        norm("post_layernorm", vision.post_layernorm, *final.chunk(2))
        return weights


def timestep_features(timesteps: Tensor) -> Tensor:
    """(N, 256) fp64: the cosines, then the sines, of t·10000^(-i/128), i = 0 … 127."""
    half = FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.double()[:, None] * torch.exp(-math.log(_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _layer(layer: Any, modulation: nn.Linear, hidden: Tensor, condition: Tensor) -> Tensor:
    """One vision layer under adaLN: hidden (n, P, width), condition (n, width)."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(condition)[:, None].chunk(6, dim=-1)
    attended, _ = layer.self_attn(hidden_states=layer.layer_norm1(hidden) * (1 + scale) + shift, attention_mask=None)
    hidden = hidden + gate * attended
    return hidden + mlp_gate * layer.mlp(layer.layer_norm2(hidden) * (1 + mlp_scale) + mlp_shift)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
