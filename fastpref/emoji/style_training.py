"""Training of the style encoder on real pictures, shifted, blurred and noisy ones included."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastpref.emoji import STYLE_DIR
from fastpref.emoji.records import EmojiImages
from fastpref.emoji.style import StyleEncoder
from fastpref.emoji.training import (
    Fit,
    FitResult,
    FitSettings,
    Workspace,
    blur,
    degrade,
    random_shift,
    stage_generator,
    to_tensor,
)

BATCH = 96
SETTINGS = FitSettings("style", steps=900, learning_rate=2e-3, warmup=50, weight_decay=0.02, ema_decay=0.995)
NOISE_STD, BLUR_SIGMA = 0.1, 1.0


@torch.no_grad()
def style_accuracy(encoder: StyleEncoder, images: EmojiImages, seed: int) -> dict[str, float]:
    """Share of pictures, both styles, whose style is told right: clean, blurred (sigma 1 px) and noisy (std 0.1)."""
    pictures = torch.cat([to_tensor(images.flat), to_tensor(images.line)])
    truth = torch.arange(2).repeat_interleave(len(images.captions))
    noise = NOISE_STD * torch.randn(pictures.shape, generator=stage_generator(seed, "style-accuracy", 0))
    variants = {
        "clean": pictures,
        "blurred": blur(pictures, torch.full((len(pictures),), BLUR_SIGMA)),
        "noisy": (pictures + noise).clamp(0.0, 1.0),
    }
    return {
        name: round(float((encoder(variant).style_logits.argmax(1) == truth).float().mean()), 4)
        for name, variant in variants.items()
    }


def export_style(encoder: StyleEncoder, accuracy: dict[str, dict[str, float]], folder: Path) -> None:
    """Write fp16 weights and config.json to a temporary name, then put the folder in place."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: tensor.half().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(weights, temporary / "model.safetensors")
    config = encoder.config | {"style_accuracy": accuracy, "noise_std": NOISE_STD, "blur_sigma": BLUR_SIGMA}
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def build_style(train: EmojiImages, heldout: EmojiImages, work: Workspace) -> FitResult:
    """Train styles and concepts jointly; states the accuracies on training and held-out pictures."""
    concepts = len(train.captions)
    pictures = torch.cat([to_tensor(train.flat), to_tensor(train.line)])
    torch.manual_seed(work.seed)
    encoder = StyleEncoder(concepts)

    def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(pictures), (BATCH,), generator=generator)
        output = encoder(degrade(random_shift(pictures[index], 2, generator), generator))
        style = nn.functional.cross_entropy(output.style_logits, index // concepts)
        concept = nn.functional.cross_entropy(output.concept_logits, index % concepts)
        return {"loss": style + 0.3 * concept, "style": style.detach(), "concept": concept.detach()}

    result = Fit(encoder, SETTINGS, work).run(loss)
    accuracy = {
        "train": style_accuracy(encoder, train, work.seed),
        "heldout": style_accuracy(encoder, heldout, work.seed),
    }
    for split, figures in accuracy.items():
        result.metrics |= {f"style_accuracy_{split}_{name}": value for name, value in figures.items()}
    export_style(encoder, accuracy, STYLE_DIR)
    return result
