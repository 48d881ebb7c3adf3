"""The last step of ``prepare``: index, rejects and manifest, from the plan and the journal of finished shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastpref.atomic import write_bytes, write_json, write_table
from fastpref.data import manifest
from fastpref.data.images import fit
from fastpref.data.job import Job
from fastpref.data.manifest import StoredFile, StoreManifest
from fastpref.data.plan import Plan, check_usable, reasons
from fastpref.data.workspace import Workspace
from fastpref.errors import UserError
from fastpref.models.caption_length import CutCaptions


def finish(job: Job, plan: Plan, workspace: Workspace, cut: CutCaptions | None) -> StoreManifest:
    """Turn a directory of finished shards into a store.

    Args:
        cut: see :func:`fastpref.models.caption_length.count_cut`.

    Raises:
        UserError: too many records were rejected while encoding, or none is left.
    """
    files: dict[str, Any] = {}
    image_rows, image_failed = _journal(workspace, plan, "image", job.shard_size, files)
    text_rows, text_failed = _journal(workspace, plan, "text", job.shard_size, files)
    usable = (image_rows[plan.image_w] >= 0) & (image_rows[plan.image_l] >= 0) & (text_rows[plan.caption] >= 0)
    rejected = sorted(plan.rejected + _encoding_rejects(plan, usable, image_failed, text_failed), key=_record)
    write_rejected(workspace.path / manifest.REJECTED, rejected)
    if 0 in text_failed:
        raise UserError("the empty prompt's embedding is not finite", str(job.model_dir), "use precision=fp32")
    listing = workspace.path / manifest.REJECTED
    check_usable(rejected, int(usable.sum()), plan.records, job.max_reject_share, job.records, listing)
    files[manifest.PAIRS] = write_table(workspace.path / manifest.PAIRS, _pairs(plan, usable))
    files[manifest.IMAGES] = write_table(workspace.path / manifest.IMAGES, _images(job, plan, image_rows))
    files[manifest.CAPTIONS] = write_table(workspace.path / manifest.CAPTIONS, _captions(job, plan, text_rows))
    result = _manifest(job, plan, int(usable.sum()), rejected, files, cut)
    write_json(workspace.path / manifest.MANIFEST, result.model_dump(mode="json"))
    workspace.remove_work()
    return result


def write_rejected(path: Path, rejected: list[dict[str, Any]]) -> None:
    """``rejected.jsonl``: record number, where it is, reason and detail, one object a line."""
    write_bytes(
        path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected).encode("utf-8", "replace")
    )


def _journal(
    workspace: Workspace, plan: Plan, kind: str, shard_size: int, files: dict[str, Any]
) -> tuple[np.ndarray, dict[int, str]]:
    """Row of every item in its shard (-1: failed) and why some failed; adds the shards to ``files``."""
    rows: list[int] = []
    failed: dict[int, str] = {}
    for number, unit in enumerate(plan.units(kind, shard_size)):
        entry = workspace.read_journal(kind, number)
        rows += entry["rows"]
        failed |= {unit.start + int(item): reason for item, reason in entry["failed"].items()}
        files |= entry["files"]
    return np.asarray(rows, dtype=np.int32), failed


def _encoding_rejects(
    plan: Plan, usable: np.ndarray, image_failed: dict[int, str], text_failed: dict[int, str]
) -> list[dict[str, Any]]:
    entries = []
    for pair in np.flatnonzero(~usable).tolist():
        winner, loser = image_failed.get(int(plan.image_w[pair])), image_failed.get(int(plan.image_l[pair]))
        reason = winner or loser or text_failed.get(int(plan.caption[pair]), "not encoded")
        entries.append({"record": int(plan.record[pair]), "reason": reason})
    return entries


def _record(entry: dict[str, Any]) -> int:
    return entry["record"]


def _pairs(plan: Plan, usable: np.ndarray) -> pa.Table:
    columns = {
        "record": plan.record,
        "image_w": plan.image_w.astype(np.int32),
        "image_l": plan.image_l.astype(np.int32),
        "caption": plan.caption.astype(np.int32),
        "label": plan.label,
        "bucket": plan.bucket,
    }
    return pa.table({name: values[usable] for name, values in columns.items()})


def _images(job: Job, plan: Plan, rows: np.ndarray) -> pa.Table:
    fits = [
        fit((int(width), int(height)), plan.buckets[bucket])
        for (width, height), bucket in zip(plan.image_size, plan.image_bucket, strict=True)
    ]
    count = len(plan.image_key)
    return pa.table(
        {
            "sha256": pa.array(plan.image_key, pa.binary(32)),
            "shard": (np.arange(count) // job.shard_size).astype(np.int32),
            "row": rows,
            "bucket": plan.image_bucket,
            "width": plan.image_size[:, 0],
            "height": plan.image_size[:, 1],
            "crop_top": np.asarray([f.crop_top for f in fits], dtype=np.int32),
            "crop_left": np.asarray([f.crop_left for f in fits], dtype=np.int32),
        }
    )


def _captions(job: Job, plan: Plan, rows: np.ndarray) -> pa.Table:
    shard = (np.arange(len(plan.captions)) // job.shard_size).astype(np.int32)
    return pa.table({"caption": pa.array(plan.captions, pa.string()), "shard": shard, "row": rows})


def _manifest(
    job: Job, plan: Plan, pairs: int, rejected: list[dict[str, Any]], files: dict[str, Any], cut: CutCaptions | None
) -> StoreManifest:
    made = StoreManifest(
        fingerprint=job.fingerprint,
        records=job.records,
        family=job.family,
        model_fingerprint=job.model_fingerprint,
        clip_fingerprint=job.clip_fingerprint,
        dtype=job.dtype,
        text_dtype=job.text_dtype,
        resolution=job.resolution,
        vae_scale_factor=job.shape.vae_scale_factor,
        latent_channels=job.shape.latent_channels,
        scaling_factor=job.shape.scaling_factor,
        buckets=job.buckets,
        posterior=job.posterior,
        flips=job.flips,
        ties=job.ties,
        max_caption_tokens=job.max_caption_tokens,
        cut=cut,
        shard_size=job.shard_size,
        pairs=pairs,
        images=len(plan.image_key),
        captions=len(plan.captions) - 1,
        source_records=plan.records,
        rejected=len(rejected),
        ties_dropped=plan.ties_dropped,
        identical_dropped=plan.identical_dropped,
        unlabelled=plan.unlabelled,
        reasons=dict(sorted(reasons(rejected).items())),
        files={name: StoredFile(**entry) for name, entry in sorted(files.items())},
    )
    return made.model_copy(update={"sha256": made.digest()})
