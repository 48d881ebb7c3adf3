"""`fastpref make-pairs`: preference pairs that align a model with a style (Diffusion-RPO, arXiv 2406.06382).

The winner is drawn from the prompt with style words, the loser from the prompt alone, both from the same noise; the
caption of the pair is the prompt alone, so that what is learned is to draw the style unasked. Or the pictures are
already there, in two folders.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from rich.console import Console

from fastpref.config import Config
from fastpref.data.images import ImageError, load_rgb, probe
from fastpref.data.progress import Bars
from fastpref.errors import UserError
from fastpref.evaluate.folders import CaptionedFile, check_apart, match_folders, picture_files
from fastpref.evaluate.pair_files import SHEET, SPLITS, Pair, PairFiles
from fastpref.evaluate.sheets import before_after_sheet, save_png

ImageFormat = Literal["png", "jpeg"]
PLACEHOLDER = "{prompt}"
_SHEET_PAIRS, _JPEG_QUALITY = 24, 95
_HEADER = "upper row: loser · lower row: winner"


@dataclass(frozen=True)
class PairJob:
    """One pair to make, and where it comes from."""

    caption: str
    seed: int
    winner_prompt: str
    files: tuple[CaptionedFile, CaptionedFile] | None = None  # winner, loser; None: to be drawn


@dataclass(frozen=True)
class PairsSummary:
    """What was made, or (``dry_run``) would be."""

    path: Path
    pairs: dict[str, int]  # by split
    prompts: int
    drawn: int  # pictures that this call drew, or would
    dry_run: bool = False
    up_to_date: bool = False
    unmatched: int = 0

    def __str__(self) -> str:
        state = "up to date" if self.up_to_date else "dry run, nothing written" if self.dry_run else "written"
        counts = " and ".join(f"{count} {split}" for split, count in self.pairs.items())
        lines = [f"{self.path}: {state}", f"  {counts} pairs of {self.prompts} prompts, {self.drawn} pictures drawn"]
        if self.unmatched:
            lines.append(f"  {self.unmatched} pictures have no partner and were left out")
        return "\n".join(lines)


def pairs_from_prompts(
    config: Config,
    prompts: Sequence[str],
    style: str,
    out: Path,
    *,
    seeds: int = 1,
    size: int | None = None,
    lora: Path | None = None,
    unet: Path | None = None,
    **options: Any,
) -> PairsSummary:
    """Draw a winner and a loser of every prompt and seed with the config's pipeline.

    Args:
        config: ``model, unet, init_lora, guidance_scale, sample_steps, eval_batch_size, precision, device`` apply.
        style: words put behind the prompt, after a comma; or, with ``{prompt}`` in it, the winner's whole prompt.
        seeds: pairs of a prompt. size: pixels; None: the model's own.
        options: ``heldout, shard_size, image_format, overwrite, dry_run, progress`` of :func:`_make`.

    Raises:
        UserError: nothing to draw, bad model or weights, or ``out`` cannot be used.
    """
    from fastpref.evaluate.sample import generate_pairs as draw
    from fastpref.evaluate.sample import initial_latents, latent_shape, load_policy_pipeline
    from fastpref.models.caption_length import warn_of_cut
    from fastpref.models.loading import model_dir_of
    from fastpref.models.lora_file import lora_sources

    if not style.strip() or style.strip() == PLACEHOLDER:
        raise UserError("no style words", "make-pairs", "give --style, e.g. --style 'flat vector art'")
    if size is not None and (size < 8 or size % 8):
        raise UserError(f"size is {size}", "make-pairs", "use a multiple of 8")
    prompts = list(dict.fromkeys(prompt.strip() for prompt in prompts))
    jobs = [PairJob(prompt, seed, styled(prompt, style)) for prompt in prompts for seed in range(seeds)]
    model = model_dir_of(config)
    loras = [file for p in (config.init_lora, lora) if p is not None for file in lora_sources(Path(p))]
    weights = [model, *(Path(p) for p in (config.unet, *loras, unet) if p is not None)]
    settings: dict[str, Any] = {
        "guidance_scale": config.guidance_scale,
        "sample_steps": config.sample_steps,
        "size": size,
    }
    if config.max_caption_tokens != 77:  # pairs from before the key say nothing of it
        settings["max_caption_tokens"] = config.max_caption_tokens
    settings |= {"style": style, "weights": [_files_fingerprint(path) for path in weights]}
    warn_of_cut(model, config.max_caption_tokens, [text for job in jobs for text in (job.caption, job.winner_prompt)])
    image_format: ImageFormat = options.get("image_format", "png")
    loaded: list[Any] = []

    def make(part: Sequence[PairJob]) -> list[Pair]:
        if not loaded:
            loaded.append(load_policy_pipeline(config, lora=lora, unet=unet))
        latents = initial_latents([j.caption for j in part], [j.seed for j in part], latent_shape(loaded[0], size))
        winners, losers = draw(
            loaded[0],
            [job.winner_prompt for job in part],
            [job.caption for job in part],
            latents,
            guidance_scale=config.guidance_scale,
            sample_steps=config.sample_steps,
            max_caption_tokens=config.max_caption_tokens,
        )
        return [
            Pair(encode_image(w, image_format), encode_image(b, image_format), job.caption, job.seed, job.winner_prompt)
            for job, w, b in zip(part, winners, losers, strict=True)
        ]

    batch = max(1, config.eval_batch_size // 2)
    return _make(jobs, make, out, settings, batch=batch, max_pixels=config.max_image_pixels, **options)


def pairs_from_folders(config: Config, winners: Path, losers: Path, out: Path, **options: Any) -> PairsSummary:
    """Pairs of pictures that are there, matched by caption or, where one folder has none, by file name.

    The pictures' bytes are kept as they are.

    Raises:
        UserError: overlapping folders, no captions, nothing that matches, a picture that cannot be decoded.
    """
    check_apart(winners, losers)
    matched = match_folders(winners, losers)
    jobs = [PairJob(w.caption, seed, "", (w, b)) for w, b, seed in matched]
    total = len(picture_files(winners)) + len(picture_files(losers))

    def make(part: Sequence[PairJob]) -> list[Pair]:
        pairs = []
        for job in part:
            assert job.files is not None
            encoded = [_checked(file, config.max_image_pixels) for file in job.files]
            pairs.append(Pair(encoded[0], encoded[1], job.caption, job.seed, ""))
        return pairs

    settings: dict[str, Any] = {"folders": [str(winners.resolve()), str(losers.resolve())]}
    settings |= {"files": [[(f.name, f.size()) for f in job.files or ()] for job in jobs]}
    options |= {"unmatched": total - 2 * len(jobs), "max_pixels": config.max_image_pixels}
    return _make(jobs, make, out, settings, batch=16, **options)


def styled(prompt: str, style: str) -> str:
    """The winner's prompt."""
    return style.replace(PLACEHOLDER, prompt) if PLACEHOLDER in style else f"{prompt}, {style.strip().lstrip(', ')}"


def split_prompts(prompts: Sequence[str], heldout: float) -> dict[str, list[str]]:
    """The prompts of each split; held out are those of smallest sha256, at least one unless ``heldout`` is 0."""
    from fastpref.models.prompt_book import prompt_id

    ordered = sorted(dict.fromkeys(prompts), key=prompt_id)
    count = max(1, round(heldout * len(ordered))) if heldout else 0
    if count >= len(ordered):
        what = f"{len(ordered)} prompts, {count} of them held out"
        raise UserError(what, "make-pairs", "give more prompts or a smaller --heldout")
    chosen = set(ordered[:count])
    return {
        "train": [p for p in dict.fromkeys(prompts) if p not in chosen],
        "heldout": [p for p in dict.fromkeys(prompts) if p in chosen],
    }


def encode_image(image: Image.Image, image_format: ImageFormat) -> bytes:
    """PNG or JPEG bytes."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": _JPEG_QUALITY, "subsampling": 0} if image_format == "jpeg" else {}
    image.convert("RGB").save(buffer, image_format.upper(), **options)
    return buffer.getvalue()


def _make(
    jobs: Sequence[PairJob],
    make: Callable[[Sequence[PairJob]], list[Pair]],
    out: Path,
    settings: dict[str, Any],
    *,
    batch: int,
    max_pixels: int,
    heldout: float = 0.1,
    shard_size: int = 64,
    image_format: ImageFormat = "png",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    console: Console | None = None,
    unmatched: int = 0,
) -> PairsSummary:
    """Make the shards that are not there yet.

    Args:
        heldout: share of the prompts, with all their seeds, in ``out/heldout`` instead of ``out/train``.
        shard_size: pairs in a parquet file, and what a killed run loses at most.
    """
    if not jobs:
        raise UserError("no prompts", "make-pairs", "give prompts as txt, json, jsonl or parquet")
    prompts = split_prompts([job.caption for job in jobs], heldout)
    members = {split: set(prompts[split]) for split in SPLITS}
    parts = {split: [job for job in jobs if job.caption in members[split]] for split in SPLITS}
    plan = [[job.caption, job.seed, job.winner_prompt] for job in jobs]
    identity = {"jobs": plan, "settings": settings, "heldout": heldout, "shard": shard_size, "format": image_format}
    files = PairFiles(out, hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest())
    work = files.check(overwrite)
    shards = {
        (split, n): parts[split][at : at + shard_size]
        for split in SPLITS
        for n, at in enumerate(range(0, len(parts[split]), shard_size))
    }
    todo = {key: part for key, part in shards.items() if overwrite or files.missing(*key)} if work else {}
    count = sum(len(part) for part in todo.values())
    drawn = 2 * sum(job.files is None for part in todo.values() for job in part)
    pairs = {split: len(part) for split, part in parts.items()}
    summary = PairsSummary(out, pairs, len({job.caption for job in jobs}), drawn, dry_run, not work, unmatched)
    if dry_run or not work:
        return summary
    files.claim(overwrite)
    with Bars(progress, console) as bars:
        advance = bars.add("pairs", count)
        for (split, number), part in todo.items():
            files.write(split, number, [pair for pair in _batched(part, make, batch, advance)])
    _sheet(out, [pair for key in shards for pair in files.read(*key, limit=_SHEET_PAIRS)], max_pixels)
    described = {key: value for key, value in settings.items() if key not in ("files", "weights")}
    files.finish({"pairs": pairs, "prompts": summary.prompts, "heldout": heldout, **described})
    return summary


def _batched(
    jobs: Sequence[PairJob],
    make: Callable[[Sequence[PairJob]], list[Pair]],
    batch: int,
    advance: Callable[[int], None],
) -> Iterator[Pair]:
    for at in range(0, len(jobs), batch):
        part = jobs[at : at + batch]
        yield from make(part)
        advance(len(part))


def _sheet(out: Path, pairs: Sequence[Pair], max_pixels: int) -> None:
    """The contact sheet of the first pairs, the held-out ones last."""
    chosen = [*pairs[: _SHEET_PAIRS - 1], *pairs[-1:]] if len(pairs) > _SHEET_PAIRS else pairs
    pictures = [[(load_rgb(pair.loser, max_pixels), load_rgb(pair.winner, max_pixels))] for pair in chosen]
    save_png(before_after_sheet(pictures, [pair.caption for pair in chosen], header=_HEADER), out / SHEET)


def _checked(file: CaptionedFile, max_pixels: int) -> bytes:
    data = file.read()
    try:
        probe(data, max_pixels)
    except ImageError as error:
        where = str(file.root / file.name)
        raise UserError(error.reason, where, error.detail or "take it out of the folder") from None
    return data


def _files_fingerprint(path: Path) -> str:
    """sha256 of the names, sizes and both ends of a file or of all files of a folder."""
    if not path.exists():
        raise UserError("no such weights", str(path), "give a LoRA file, a UNet folder or a pipeline folder")
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 16))
            stream.seek(max(0, size - (1 << 16)))
            digest.update(stream.read(1 << 16))
    return digest.hexdigest()
