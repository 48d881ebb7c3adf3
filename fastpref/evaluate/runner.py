"""`fastpref evaluate`: sample held-out prompts, save the pictures, measure them; once before, once after training."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from fastpref.atomic import check_writable
from fastpref.config import Config
from fastpref.data.images import to_bucket
from fastpref.errors import UserError
from fastpref.evaluate.folders import CaptionedFile, read_folder
from fastpref.evaluate.judges import Judges, find_judges
from fastpref.evaluate.reals import Reals, open_reals
from fastpref.evaluate.sample import (
    Picture,
    by_prompt,
    generate,
    load_policy_pipeline,
    save_pictures,
)
from fastpref.evaluate.sheets import before_after_sheet, contact_sheet, save_png
from fastpref.evaluate.style import encode, evaluate_style, make_pool
from fastpref.models.caption_length import warn_of_cut
from fastpref.models.loading import model_dir_of, resolve_device
from fastpref.models.prompt_book import prompt_id
from fastpref.models.work import Work

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
        style_dir: style encoder; clip_dir: CLIP; in place of the config's. See
            :func:`fastpref.evaluate.judges.find_judges`.

    Returns:
        ``style_share, style_distance, prompt_retrieval: {top1, top5}`` (see :mod:`fastpref.evaluate.style`) and
        ``details``. A metric that cannot be computed is None, with the reason in ``details.left_out``.
    """
    samples = out_dir / "samples"
    check_writable(samples)
    reals = open_reals(config)
    judges = find_judges(config, reals, out_dir, style_dir=style_dir, clip_dir=clip_dir)
    prompts = choose_prompts(judges.unseen(reals.captions), config.eval_prompts)
    warn_of_cut(model_dir_of(config), config.max_caption_tokens, prompts)
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
        max_caption_tokens=config.max_caption_tokens,
        progress=progress,
        work=work,
    )
    del pipeline
    gc.collect()
    seconds = time.perf_counter() - began
    _save(pictures, samples, tag)
    write_before_after(samples)
    result = _judge(config, pictures, reals, judges)
    details = result.pop("details")
    sampling = {"guidance_scale": config.guidance_scale, "sample_steps": config.sample_steps, "seeds": seeds}
    rows = {key: count for key, count in asdict(work).items() if count}
    return {**result, "details": {**details, **sampling, "seconds_sampling": seconds, "work": rows}}


def evaluate_pictures(config: Config, folder: Path, *, out_dir: Path) -> dict[str, Any]:
    """Measure pictures that are already there: captioned as :mod:`fastpref.evaluate.folders` reads them, or with the
    ``index.json`` that ``fastpref evaluate`` writes. Writes nothing but a fitted style encoder, in ``out_dir``.

    Returns:
        As :func:`evaluate_policy`; ``details.left_out_pictures`` counts those whose caption the style encoder was
        fitted on.

    Raises:
        UserError: no pictures, a picture without a caption, a caption without real images, or encoders are missing.
    """
    index = read_index(folder)
    files = [CaptionedFile(folder, file.name, prompt) for (prompt, _), file in index.items()] or read_folder(folder)
    reals = open_reals(config)
    known = set(reals.captions)
    strange = [file for file in files if file.caption not in known]
    if strange:
        what = f"{len(strange)} of {len(files)} pictures have a caption without real images, e.g. {strange[0].name}"
        raise UserError(what, f"'{strange[0].caption[:60]}'", "captions must be those of the real images")
    judges = find_judges(config, reals, out_dir)
    wanted = set(judges.unseen(reals.captions))
    chosen = [file for file in files if file.caption in wanted]
    if not chosen:
        todo = "give eval_style, or pictures of more captions"
        raise UserError("the style encoder was fitted on every caption of the pictures", str(folder), todo)
    size = chosen[0].load(config.max_image_pixels).size
    pictures = [Picture(f.caption, 0, to_bucket(f.load(config.max_image_pixels), size)) for f in chosen]
    result = _judge(config, pictures, reals, judges)
    result["details"]["left_out_pictures"] = len(files) - len(chosen)
    return result


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


def _judge(config: Config, pictures: Sequence[Picture], reals: Reals, judges: Judges) -> dict[str, Any]:
    """The measures of the pictures, or why there are none."""
    from fastpref.emoji import style as style_encoder
    from fastpref.models.similarity import load_clip

    size, prompts = pictures[0].image.size, len({picture.prompt for picture in pictures})
    reason = judges.refusal(size)
    if reason or judges.style_dir is None or judges.clip_dir is None:
        details = {"left_out": dict.fromkeys(METRICS, reason), "pictures": len(pictures), "prompts": prompts}
        return {**dict.fromkeys(METRICS), "details": details}
    style = style_encoder.load_style_encoder(judges.style_dir)
    clip = load_clip(judges.clip_dir, resolve_device(config.device))
    generated = encode(((p.image, p.prompt) for p in pictures), style, clip)
    unseen = set(judges.unseen(reals.captions))
    sides = [
        encode((pair for pair in reals.images(size, target=target) if pair[1] in unseen), style, clip)
        for target in (True, False)
    ]
    result = evaluate_style(generated, make_pool(*sides))
    result["details"]["style_accuracy"] = judges.accuracy
    return result


def _opened(files: Sequence[tuple[Path, Path]]) -> list[tuple[Image.Image, Image.Image]]:
    return [(Image.open(before), Image.open(after)) for before, after in files]
