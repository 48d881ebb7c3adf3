"""The model card: figures of the build, styles drawn by guidance, retrieval, a page of samples."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from fastpref.emoji import CLIP_DIR, EMOJI_DIR, MODEL_DIR, STYLE_DIR
from fastpref.emoji.clip import embed_images, embed_texts
from fastpref.emoji.pipeline import token_ids
from fastpref.emoji.records import EmojiImages
from fastpref.emoji.style import load_style_encoder
from fastpref.emoji.training import Workspace, to_tensor

GUIDANCE_SCALES = (1.5, 3.0, 5.0)
PAGE_GUIDANCE, SAMPLE_STEPS = 3.0, 25
CAPTIONS, SEEDS, PAGE_SEEDS = 32, 4, 4
CARD, PAGE = EMOJI_DIR / "MODEL_CARD.md", EMOJI_DIR / "model_card_samples.png"


def sample(
    pipeline: StableDiffusionXLPipeline, captions: list[str], seeds: int, guidance_scale: float, batch: int = 32
) -> np.ndarray:
    """(captions, seeds, 32, 32, 3) uint8; the noise is a function of caption and seed, not of the batch."""
    jobs = [(caption, zlib.crc32(caption.encode()) + seed) for caption in captions for seed in range(seeds)]
    images: list[np.ndarray] = []
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        result = pipeline(
            prompt=[caption for caption, _ in part],
            generator=[torch.Generator().manual_seed(seed) for _, seed in part],
            guidance_scale=guidance_scale,
            num_inference_steps=SAMPLE_STEPS,
            output_type="np",
        )
        images += [np.round(image * 255.0).astype(np.uint8) for image in result.images]
    return np.stack(images).reshape(len(captions), seeds, *images[0].shape)


class Judges:
    """The bundled CLIP and style encoder, and what they say of pictures."""

    def __init__(self) -> None:
        self.clip = CLIPModel.from_pretrained(CLIP_DIR).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(CLIP_DIR)
        self.style = load_style_encoder(STYLE_DIR)

    @torch.no_grad()
    def line_share(self, images: Tensor) -> float:
        """Share of pictures (N, 3, 32, 32) that the style encoder takes for line art."""
        return float(self.style(images).style_logits.argmax(1).float().mean())

    @torch.no_grad()
    def retrieval(self, captions: list[str], images: Tensor, truth: Tensor) -> tuple[float, float]:
        """Top-1 and top-5 share of pictures for which caption ``truth`` is among the nearest of ``captions``."""
        texts = embed_texts(self.clip, token_ids(self.tokenizer, captions))
        rank = (embed_images(self.clip, images) @ texts.T).argsort(1, descending=True)
        hits = rank == truth[:, None]
        return float(hits[:, 0].float().mean()), float(hits[:, :5].any(1).float().mean())


def spread(captions: list[str], count: int) -> list[int]:
    """``count`` indices at even distances."""
    return np.linspace(0, len(captions) - 1, count).round().astype(int).tolist()


def measure(
    pipeline: StableDiffusionXLPipeline, splits: dict[str, EmojiImages]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """One row a split and guidance scale: share of line art, top-1 and top-5 retrieval, and those of real pictures.

    Also each split's pictures (captions, seeds, 32, 32, 3) at ``PAGE_GUIDANCE``.
    """
    judges, rows, page = Judges(), [], {}
    for split, world in splits.items():
        chosen = spread(world.captions, CAPTIONS)
        truth = torch.tensor(chosen)
        real = torch.cat([to_tensor(world.flat[chosen]), to_tensor(world.line[chosen])])
        top1, top5 = judges.retrieval(world.captions, real, truth.repeat(2))
        rows.append({"split": split, "guidance": "real", "line": 0.5, "top1": top1, "top5": top5})
        for guidance in GUIDANCE_SCALES:
            drawn = sample(pipeline, [world.captions[i] for i in chosen], SEEDS, guidance)
            if guidance == PAGE_GUIDANCE:
                page[split] = drawn
            images = to_tensor(drawn.reshape(-1, *drawn.shape[2:]))
            top1, top5 = judges.retrieval(world.captions, images, truth.repeat_interleave(SEEDS))
            share = judges.line_share(images)
            rows.append({"split": split, "guidance": guidance, "line": share, "top1": top1, "top5": top5})
    return rows, page


def draw_page(pictures: dict[str, np.ndarray], splits: dict[str, EmojiImages], path: Path) -> None:
    """Captions, both real pictures, and samples of ``PAGE_SEEDS`` seeds: training captions left, held-out right."""
    zoom, label, gap = 64, 190, 4
    block = label + (2 + PAGE_SEEDS) * (zoom + gap) + 16
    page = Image.new("RGB", (block * len(splits), CAPTIONS * (zoom + gap) + 24), (225, 225, 225))
    draw = ImageDraw.Draw(page)
    for column, (split, world) in enumerate(splits.items()):
        left = column * block + 8
        draw.text((left, 6), f"{split} captions: both real pictures, then samples of seeds 0-{PAGE_SEEDS - 1}", "black")
        chosen = spread(world.captions, CAPTIONS)
        drawn = pictures[split][:, :PAGE_SEEDS]
        for row, i in enumerate(chosen):
            top = 24 + row * (zoom + gap)
            draw.text((left, top + 26), world.captions[i][:32], "black")
            for k, picture in enumerate([world.flat[i], world.line[i], *drawn[row]]):
                tile = Image.fromarray(picture).resize((zoom, zoom), Image.Resampling.NEAREST)
                page.paste(tile, (left + label + k * (zoom + gap) + (8 if k > 1 else 0), top))
    temporary = path.with_name(f".{path.name}")
    page.save(temporary, "PNG", optimize=True)
    os.replace(temporary, path)


def folder_megabytes(folder: Path) -> float:
    """Bytes on disk of all files below ``folder``, in MB."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6


def card_text(results: dict[str, Any], rows: list[dict[str, Any]], splits: dict[str, EmojiImages], seed: int) -> str:
    """The Markdown of the card; every figure comes from the build or from ``measure``."""
    captions = {split: len(world.captions) for split, world in splits.items()}
    lines = [
        "# The bundled emoji models",
        "",
        "Tiny models trained from scratch on 32x32 Fluent emoji (MIT, see `data/LICENSE-fluent-emoji.txt`)",
        f"in two styles, flat colour and line art: {captions['training']} training and {captions['held-out']} held-out",
        "captions. No caption names a style. They exist to try and test preference alignment on a laptop,",
        "not to draw emoji well.",
        "",
        f"Rebuild: `python -m fastpref.emoji.build all --seed {seed}` (two CPU threads; fp32, the stage refine in bf16",
        "autocast). The bundled weights were made on a shared machine, whose minutes these are. The lengths of vae and",
        "unet were cut while they ran, and refine got more flat colour from step 3000 on after a look at it, so a",
        "fresh build ends with other weights of the same kind.",
        "",
        "| stage | steps | minutes | figures (mean over the last tenth of the log, or after training) |",
        "| --- | --- | --- | --- |",
    ]
    for stage, result in results.items():
        figures = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items() if name != "grad_norm")
        lines.append(f"| {stage} | {result['steps']} | {result['seconds'] / 60:.1f} | {figures} |")
    folders = (("model", MODEL_DIR), ("clip", CLIP_DIR), ("style", STYLE_DIR))
    sizes = ", ".join(f"{name} {folder_megabytes(folder):.1f} MB" for name, folder in folders)
    lines += [
        "",
        f"On disk: {sizes}.",
        "",
        f"## What it draws ({CAPTIONS} captions a split, {SEEDS} seeds, {SAMPLE_STEPS} Euler steps)",
        "",
        "`line` is the share of pictures that the style encoder takes for line art. `top1` and `top5`: the picture's",
        "caption is the nearest, or among the five nearest, of all captions of the split in the bundled CLIP, which",
        "learned from training pictures only; `real` rows give real pictures, half of each style.",
        "",
        "| split | guidance_scale | line | top1 | top5 |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {r['split']} | {r['guidance']} | {r['line']:.2f} | {r['top1']:.2f} | {r['top5']:.2f} |" for r in rows]
    lines += ["", f"![samples at guidance_scale {PAGE_GUIDANCE}]({PAGE.name})", ""]
    return "\n".join(lines)


def write_card(train: EmojiImages, heldout: EmojiImages, work: Workspace) -> None:
    """Measure the exported models and write ``MODEL_CARD.md`` and its page of samples."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(MODEL_DIR)
    pipeline.set_progress_bar_config(disable=True)
    splits = {"training": train, "held-out": heldout}
    rows, pictures = measure(pipeline, splits)
    draw_page(pictures, splits, PAGE)
    results = json.loads(work.file("results.json").read_text())
    temporary = CARD.with_suffix(".tmp")
    temporary.write_text(card_text(results, rows, splits, work.seed), encoding="utf-8")
    os.replace(temporary, CARD)
