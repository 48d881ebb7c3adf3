"""One training job: checks everything before it writes anything, trains with checkpoints, and exports the result."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastpref.config import Config
from fastpref.data.sampling import Sampler
from fastpref.data.store import Store
from fastpref.errors import UserError
from fastpref.models.loading import (
    load_noise_schedule,
    model_family,
    model_fingerprint,
    resolve_device,
    resolve_model_dir,
)
from fastpref.models.policy import Policy, load_policy
from fastpref.objectives import Objective, build_objective
from fastpref.train.batch import BatchBuilder
from fastpref.train.checkpoint import Checkpoint, newest_intact, save_checkpoint
from fastpref.train.engine import LocalEngine
from fastpref.train.offline import OfflineTrainer
from fastpref.train.telemetry import (
    MetricsLog,
    StopRequest,
    check_tracker,
    peak_device_bytes,
    peak_rss_bytes,
    progress_bar,
)


class Stopped(Exception):
    """A signal ended the run after a checkpoint; the process exits with 128 + its number."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


@dataclass
class TrainJob:
    """The checked inputs of a run; :meth:`run` does it. Making one reads but never writes."""

    config: Config
    model_dir: Path
    device: torch.device
    store: Store
    sampler: Sampler
    objective: Objective
    policy: Policy
    trainer: OfflineTrainer
    engine: LocalEngine
    began: float
    console: Console = field(default_factory=lambda: Console(stderr=True))
    seconds_before: float = 0.0

    @classmethod
    def open(cls, config: Config, console: Console | None = None) -> TrainJob:
        """Check model, store and batch arithmetic, and load what is trained.

        Raises:
            UserError: anything that would stop the run later and can be known now.
        """
        began = time.perf_counter()
        if config.engine == "deepspeed":
            raise UserError("engine deepspeed is not part of this release", "engine", "use engine=local")
        check_tracker(config)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model_dir = resolve_model_dir(config.model)
        for key in ("unet", "init_lora"):
            value = getattr(config, key)
            if value is not None and not Path(value).exists():
                raise UserError(f"{key}: no such file", value, "give a path on disk")
        device = resolve_device(config.device)
        store = Store.open(Path(config.store))
        store.check_model(model_fingerprint(model_dir), model_family(model_dir))
        objective = build_objective(config)
        _check_store(config, objective, store)
        related = store.clip_text_all() if config.sampling == "related" else None
        sampler = Sampler(
            store.bucket_ids,
            batch_size=config.batch_size,
            group_size=config.group,
            seed=config.seed,
            sampling=config.sampling,
            embeddings=related,
        )
        schedule = load_noise_schedule(model_dir)
        if config.timestep_range is not None and config.timestep_range[1] > schedule.num_train_timesteps:
            raise UserError(f"timestep_range ends above {schedule.num_train_timesteps}", "timestep_range", "lower it")
        policy = load_policy(config, model_dir, device, needs_reference=objective.uses_reference)
        _check_unet(policy, store, config)
        engine = LocalEngine(policy, config)
        batches = BatchBuilder(store, schedule, config, device, with_losers=objective.uses_losers)
        trainer = OfflineTrainer(config, policy, objective, sampler, batches, engine)
        console = console or Console(stderr=True)
        return cls(config, model_dir, device, store, sampler, objective, policy, trainer, engine, began, console)

    def run(self, run_dir: Path) -> dict[str, Any]:
        """Train from scratch or from the newest intact checkpoint; returns the training part of ``summary.json``.

        Raises:
            Stopped: SIGTERM or Ctrl-C came; a checkpoint of the last finished step is on disk.
        """
        start, seconds = self._resume(run_dir, self.trainer, self.engine)
        seconds = self._loop(run_dir, self.trainer, self.engine, start, seconds)
        _export(self.policy, self.engine, self.config, run_dir)
        return _summary(self.config, self.policy, seconds, self.device, self.trainer.skipped)

    def seconds_total(self) -> float:
        """Wall-clock seconds of this part of the run so far and of those before it."""
        return self.seconds_before + time.perf_counter() - self.began

    def _loop(self, run_dir: Path, trainer: OfflineTrainer, engine: LocalEngine, start: int, before: float) -> float:
        config, began = self.config, time.perf_counter()
        log = MetricsLog(run_dir, config, start)
        bar = progress_bar(self.console)

        def spent() -> float:
            return before + time.perf_counter() - began

        def save(step: int) -> None:
            log.sync()
            tensors, values = engine.state()
            values |= {"counts": _counts(trainer.policy), "seconds": spent(), "skipped": trainer.skipped}
            values["seconds_total"] = self.seconds_total()
            save_checkpoint(run_dir / "checkpoints", step, tensors, values, config.keep_checkpoints)

        with bar, StopRequest() as stop:
            task = bar.add_task(f"train {config.method}", total=config.steps, completed=start, note="")
            for step in range(start, config.steps):
                tick = time.perf_counter()
                metrics = trainer.step(step)
                metrics["seconds"] = time.perf_counter() - tick
                done = step + 1
                if done % config.log_every == 0 or done == config.steps:
                    log.write(metrics)
                bar.update(task, advance=1, note=_note(metrics))
                if stop.signal is not None or done % config.checkpoint_every == 0 or done == config.steps:
                    save(done)
                if stop.signal is not None:
                    log.close()
                    raise Stopped(stop.signal)
        log.close()
        return spent()

    def _resume(self, run_dir: Path, trainer: OfflineTrainer, engine: LocalEngine) -> tuple[int, float]:
        """Put back the newest intact checkpoint; (steps done, seconds spent)."""
        for found in newest_intact(run_dir / "checkpoints"):
            if isinstance(found, Checkpoint):
                return self._restore(found, trainer, engine)
            path, fault = found
            self.console.print(f"damaged checkpoint {path}: {fault}; using the one before it", style="yellow")
            shutil.move(path, path.with_name(f"damaged-{path.name}-{int(time.time())}"))
        return 0, 0.0

    def _restore(self, checkpoint: Checkpoint, trainer: OfflineTrainer, engine: LocalEngine) -> tuple[int, float]:
        if checkpoint.step > self.config.steps:
            raise UserError(
                f"the checkpoint is at step {checkpoint.step}", str(checkpoint.path), "set steps above that"
            )
        try:
            engine.load_state(checkpoint.tensors, checkpoint.values)
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError("the checkpoint does not fit this model", str(checkpoint.path), str(error)) from error
        counts = checkpoint.values["counts"]
        trainer.policy.forwards, trainer.policy.recomputed, trainer.policy.backwards = counts
        trainer.skipped = checkpoint.values["skipped"]
        self.seconds_before = float(checkpoint.values.get("seconds_total", checkpoint.values["seconds"]))
        self.console.print(f"resuming after step {checkpoint.step}")
        return checkpoint.step, float(checkpoint.values["seconds"])


def _check_store(config: Config, objective: Objective, store: Store) -> None:
    if store.manifest.ties == "half" and config.method != "dpo":
        raise UserError(
            f"method {config.method} has no use for ties of one half",
            config.store,
            "prepare with ties=drop or ties=keep",
        )
    needs = objective.uses_embeddings or config.sampling == "related"
    if needs and store.manifest.clip_fingerprint is None:
        raise UserError(
            "the store holds no CLIP embeddings", config.store, "prepare it with clip=FOLDER, or set weight=uniform"
        )


def _check_unet(policy: Policy, store: Store, config: Config) -> None:
    """The UNet (which may come from another folder than the text encoders) takes what the store holds."""
    unet, where = policy.unet.config, config.unet or config.model
    prompt, pooled = store.empty_prompt()
    channels, takes_pooled = store.manifest.latent_channels, unet.get("addition_embed_type") == "text_time"
    if takes_pooled != (pooled is not None):
        family = "SDXL" if takes_pooled else "SD1.5"
        raise UserError(f"the UNet is one of {family}, the store was made for {store.manifest.family}", where)
    for name, takes, holds in (
        ("in_channels", unet["in_channels"], channels),
        ("out_channels", unet["out_channels"], channels),
        ("cross_attention_dim", unet["cross_attention_dim"], prompt.shape[-1]),
    ):
        if takes != holds:
            raise UserError(f"{name} of the UNet is {takes}, the store needs {holds}", where, "use a UNet that fits")


def _counts(policy: Policy) -> list[int]:
    return [policy.forwards, policy.recomputed, policy.backwards]


def _note(metrics: dict[str, Any]) -> str:
    parts = [f"loss {metrics['loss']:.4f}"]
    if metrics["accuracy"] is not None:
        parts.append(f"acc {metrics['accuracy']:.2f}")
    return " ".join(parts)


def _export(policy: Policy, engine: LocalEngine, config: Config, run_dir: Path) -> None:
    """The trained weights (their EMA if there is one) in diffusers' format."""
    from fastpref.models.lora_file import WEIGHTS_NAME, save_lora

    averages = engine.ema_weights()
    with torch.no_grad():
        for name, average in averages.items():
            policy.trainable[name].copy_(average)
    if config.train == "lora":
        save_lora(policy.unet, run_dir / WEIGHTS_NAME)
        return
    draft, final = run_dir / ".unet.tmp", run_dir / "unet"
    shutil.rmtree(draft, ignore_errors=True)
    policy.unet.save_pretrained(draft)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)


def _summary(config: Config, policy: Policy, seconds: float, device: torch.device, skipped: int) -> dict[str, Any]:
    seen = config.steps * config.batch_size
    return {
        "method": config.method,
        "steps": config.steps,
        "samples_seen": seen,
        "seconds_train": seconds,
        "samples_per_second": seen / seconds if seconds else None,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(device),
        "world_size": 1,
        "unet_forwards": policy.forwards,
        "unet_recomputed": policy.recomputed,
        "unet_backwards": policy.backwards,
        "vae_encodes": 0,
        "vae_decodes": 0,
        "text_forwards": 0,
        "scorer_forwards": 0,
        "skipped_steps": skipped,
    }
