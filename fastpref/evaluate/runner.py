"""`fastpref evaluate`: sample held-out prompts, save the pictures, measure them; once before, once after training."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from fastpref.atomic import check_writable
from fastpref.config import Config
from fastpref.data.images import ImageError, load_rgb, to_bucket
from fastpref.data.records import Record, read_captions, read_records
from fastpref.errors import UserError
from fastpref.evaluate.sample import (
    Picture,
    Work,
    by_prompt,
    generate,
    load_policy_pipeline,
    prompt_id,
    save_pictures,
)
from fastpref.evaluate.sheets import before_after_sheet, contact_sheet, save_png
from fastpref.evaluate.style import encode, evaluate_style, make_pool
from fastpref.models.loading import resolve_device

INDEX = "index.json"
METRICS = ("style_share", "style_distance", "prompt_retrieval")


def evaluate_policy(
    config: Config,
    *,
    lora: Path | None = None,
    unet: Path | None = None,
    out_dir: Path,
    tag: str,
    progress: bool = False,
    style_dir: Path | None = None,
    clip_dir: Path | None = None,
) -> dict[str, Any]:
    """Sample the evaluation prompts with the given weights and measure the pictures.

    Writes ``out_dir/samples/<tag>/<prompt>-<seed>.png`` with an ``index.json``, the sheet ``samples/<tag>.png`` and,
    where pictures of both ``before`` and ``after`` are there, ``samples/before_after.png``.

    Args:
        lora: trained LoRA file; unet: trained UNet folder; neither: the model as training starts from it.
        out_dir: the run directory.
        tag: ``before`` or ``after``.
        style_dir: style encoder; clip_dir: CLIP. By default the bundled ones where they apply: the evaluation records
            are the bundled emoji and the model draws pictures of their size.

    Returns:
        ``style_share, style_distance, prompt_retrieval: {top1, top5}`` (see :mod:`fastpref.evaluate.style`) and
        ``details``. A metric that cannot be computed is None, with the reason in ``details.left_out``.
    """
    samples = out_dir / "samples"
    check_writable(samples)
    prompts = choose_prompts(read_captions(config.eval_records), config.eval_prompts)
    seeds = list(range(config.eval_seeds))
    work, began = Work(), time.perf_counter()
    pipeline: Any = load_policy_pipeline(config, lora=lora, unet=unet)
    pictures = generate(
        pipeline,
        prompts,
        seeds,
        guidance_scale=config.guidance_scale,
        sample_steps=config.sample_steps,
        batch_size=config.eval_batch_size,
        progress=progress,
        work=work,
    )
    del pipeline
    gc.collect()
    seconds = time.perf_counter() - began
    _save(pictures, samples, tag)
    write_before_after(samples)
    encoders = _encoders(config, pictures[0].image.size, style_dir, clip_dir)
    if isinstance(encoders, str):
        result: dict[str, Any] = dict.fromkeys(METRICS)
        details = {"left_out": dict.fromkeys(METRICS, encoders), "pictures": len(pictures), "prompts": len(prompts)}
    else:
        result = _measure(config, pictures, *encoders)
        details = result.pop("details")
    sampling = {"guidance_scale": config.guidance_scale, "sample_steps": config.sample_steps, "seeds": seeds}
    return {**result, "details": {**details, **sampling, "seconds_sampling": seconds, "work": asdict(work)}}


def choose_prompts(captions: Sequence[str], count: int) -> list[str]:
    """The ``count`` distinct captions of smallest sha256: a choice that ignores the records' order and only grows."""
    chosen = sorted(dict.fromkeys(captions), key=prompt_id)[:count]
    if not chosen:
        raise UserError("no captions", "eval_records", "give records with captions")
    return chosen


def write_before_after(samples: Path) -> Path | None:
    """The sheet ``before_after.png`` of the pictures both tags have, same prompt and seed; None if there are none."""
    pairs = paired_pictures(samples)
    if not pairs:
        return None
    sheet = before_after_sheet([_opened(files) for files in pairs.values()], list(pairs))
    return save_png(sheet, samples / "before_after.png")


def paired_pictures(samples: Path) -> dict[str, list[tuple[Path, Path]]]:
    """For each prompt the (before, after) files of its seeds, seeds ascending."""
    before, after = read_index(samples / "before"), read_index(samples / "after")
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    for prompt, seed in sorted(before.keys() & after.keys(), key=lambda key: (prompt_id(key[0]), key[1])):
        pairs.setdefault(prompt, []).append((before[prompt, seed], after[prompt, seed]))
    return pairs


def read_index(folder: Path) -> dict[tuple[str, int], Path]:
    """(prompt, seed) to file, of a folder that :func:`evaluate_policy` wrote; empty if there is none."""
    try:
        entries = json.loads((folder / INDEX).read_text())["pictures"]
        return {(entry["prompt"], entry["seed"]): folder / entry["file"] for entry in entries}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("cannot read the index of the pictures", str(folder / INDEX), repr(error)) from None


def _save(pictures: Sequence[Picture], samples: Path, tag: str) -> None:
    """Pictures and index appear together, in place of those of an earlier evaluation."""
    draft, final = samples / f".{tag}.{os.getpid()}.tmp", samples / tag
    shutil.rmtree(draft, ignore_errors=True)
    files = save_pictures(pictures, draft)
    entries = [
        {"file": file.name, "prompt": picture.prompt, "seed": picture.seed}
        for picture, file in zip(pictures, files, strict=True)
    ]
    (draft / INDEX).write_text(json.dumps({"pictures": entries}, ensure_ascii=False, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    captions = list(dict.fromkeys(picture.prompt for picture in pictures))
    save_png(contact_sheet(by_prompt(pictures), captions), samples / f"{tag}.png")


def _encoders(
    config: Config, size: tuple[int, int], style_dir: Path | None, clip_dir: Path | None
) -> tuple[Path, Path] | str:
    """Folders of the style encoder and the CLIP, or why there are none."""
    if style_dir is None and config.eval_records == "emoji":
        from fastpref.emoji import CLIP_DIR, IMAGE_SIZE, STYLE_DIR

        if size == (IMAGE_SIZE, IMAGE_SIZE):
            return STYLE_DIR, clip_dir or CLIP_DIR
        return (
            f"the bundled style encoder sees {IMAGE_SIZE} x {IMAGE_SIZE} pixels, the model draws {size[0]} x {size[1]}"
        )
    if style_dir is None:
        return "no style encoder given for these evaluation records"
    if clip_dir is None and config.clip is not None:
        from fastpref.models.similarity import resolve_clip_dir

        clip_dir = resolve_clip_dir(config.clip)
    return (style_dir, clip_dir) if clip_dir is not None else "no CLIP folder given"


def _measure(config: Config, pictures: Sequence[Picture], style_dir: Path, clip_dir: Path) -> dict[str, Any]:
    from fastpref.emoji.style import load_style_encoder
    from fastpref.models.similarity import load_clip

    style, clip = load_style_encoder(style_dir), load_clip(clip_dir, resolve_device(config.device))
    size = pictures[0].image.size
    generated = encode(((p.image, p.prompt) for p in pictures), style, clip)
    winners = encode(real_images(config, size, winners=True), style, clip)
    losers = encode(real_images(config, size, winners=False), style, clip)
    return evaluate_style(generated, make_pool(winners, losers))


def real_images(config: Config, size: tuple[int, int], *, winners: bool) -> Iterator[tuple[Image.Image, str]]:
    """(Picture at ``size``, caption) of the evaluation records' preferred or dispreferred side; ties have no sides."""
    records = config.eval_records
    if records == "emoji":
        from fastpref.emoji import HELDOUT_PARQUET

        records = str(HELDOUT_PARQUET)
    for record in read_records(records):
        if not isinstance(record, Record) or record.label == 0.5:
            continue
        try:
            image = load_rgb(record.winner if winners else record.loser, config.max_image_pixels)
        except ImageError as error:
            raise UserError(error.reason, f"{records}, {record.where}", "evaluation needs every real image") from None
        yield to_bucket(image, size), record.caption.strip()


def _opened(files: Sequence[tuple[Path, Path]]) -> list[tuple[Image.Image, Image.Image]]:
    return [(Image.open(before), Image.open(after)) for before, after in files]
