"""The encoders of ``prepare``: pictures to latents and CLIP embeddings, captions to prompt and CLIP embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastpref.data.buckets import Size
from fastpref.data.images import ImageError, load_rgb, to_bucket
from fastpref.data.job import Job
from fastpref.data.plan import Plan
from fastpref.data.records import Record, check_row
from fastpref.data.sources import Source
from fastpref.memory import moved
from fastpref.models.vae import encode

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Rows = dict[str, torch.Tensor]  # name → (n, ...) on the CPU, in the store's dtype


class Encoders:
    """VAE, text encoders and CLIP of one rank; each is loaded when first used."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self._job, self._device = job, device
        self._vae: Any = None
        self._text_stack: Any = None
        self._clip: Any = None

    def release_text(self) -> None:
        """Free the text encoders."""
        self._text_stack = None

    @torch.no_grad()
    def text(self, captions: list[str]) -> Rows:
        """``prompt_embeds (n, L, D)``, for SDXL ``pooled_prompt_embeds (n, P)``, with CLIP ``clip_text (n, E)``."""
        if self._text_stack is None:
            from fastpref.models.text import load_text_stack

            job = self._job
            dtype = DTYPES[job.text_dtype]
            self._text_stack = load_text_stack(job.model_dir, dtype, self._device, job.max_caption_tokens)
        prompt_embeds, pooled = self._text_stack.encode(captions)
        dtype = DTYPES[self._job.text_dtype]
        rows = {"prompt_embeds": prompt_embeds.to("cpu", dtype)}
        if pooled is not None:
            rows["pooled_prompt_embeds"] = pooled.to("cpu", dtype)
        if self._job.clip_dir is not None:
            rows["clip_text"] = self._clip_encoder().text(captions).float().cpu()
        return rows

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> Rows:
        """``latents (n, C, H, W)``, scaled; as the job asks ``posterior_std``, both ``_flipped``, ``clip_image``."""
        from fastpref.models.loading import load_vae

        job = self._job
        if self._vae is None:
            self._vae = load_vae(job.model_dir, job.vae_precision, self._device)
        pixels = moved(torch.from_numpy(np.stack([np.asarray(image) for image in images])), self._device)
        latents = latent_rows(self._vae, pixels, posterior=job.posterior, flips=job.flips)
        rows = {}
        if job.clip_dir is not None:  # its pictures are resized on the CPU while the VAE computes
            rows["clip_image"] = self._clip_encoder().images(images).float().cpu()
        return {name: values.to("cpu", DTYPES[job.dtype]) for name, values in latents.items()} | rows

    def _clip_encoder(self) -> Any:
        if self._clip is None:
            from fastpref.models.similarity import load_clip

            assert self._job.clip_dir is not None
            self._clip = load_clip(self._job.clip_dir, self._device)
        return self._clip


def latent_rows(vae: Any, pixels: torch.Tensor, *, posterior: bool, flips: bool) -> Rows:
    """What the store keeps of pictures (n, H, W, 3) uint8, still on their device and in fp32; see :mod:`.vae`."""
    x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    rows = {}
    for suffix, side in {"": x, "_flipped": x.flip(-1) if flips else None}.items():
        if side is not None:
            found = encode(vae, side)
            rows[f"latents{suffix}"] = (found.mean - shift) * scale
            if posterior:
                rows[f"posterior_std{suffix}"] = found.std * scale
    return rows


@dataclass
class Unit:
    """The encoded rows of one shard: ``tensors[name]``; ``rows[i]`` is the row of item i (-1: failed)."""

    rows: list[int]
    failed: dict[int, str] = field(default_factory=dict)
    tensors: Rows = field(default_factory=dict)


class _Collector:
    """Gathers batches of finite rows under names with a suffix, and remembers which item went where."""

    def __init__(self, items: int) -> None:
        self.unit = Unit(rows=[-1] * items)
        self._pieces: dict[str, list[torch.Tensor]] = {}
        self._sizes: dict[str, int] = {}

    def add(self, items: list[int], encoded: Rows, suffix: str = "") -> None:
        finite = torch.ones(len(items), dtype=torch.bool)
        for name, rows in encoded.items():
            fine = torch.isfinite(rows).flatten(1).all(dim=1)
            for position in torch.nonzero(finite & ~fine).flatten().tolist():
                self.unit.failed[items[position]] = f"{name} not finite"
            finite &= fine
        start = self._sizes.get(suffix, 0)
        kept = [item for item, fine in zip(items, finite.tolist(), strict=True) if fine]
        for row, item in enumerate(kept, start):
            self.unit.rows[item] = row
        self._sizes[suffix] = start + len(kept)
        for name, rows in encoded.items():
            self._pieces.setdefault(name + suffix, []).append(rows[finite].contiguous())

    def finish(self) -> Unit:
        self.unit.tensors = {name: torch.cat(pieces) for name, pieces in sorted(self._pieces.items())}
        return self.unit


def encode_text_unit(
    encoders: Encoders, captions: list[str], batch_size: int, beat: Callable[[int], None] | None = None
) -> Unit:
    """Encode the captions of one shard, ``batch_size`` at a time."""
    collector = _Collector(len(captions))
    for start in range(0, len(captions), batch_size):
        items = list(range(start, min(start + batch_size, len(captions))))
        collector.add(items, encoders.text([captions[item] for item in items]))
        if beat is not None:
            beat(len(items))
    return collector.finish()


def encode_image_unit(
    encoders: Encoders,
    source: Source,
    plan: Plan,
    images: range,
    job: Job,
    beat: Callable[[int], None] | None = None,
) -> Unit:
    """Encode the pictures of one shard, bucket by bucket, while the next ones are decoded.

    Tensors are named ``latents.B`` and so on for bucket B. Which pictures share a batch depends on the records alone,
    so a repeated or resumed unit gives the same bytes.
    """
    collector = _Collector(len(images))
    pending: dict[int, list[tuple[int, Image.Image]]] = {}

    def flush(bucket: int) -> None:
        batch = pending.pop(bucket)
        encoded = encoders.images([image for _, image in batch])
        collector.add([item for item, _ in batch], encoded, f".{bucket}")
        if beat is not None:
            beat(len(batch))

    for item, decoded in _decoded(source, plan, images, job):
        if isinstance(decoded, ImageError):
            collector.unit.failed[item] = decoded.reason
            continue
        bucket = int(plan.image_bucket[images.start + item])
        pending.setdefault(bucket, []).append((item, decoded))
        if len(pending[bucket]) == job.batch_size:
            flush(bucket)
    for bucket in sorted(pending):
        flush(bucket)
    return collector.finish()


def _decoded(source: Source, plan: Plan, images: range, job: Job) -> Iterator[tuple[int, Image.Image | ImageError]]:
    """Pictures of a shard in order, cropped to their buckets; a few are decoded ahead in threads."""
    wanted: dict[int, list[int]] = {}
    for image in images:
        wanted.setdefault(int(plan.image_record[image]), []).append(image)
    with ThreadPoolExecutor(max_workers=4, thread_name_prefix="decode") as pool:
        ahead: list[tuple[int, Any]] = []
        for row in source.rows(np.asarray(sorted(wanted), dtype=np.int64)):
            record = check_row(row)
            for image in wanted[row.index]:
                target = plan.buckets[plan.image_bucket[image]]
                data = _side(record, int(plan.image_side[image]))
                ahead.append(
                    (
                        image - images.start,
                        pool.submit(_prepare_image, data, plan.image_key[image], target, job.max_pixels),
                    )
                )
            while len(ahead) > 2 * job.batch_size:
                item, future = ahead.pop(0)
                yield item, future.result()
        for item, future in ahead:
            yield item, future.result()


def _side(record: Any, side: int) -> bytes:
    if not isinstance(record, Record):
        return b""
    return record.loser if side else record.winner


def _prepare_image(data: bytes, key: bytes, target: Size, max_pixels: int) -> Image.Image | ImageError:
    if hashlib.sha256(data).digest() != key:
        return ImageError("image changed while preparing")
    try:
        return to_bucket(load_rgb(data, max_pixels), target)
    except ImageError as error:
        return error
