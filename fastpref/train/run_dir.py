"""The run directory: who may write it, and what of an earlier run is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fastpref import atomic
from fastpref.atomic import check_writable
from fastpref.config import Config, load_config, save_config
from fastpref.config_rules import OFFLINE_METHODS
from fastpref.data.ledger import OWN_SIZES
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.train.checkpoint import newest_step
from fastpref.train.reference import sizes_told

# Settings that may change between the parts of a resumed run without changing what is computed.
# fmt: off
FREE_ON_RESUME = frozenset([
    "name", "output_dir", "resume", "overwrite", "evaluate", "steps", "device", "threads", "micro_batch_size",
    "accumulation", "checkpoint_every", "keep_checkpoints", "keep_best", "checkpoint_async", "export_checkpoints",
    "log_every", "tracker", "guidance_scale", "sample_steps",
    "eval_records", "eval_prompts", "eval_seeds", "eval_batch_size", "records", "ties", "identical", "posterior",
    "buckets", "resolution", "clip", "max_reject_share", "shard_size", "prepare_batch_size",
    "max_image_pixels", "max_enlargement",
    "vae_precision", "max_skipped_steps", "engine", "zero_stage", "deepspeed", "rank_timeout",
    "decode_batch_size", "rollout_batch_size", "eval_timesteps",
    "eval_target_images", "eval_base_images", "eval_style", "eval_clip", "compile", "cuda_graphs", "profile",
    "gradient_checkpointing", "fused_ops",
])
# fmt: on
_STEPWISE = frozenset(["guidance_scale", "sample_steps", "resolution", "records", "clip", "vae_precision"])
# Of those, what decides the training of a method after all.
FIXED_BY_METHOD = {
    "spm": frozenset(["guidance_scale", "clip", "vae_precision"]),
    "lrm": frozenset(["guidance_scale", "clip"]),
    "spo": _STEPWISE,
    "lpo": _STEPWISE,
}
EVALUATION_KEYS = (
    *("guidance_scale", "sample_steps", "eval_records", "eval_prompts", "eval_seeds", "clip"),
    *("eval_timesteps", "eval_target_images", "eval_base_images", "eval_style", "eval_clip"),
)


def check_run_dir(config: Config) -> bool:
    """Whether the run continues an earlier one. Writes nothing.

    Raises:
        UserError: the directory exists and neither ``resume=auto`` nor ``overwrite=true`` is set, it is no run
            directory, it cannot be written, or it was made with settings that cannot be continued.
    """
    run_dir = config.run_dir
    check_writable(run_dir)
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return False
    is_run = (run_dir / "config.yaml").is_file()
    if config.overwrite:
        if not is_run:
            raise UserError(
                "not a run directory, so overwrite=true does not delete it", str(run_dir), "choose another name"
            )
        return False
    if config.resume != "auto":
        raise UserError("the run directory exists", str(run_dir), "set resume=auto, overwrite=true or another name")
    if not is_run:
        raise UserError("not a run directory: nothing to resume", str(run_dir), "choose another name")
    _check_same(config, run_dir)
    newest = newest_step(run_dir / "checkpoints")
    if newest > config.steps:
        raise UserError(f"steps is {config.steps} but a checkpoint is at step {newest}", str(run_dir), "set more steps")
    return True


def open_run_dir(config: Config, resuming: bool) -> Path:
    """Make the run directory (clearing it for ``overwrite=true``) and save the resolved config."""
    run_dir = config.run_dir
    if not resuming and run_dir.exists():
        shutil.rmtree(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
    except OSError as error:
        raise UserError("cannot write the run directory", str(run_dir), str(error)) from None
    return run_dir


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of an earlier part of the run, or an empty one; :class:`UserError` if it is damaged."""
    value = atomic.read_json(path)
    if not isinstance(value.get("seconds_total") or 0.0, int | float):
        raise UserError("seconds_total is no number", str(path), "restore or delete the file")
    return value


def _check_same(config: Config, run_dir: Path) -> None:
    started = load_config(run_dir / "config.yaml")
    before, now = started.model_dump(), config.model_dump()
    free = FREE_ON_RESUME - FIXED_BY_METHOD.get(config.method, frozenset())
    for key in now:
        if key not in free and before[key] != now[key]:
            raise UserError(
                f"{key} is {now[key]!r} but the run was started with {before[key]!r}",
                str(run_dir),
                "resume with the same settings, or set overwrite=true or another name",
            )
    if "size_conditioning" not in started.model_fields_set:
        _check_own_sizes(config, run_dir)


def _check_own_sizes(config: Config, run_dir: Path) -> None:
    """Before ``size_conditioning`` was a setting, SDXL was told each picture's own size by all but lrm, spo and lpo."""
    if config.method not in (*OFFLINE_METHODS, "spm"):
        return
    if sizes_told(config, Store.open(config.store)) != OWN_SIZES:
        what = f"size_conditioning is {config.size_conditioning!r} but the run was started with each picture's own size"
        raise UserError(what, str(run_dir), "set overwrite=true or another name")
