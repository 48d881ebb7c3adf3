"""How large a store will be and how long it takes, before anything is written.

The arithmetic, for Pick-a-Pic v2 at 1024²: a picture is 4·128·128 latents of two bytes (131,072 bytes), a caption
77·2048 + 1280 numbers of two bytes (317,952), CLIP-H adds 4·1024 bytes to each. With 959,040 records, at most
2·959,040 pictures and 58,960 captions that is 1,918,080·135,168 + 58,960·322,048 bytes, 278 GB, before any picture is
shared between pairs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastpref.data.buckets import Size
from fastpref.data.job import Job, ModelShape
from fastpref.data.plan import Plan, check_usable, make_plan
from fastpref.data.progress import Bars, PrepareSummary
from fastpref.data.scan import scan_segment, segments
from fastpref.data.sources import Source
from fastpref.models.caption_length import BLOCKS, count_cut

if TYPE_CHECKING:
    import torch

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_INDEX_BYTES_PER_PAIR = 24
_INDEX_BYTES_PER_IMAGE = 64
_MEASURED_BATCHES = 2


@dataclass(frozen=True)
class StoreBytes:
    """Bytes of a store's parts."""

    latents: int
    text: int
    clip: int
    index: int

    @property
    def total(self) -> int:
        """Bytes of the whole store."""
        return self.latents + self.text + self.clip + self.index


def estimate_bytes(
    shape: ModelShape,
    images: dict[Size, int],
    captions: int,
    pairs: int,
    *,
    dtype: str,
    text_dtype: str,
    posterior: bool = False,
    flips: bool = False,
    text_blocks: int = 1,
) -> StoreBytes:
    """Bytes of a store.

    Args:
        shape: the model's numbers.
        images: distinct pictures by bucket, ``(width, height)`` in pixels.
        captions: distinct captions.
        pairs: pairs.
        dtype, text_dtype: 'float32', 'float16' or 'bfloat16'.
        posterior: the VAE's std is stored too.
        flips: mirrored latents are stored too.
        text_blocks: of a caption.
    """
    tensors = (1 + posterior) * (1 + flips)
    factor = shape.vae_scale_factor**2
    values = sum(count * shape.latent_channels * width * height // factor for (width, height), count in images.items())
    count = sum(images.values())
    text_values = text_blocks * shape.text_tokens * shape.text_width + shape.pooled_width
    return StoreBytes(
        latents=values * tensors * _ITEM_BYTES[dtype],
        text=(captions + 1) * text_values * _ITEM_BYTES[text_dtype],
        clip=(count + captions + 1) * shape.clip_width * 4,
        index=pairs * _INDEX_BYTES_PER_PAIR + count * _INDEX_BYTES_PER_IMAGE,
    )


def dry_run_summary(job: Job, source: Source, device: torch.device, store: Path, bars: Bars) -> PrepareSummary:
    """Check every record, encode a few, and estimate the rest.

    Raises:
        UserError: too many rejects, or no usable pair.
    """
    started = time.perf_counter()
    advance = bars.add("records checked", len(source))
    tables = [scan_segment(source, part, job.scan_rules, advance) for part in segments(len(source))]
    plan = make_plan(tables, job.buckets)
    check_usable(plan.rejected, len(plan.record), plan.records, job.max_reject_share, job.records)
    scanned = time.perf_counter() - started
    measured = bars.add("captions measured", len(plan.captions) - 1)
    numbers, counts = np.unique(plan.image_bucket, return_counts=True)
    by_bucket = {plan.buckets[number]: int(count) for number, count in zip(numbers, counts, strict=True)}
    size = estimate_bytes(
        job.shape,
        by_bucket,
        len(plan.captions) - 1,
        len(plan.record),
        dtype=job.dtype,
        text_dtype=job.text_dtype,
        posterior=job.posterior,
        flips=job.flips,
        text_blocks=BLOCKS[job.max_caption_tokens],
    )
    return replace(
        PrepareSummary.of_plan(plan, store, time.perf_counter() - started),
        bytes=size.total,
        buckets={f"{width}x{height}": count for (width, height), count in by_bucket.items()},
        hours=(scanned + _encode_seconds(job, source, plan, device)) / 3600,
        cut=count_cut(job.model_dir, job.max_caption_tokens, plan.captions[1:], measured),
        dry_run=True,
        finished=True,
    )


def _encode_seconds(job: Job, source: Source, plan: Plan, device: torch.device) -> float:
    """Seconds to encode everything, from the rate on a few batches after a first, unmeasured one."""
    from fastpref.data.encode import Encoders, encode_image_unit, encode_text_unit

    encoders = Encoders(job, device)
    few = job.batch_size * _MEASURED_BATCHES
    captions, images = plan.captions[:few], range(min(few, len(plan.image_key)))
    encode_text_unit(encoders, captions[: job.batch_size], job.batch_size)
    start = time.perf_counter()
    encode_text_unit(encoders, captions, job.batch_size)
    per_caption = (time.perf_counter() - start) / len(captions)
    encoders.release_text()
    encode_image_unit(encoders, source, plan, images[: job.batch_size], job)
    start = time.perf_counter()
    encode_image_unit(encoders, source, plan, images, job)
    per_image = (time.perf_counter() - start) / len(images)
    return per_caption * len(plan.captions) + per_image * len(plan.image_key)
