"""The bundled CLIPModel: captions and 32x32 pictures of either style in one space, for similarities and retrieval."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig

from fastpref.emoji import CLIP_DIR, IMAGE_SIZE
from fastpref.emoji.pipeline import token_ids
from fastpref.emoji.random_models import clip_image_processor, text_config
from fastpref.emoji.records import EmojiImages
from fastpref.emoji.tokenizer import save_tokenizer_files, train_tokenizer
from fastpref.emoji.training import (
    Fit,
    FitResult,
    FitSettings,
    Workspace,
    declare_float32,
    degrade,
    random_shift,
    to_tensor,
)

CAPTIONS_PER_BATCH = 64
PROJECTION = 96
SETTINGS = FitSettings("clip", steps=900, learning_rate=1.5e-3, warmup=100, weight_decay=0.05, ema_decay=0.995)


def new_clip(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """An untrained CLIP of about 1 M parameters: 16 patches of 8x8 pixels, two-layer text tower."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=PROJECTION,
    )
    clip = CLIPModel(
        CLIPConfig(
            text_config=text_config(tokenizer, 64, 2, PROJECTION), vision_config=vision, projection_dim=PROJECTION
        )
    )
    nn.init.normal_(clip.text_model.get_input_embeddings().weight, std=0.2)
    return clip


def embed_texts(clip: CLIPModel, input_ids: Tensor) -> Tensor:
    """(N, E) unit rows for token ids (N, L)."""
    pooled = clip.text_model(input_ids).pooler_output
    return nn.functional.normalize(clip.text_projection(pooled), dim=-1)


def embed_images(clip: CLIPModel, images: Tensor) -> Tensor:
    """(N, E) unit rows for pictures (N, 3, 32, 32) in [0, 1]."""
    pooled = clip.vision_model(images * 2.0 - 1.0).pooler_output
    return nn.functional.normalize(clip.visual_projection(pooled), dim=-1)


def contrastive_loss(clip: CLIPModel, texts: Tensor, images: Tensor) -> Tensor:
    """CLIP's loss where caption i owns the pictures i and C + i: texts (C, E), images (2C, E), unit rows."""
    logits = clip.logit_scale.exp().clamp_max(100.0) * images @ texts.T
    own = torch.arange(len(texts))
    by_image = nn.functional.cross_entropy(logits, own.repeat(2))
    flat, line = logits.T.chunk(2, 1)
    by_text = nn.functional.cross_entropy(flat, own) + nn.functional.cross_entropy(line, own)
    return 0.5 * by_image + 0.25 * by_text


@torch.no_grad()
def retrieval(clip: CLIPModel, texts: Tensor, images: Tensor) -> dict[str, float]:
    """Share of pictures whose caption is the first, or among the first five, of all captions of the set."""
    rank = (embed_images(clip, images) @ embed_texts(clip, texts).T).argsort(1, descending=True)
    hits = rank == torch.arange(len(texts))[:, None]
    return {"top1": float(hits[:, 0].float().mean()), "top5": float(hits[:, :5].any(1).float().mean())}


def export_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write model (fp16), tokenizer and image processor to a temporary name, then put the folder in place."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    clip.half().save_pretrained(temporary)
    declare_float32(temporary / "config.json")
    tokenizer.save_pretrained(temporary)
    clip_image_processor(IMAGE_SIZE).save_pretrained(temporary)
    save_tokenizer_files(temporary, ("",))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def build_clip(train: EmojiImages, heldout: EmojiImages, work: Workspace) -> FitResult:
    """Train on both styles of the training captions; states retrieval on training and held-out pictures."""
    tokenizer = train_tokenizer(train.captions)
    input_ids, pixels = token_ids(tokenizer, train.captions), (to_tensor(train.flat), to_tensor(train.line))
    clip = new_clip(tokenizer, work.seed)

    def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randperm(len(input_ids), generator=generator)[:CAPTIONS_PER_BATCH]
        images = torch.cat([style[index] for style in pixels])
        images = degrade(random_shift(images, 2, generator), generator)
        return {"loss": contrastive_loss(clip, embed_texts(clip, input_ids[index]), embed_images(clip, images))}

    result = Fit(clip, SETTINGS, work).run(loss)
    for split, images in (("train", train), ("heldout", heldout)):
        ids = token_ids(tokenizer, images.captions)
        for style in ("flat", "line"):
            scores = retrieval(clip, ids, to_tensor(getattr(images, style)))
            result.metrics |= {f"{split}_{style}_{name}": value for name, value in scores.items()}
    export_clip(clip, tokenizer, CLIP_DIR)
    return result
