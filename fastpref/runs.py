"""A run from end to end: evaluate, train, evaluate, report; and the same measures on what is already there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpref.config_rules import SCORER_METHODS
from fastpref.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastpref.config import Config
    from fastpref.train.job import TrainJob
    from fastpref.train.world import World


def run_training(config: Config, *, dry_run: bool = False) -> str:
    """Evaluate, train, evaluate, report; the line that says what it came to.

    Raises:
        Stopped: a signal ended the training after a checkpoint (see :mod:`fastpref.train.job`).
    """
    from fastpref.models.loading import resolve_device
    from fastpref.train.world import close_world, open_world

    device = resolve_device(config.device)
    world = open_world(config, device)
    try:
        with world.watching():
            said = _run(config, world, device, dry_run=dry_run)
    except UserError as error:
        error.shared = bool(error.shared)
        raise
    close_world()
    return said


def _run(config: Config, world: World, device: torch.device, *, dry_run: bool) -> str:
    from fastpref.memory import give_back_freed_blocks
    from fastpref.models.fused_ops import fused_ops_line
    from fastpref.plan.recompute import resolve_recomputation
    from fastpref.train.job import TrainJob
    from fastpref.train.run_dir import check_run_dir, open_run_dir

    with world.together():
        resuming = check_run_dir(config)
        earlier, evaluation = _earlier(config) if resuming else ({}, {})
    mode, why = resolve_recomputation(config, device, world)
    if mode != "none":  # memory comes before time
        give_back_freed_blocks()
    with world.together():
        job = TrainJob.open(config.model_copy(update={"gradient_checkpointing": mode}), world=world)
    for line in (why, fused_ops_line(config.fused_ops, device) if device.type == "cuda" else ""):
        if line:
            job.console.print(line, markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        job.trainer.verify()
        subject = job.trainer.describe()
        said = f"ok: {config.method}, {subject}, {config.steps} steps of {config.batch_size} pairs"
        return said if world.is_main else ""
    with world.alone():
        if world.is_main:
            open_run_dir(config, resuming)
            if config.evaluate and "before" not in evaluation:
                _evaluate(config, evaluation, "before")
    summary = job.run(config.run_dir)
    job.seconds_before = max(job.seconds_before, earlier.get("seconds_total") or 0.0)
    with world.alone():
        return _finish(config, job, summary, evaluation, earlier) if world.is_main else ""


def _finish(
    config: Config, job: TrainJob, summary: dict[str, Any], evaluation: dict[str, Any], earlier: dict[str, Any]
) -> str:
    """What one rank does after the training: measure, sum up, report."""
    from fastpref.atomic import write_json

    if config.evaluate and ("after" not in evaluation or earlier.get("steps") != config.steps):
        _evaluate(config, evaluation, "after")
    summary = {**summary, "seconds_total": job.seconds_total(), "evaluation": evaluation or None}
    write_json(config.run_dir / "summary.json", summary)
    if config.evaluate:
        from fastpref.evaluate.report import write_report

        write_report(config.run_dir)
    return _closing_line(config.run_dir, summary)


def _evaluate(config: Config, evaluation: dict[str, Any], tag: str) -> None:
    from fastpref.atomic import write_json

    evaluation[tag] = evaluate_tag(config, config.run_dir, tag)
    write_json(config.run_dir / "evaluation.json", evaluation)


def _earlier(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """summary.json and evaluation.json of the run that is resumed; what was measured in another way does not count."""
    from fastpref.config import load_config
    from fastpref.train.run_dir import EVALUATION_KEYS, read_json

    summary, evaluation = (read_json(config.run_dir / name) for name in ("summary.json", "evaluation.json"))
    before = load_config(config.run_dir / "config.yaml")
    same = all(getattr(before, key) == getattr(config, key) for key in EVALUATION_KEYS)
    return summary, evaluation if same else {}


def _closing_line(run_dir: Path, summary: dict[str, Any]) -> str:
    cost = f"{summary['seconds_total']:.0f} s, {summary['peak_rss_bytes'] / 1e9:.1f} GB"
    line = f"{run_dir}: {summary['steps']} steps of {summary['method']} in {summary['seconds_train']:.0f} s; all {cost}"
    evaluation = summary["evaluation"] or {}
    shares = [evaluation.get(tag, {}).get("style_share") for tag in ("before", "after")]
    if None not in shares:
        line += f"; style_share {shares[0]:.2f} -> {shares[1]:.2f}; see {run_dir}/report.html"
    found = [evaluation.get(tag, {}).get("pair_accuracy") for tag in ("before", "after")]
    if None not in found:
        means = [sum(by_timestep.values()) / len(by_timestep) for by_timestep in found]
        line += f"; pair accuracy {means[0]:.2f} -> {means[1]:.2f}; see {run_dir}/report.html"
    return line


def evaluate_tag(config: Config, run_dir: Path, tag: str) -> dict[str, Any]:
    """The evaluation of a run ``before`` or ``after`` its training, in the method's own measures."""
    if config.method in SCORER_METHODS:
        from fastpref.evaluate.pair_accuracy import evaluate_pair_accuracy

        return evaluate_pair_accuracy(config, folder=trained_scorer(run_dir) if tag == "after" else None)

    from fastpref.evaluate.runner import evaluate_policy

    lora, unet = trained_policy(run_dir) if tag == "after" else (None, None)
    return evaluate_policy(config, lora=lora, unet=unet, out_dir=run_dir, tag=tag, progress=True)


def evaluate_run(run_dir: Path, overrides: list[str] | None) -> Path:
    """Measure a finished run again, before and after; the renewed report."""
    from fastpref.atomic import write_json
    from fastpref.evaluate.report import write_report
    from fastpref.train.run_dir import read_json

    config = config_of_run(run_dir, overrides)
    trained_scorer(run_dir) if config.method in SCORER_METHODS else trained_policy(run_dir)
    summary = read_json(run_dir / "summary.json")
    evaluation = {tag: evaluate_tag(config, run_dir, tag) for tag in ("before", "after")}
    write_json(run_dir / "evaluation.json", evaluation)
    write_json(run_dir / "summary.json", summary | {"evaluation": evaluation})
    return write_report(run_dir)


def evaluate_folder(folder: Path, overrides: list[str] | None, out: Path) -> list[str]:
    """Measure a pipeline (folder or one file), or a folder of pictures; the lines that say what was found."""
    from fastpref.atomic import check_writable, make_directory, write_json
    from fastpref.config import load_config
    from fastpref.evaluate.runner import evaluate_pictures, evaluate_policy
    from fastpref.evaluate.words import result_lines

    check_writable(out)
    if (folder / "model_index.json").is_file() or folder.is_file():
        config = load_config("", [*(overrides or []), f"model={folder}"])
        result = evaluate_policy(config, out_dir=out, tag="before", progress=True)
    else:
        result = evaluate_pictures(load_config("", overrides), folder, out_dir=out)
    make_directory(out)
    write_json(out / "evaluation.json", {"before": result})
    return [*result_lines(result), f"{out}/evaluation.json"]


def trained_policy(run_dir: Path) -> tuple[Path | None, Path | None]:
    """(LoRA file, None) or (None, UNet folder) of a finished run."""
    lora, unet = run_dir / "pytorch_lora_weights.safetensors", run_dir / "unet"
    if not lora.exists() and not unet.exists():
        raise UserError("no trained weights there", str(run_dir), "finish the training first (resume=auto)")
    return (lora, None) if lora.exists() else (None, unet)


def trained_scorer(run_dir: Path) -> Path:
    """The step-aware preference model or latent reward model of a finished run."""
    from fastpref.models import latent_reward_file, step_preference_file

    for kind in (step_preference_file, latent_reward_file):
        if (run_dir / kind.FOLDER_NAME / kind.WEIGHTS_NAME).is_file():
            return run_dir / kind.FOLDER_NAME
    raise UserError("no trained preference model there", str(run_dir), "finish the training first (resume=auto)")


def config_of_run(run: Path, overrides: list[str] | None = None) -> Config:
    """The settings a run was made with, with overrides."""
    from fastpref.config import load_config

    if not (run / "config.yaml").is_file():
        raise UserError("not a run directory", str(run), "give a folder that fastpref train wrote")
    return load_config(run / "config.yaml", overrides)
