"""Training of the style encoder on real pictures, shifted, mirrored, grey, blurred and noisy ones included.

The blur and noise that each picture was given are predicted from its features, so that the features, and with them
``style_distance``, move when pictures get worse; the style has to be told all the same.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastpref.atomic import make_directory
from fastpref.emoji import STYLE_DIR, STYLES
from fastpref.emoji.records import EmojiImages
from fastpref.emoji.style import StyleEncoder, StyleOutput
from fastpref.emoji.training import (
    Fit,
    FitResult,
    FitSettings,
    Workspace,
    blur,
    random_shift,
    stage_generator,
    to_tensor,
)

BATCH = 96
SETTINGS = FitSettings("style", steps=2600, learning_rate=2e-3, warmup=50, weight_decay=0.02, ema_decay=0.995)
NOISE_STD, BLUR_SIGMA = 0.1, 1.0  # at which the accuracy is stated
MAX_NOISE_STD, MIN_BLUR_SIGMA, MAX_BLUR_SIGMA = 0.2, 0.4, 1.4  # trained on
GREY_SHARE = 0.2  # pictures of either style without colour, which alone would tell most of them apart
LABEL_SMOOTHING = 0.1


def degrade_known(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blur a third of the pictures (N, C, H, W) in [0, 1] and add noise to half of them; (N, 2) how much of each.

    The amounts are in the order of ``style.DEGRADATIONS``, 0 for none and 1 for the most.
    """
    n = len(images)
    blurred = torch.rand(n, generator=generator) < 1 / 3
    sigma = MIN_BLUR_SIGMA + (MAX_BLUR_SIGMA - MIN_BLUR_SIGMA) * torch.rand(n, generator=generator)
    images = torch.where(blurred.view(n, 1, 1, 1), blur(images, sigma), images)
    share = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < 0.5)
    noise = torch.randn(images.shape, generator=generator) * (MAX_NOISE_STD * share).view(n, 1, 1, 1)
    amounts = torch.stack([share, torch.where(blurred, sigma / MAX_BLUR_SIGMA, 0.0)], dim=1)
    return (images + noise).clamp(0.0, 1.0), amounts


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 2 pixels, mirror half of the pictures, take the colour from a fifth."""
    images, n = random_shift(images, 2, generator), len(images)
    mirrored = torch.rand(n, generator=generator) < 0.5
    images = torch.where(mirrored.view(n, 1, 1, 1), images.flip(3), images)
    grey = torch.rand(n, generator=generator) < GREY_SHARE
    return torch.where(grey.view(n, 1, 1, 1), images.mean(1, keepdim=True).expand_as(images), images)


def style_loss(output: StyleOutput, styles: Tensor, concepts: Tensor, amounts: Tensor) -> dict[str, Tensor]:
    """Cross-entropies of style and concept, squared error of the degradations, and their weighted sum ``loss``."""
    style = nn.functional.cross_entropy(output.style_logits, styles)
    concept = nn.functional.cross_entropy(output.concept_logits, concepts, label_smoothing=LABEL_SMOOTHING)
    amount = nn.functional.mse_loss(output.degradations, amounts)
    parts = {"style": style.detach(), "concept": concept.detach(), "degradation": amount.detach()}
    return {"loss": style + 0.3 * concept + 4.0 * amount, **parts}


@dataclass(frozen=True)
class Labelled:
    """Pictures ``(N, 3, H, W)`` in [0, 1] with their styles ``(N,)`` and concepts ``(N,)``, indices from 0."""

    pictures: Tensor
    styles: Tensor
    concepts: Tensor

    @classmethod
    def of_emoji(cls, images: EmojiImages) -> Labelled:
        """Both styles of the bundled pictures."""
        count = len(images.captions)
        pictures = torch.cat([to_tensor(images.flat), to_tensor(images.line)])
        return cls(pictures, torch.arange(2).repeat_interleave(count), torch.arange(count).repeat(2))


@torch.no_grad()
def style_accuracy(encoder: StyleEncoder, images: Labelled, seed: int) -> dict[str, float]:
    """Share of pictures whose style is told right: clean, blurred (sigma 1 px) and noisy (std 0.1)."""
    pictures = images.pictures
    noise = NOISE_STD * torch.randn(pictures.shape, generator=stage_generator(seed, "style-accuracy", 0))
    variants = {
        "clean": pictures,
        "blurred": blur(pictures, torch.full((len(pictures),), BLUR_SIGMA)),
        "noisy": (pictures + noise).clamp(0.0, 1.0),
    }
    return {
        name: round(float((encoder(variant).style_logits.argmax(1) == images.styles).float().mean()), 4)
        for name, variant in variants.items()
    }


def export_style(
    encoder: StyleEncoder, accuracy: dict[str, dict[str, float]], folder: Path, extra: dict[str, Any] | None = None
) -> None:
    """Write fp16 weights and config.json (``extra`` in it) to a temporary name, then put the folder in place."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_directory(temporary)
    weights = {name: tensor.half().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(weights, temporary / "model.safetensors")
    stated = {"style_accuracy": accuracy, "noise_std": NOISE_STD, "blur_sigma": BLUR_SIGMA}
    (temporary / "config.json").write_text(json.dumps(encoder.config | stated | (extra or {}), indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def fit_style_encoder(
    train: Labelled,
    heldout: Labelled,
    folder: Path,
    work: Workspace,
    settings: FitSettings,
    *,
    batch: int = BATCH,
    styles: tuple[str, ...] = STYLES,
    extra: dict[str, Any] | None = None,
) -> FitResult:
    """Train styles, concepts and degradations jointly and export the encoder with its accuracies.

    Args:
        train: square pictures; their size becomes the encoder's.
        heldout: pictures of concepts that are not in ``train``, for the accuracy only.
        folder: where the encoder goes. extra: what else its config.json states.
    """
    torch.manual_seed(work.seed)
    encoder = StyleEncoder(int(train.concepts.max()) + 1, image_size=train.pictures.shape[-1], styles=styles)

    def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(train.pictures), (batch,), generator=generator)
        images, amounts = degrade_known(augment(train.pictures[index], generator), generator)
        return style_loss(encoder(images), train.styles[index], train.concepts[index], amounts)

    result = Fit(encoder, settings, work).run(loss)
    accuracy = {"train": style_accuracy(encoder, train, work.seed)}
    accuracy["heldout"] = style_accuracy(encoder, heldout, work.seed)
    for split, figures in accuracy.items():
        result.metrics |= {f"style_accuracy_{split}_{name}": value for name, value in figures.items()}
    export_style(encoder, accuracy, folder, extra)
    return result


def build_style(train: EmojiImages, heldout: EmojiImages, work: Workspace) -> FitResult:
    """The bundled encoder; states the accuracies on training and held-out pictures."""
    return fit_style_encoder(Labelled.of_emoji(train), Labelled.of_emoji(heldout), STYLE_DIR, work, SETTINGS)
