"""``fastpref prepare``: preference records to a store, encoded once.

Three stages, each resumable and shared over the ranks of a launcher: *scan* (check, hash, measure every record),
*encode* (each distinct picture and caption once, shard by shard) and *finish* (index and manifest, by rank 0). What a
shard holds is a function of the records alone, so the store is the same bytes on any number of ranks and after any
interruption.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fastpref.atomic import write_bytes
from fastpref.config import Config
from fastpref.data import manifest
from fastpref.data.checksums import with_checksums
from fastpref.data.finish import finish, write_rejected
from fastpref.data.images import own_pixel_limit
from fastpref.data.job import Job, make_job
from fastpref.data.plan import Plan, check_usable, make_plan
from fastpref.data.progress import Bars, PrepareSummary
from fastpref.data.records import open_records
from fastpref.data.scan import scan_segment, segments
from fastpref.data.sources import Source
from fastpref.data.workspace import Ranks, Workspace
from fastpref.models.caption_length import count_cut

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from fastpref.data.encode import Unit


def prepare(
    config: Config,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    console: Console | None = None,
) -> PrepareSummary:
    """Make ``config.store`` from ``config.records``.

    Args:
        config: the recipe; ``records``, ``model``, ``clip``, ``store`` and the settings under "Prepare" are used, and
            ``precision`` and ``device`` for the encoders.
        dry_run: read and check everything, write nothing, measure the encoders on a few records and estimate.
        overwrite: replace a finished store (or an unfinished one of other settings) at that place.
        progress: show bars with the time left on ``console``.
        console: a rich console; default: standard error.

    Returns:
        Counts, bytes and seconds; on a rank above 0, before rank 0 has finished.

    Raises:
        UserError: records, model or directory cannot be used, or more than ``max_reject_share`` is rejected; then no
            finished store is left behind, ``rejected.jsonl`` says why.
    """
    started = time.perf_counter()
    source = open_records(config.records)
    job = make_job(config, source)
    ranks = Ranks.from_env()
    with own_pixel_limit(), Bars(progress and ranks.rank == 0, console) as bars:
        if dry_run:
            from fastpref.data.estimate import dry_run_summary

            return dry_run_summary(job, source, rank_device(config, ranks), Path(config.store), bars)
        workspace = Workspace(Path(config.store), job.fingerprint, ranks)
        if not workspace.claim(overwrite):
            return _up_to_date(workspace.path, started)
        try:
            return _run(job, source, workspace, rank_device(config, ranks), bars, started)
        except FileNotFoundError:
            # A process with nothing left to do may still be reading work/ when another finishes and removes it.
            if workspace.finished_as() == job.fingerprint:
                return _up_to_date(workspace.path, started)
            raise


def _run(
    job: Job, source: Source, workspace: Workspace, device: torch.device, bars: Bars, started: float
) -> PrepareSummary:
    plan = make_plan(_scan(job, source, workspace, bars), job.buckets)
    listing = workspace.path / manifest.REJECTED
    if workspace.ranks.rank == 0:
        write_rejected(listing, plan.rejected)
    check_usable(plan.rejected, len(plan.record), plan.records, job.max_reject_share, job.records, listing)
    _encode(job, source, plan, workspace, device, bars)
    if workspace.ranks.rank == 0:
        workspace.wait_for([file for kind in ("text", "image") for file in _journals(workspace, plan, job, kind)])
        advance = bars.add("captions measured", len(plan.captions) - 1, workspace.beat)
        cut = count_cut(job.model_dir, job.max_caption_tokens, plan.captions[1:], advance)
        result = finish(job, plan, workspace, cut)
        return PrepareSummary.of_manifest(result, workspace.path, time.perf_counter() - started)
    return PrepareSummary.of_plan(plan, workspace.path, time.perf_counter() - started)


def _scan(job: Job, source: Source, workspace: Workspace, bars: Bars) -> list[pa.Table]:
    parts = segments(len(source))
    todo = [(n, part) for n, part in workspace.ranks.share(parts) if not workspace.is_scanned(n)]
    advance = bars.add("records checked", sum(len(part) for _, part in todo), workspace.beat)
    for number, part in todo:
        table = scan_segment(source, part, job.scan_rules, advance)
        workspace.write_scan(number, table)
    workspace.wait_for([workspace.scan_file(number) for number in range(len(parts))])
    return [workspace.read_scan(number) for number in range(len(parts))]


def _encode(job: Job, source: Source, plan: Plan, workspace: Workspace, device: torch.device, bars: Bars) -> None:
    """The rank's shards that the journal does not have, captions first."""
    todo = {}
    for kind in ("text", "image"):
        shards = workspace.ranks.share(plan.units(kind, job.shard_size))
        todo[kind] = [(n, unit) for n, unit in shards if not workspace.is_encoded(kind, n)]
    if not any(todo.values()):
        return
    from fastpref.data.encode import Encoders, encode_image_unit, encode_text_unit

    encoders = Encoders(job, device)
    advance = bars.add("captions encoded", sum(len(unit) for _, unit in todo["text"]), workspace.beat)
    for number, unit in todo["text"]:
        captions = plan.captions[unit.start : unit.stop]
        _write_unit(workspace, "text", number, encode_text_unit(encoders, captions, job.batch_size, advance))
    encoders.release_text()
    advance = bars.add("pictures encoded", sum(len(unit) for _, unit in todo["image"]), workspace.beat)
    for number, unit in todo["image"]:
        _write_unit(workspace, "image", number, encode_image_unit(encoders, source, plan, unit, job, advance))


def _write_unit(workspace: Workspace, kind: str, number: int, unit: Unit) -> None:
    """The shard's files first, its journal entry last."""
    from safetensors.torch import save

    apart = {name: rows for name, rows in unit.tensors.items() if name.startswith("clip_")}
    main = {name: rows for name, rows in unit.tensors.items() if name not in apart}
    names = {"text": ("text", "clip-text"), "image": ("latents", "clip-image")}[kind]
    files: dict[str, Any] = {}
    for name, tensors in zip(names, (main, apart), strict=True):
        if tensors:
            shard = manifest.shard_name(name, number)
            files[shard] = write_bytes(workspace.path / shard, save(with_checksums(shard, tensors)))
    workspace.write_journal(kind, number, files, unit.rows, unit.failed)


def _journals(workspace: Workspace, plan: Plan, job: Job, kind: str) -> list[Path]:
    return [workspace.journal(kind, number) for number in range(len(plan.units(kind, job.shard_size)))]


def _up_to_date(path: Path, started: float) -> PrepareSummary:
    from fastpref.data.store import Store

    found = Store.open(path, verify=True).manifest
    return PrepareSummary.of_manifest(found, path, time.perf_counter() - started, up_to_date=True)


def rank_device(config: Config, ranks: Ranks) -> torch.device:
    """The device of this process."""
    import torch

    from fastpref.models.loading import resolve_device

    device = resolve_device(config.device)
    return torch.device("cuda", ranks.local_rank) if device.type == "cuda" else device
