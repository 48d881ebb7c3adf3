"""The command line: composes the parts, computes nothing. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastpref.errors import UserError

if TYPE_CHECKING:
    from fastpref.config import Config

app = typer.Typer(
    help="Align SDXL and SD1.5 with human preferences: SFT, Diffusion-DPO, Diffusion-RPO.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="recipe, e.g. configs/emoji_rpo.yaml")]
Device = Literal["auto", "cpu", "cuda"]
Layout = Literal["pipeline", "diffusers", "kohya"]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over the recipe's")]


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    return None


@app.command()
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="validate and count only, with GB and hours")] = False,
) -> None:
    """Encode preference records once: latents, text and CLIP embeddings into a store."""
    from fastpref.config import load_config
    from fastpref.data.prepare import prepare as run_prepare

    settings = load_config(config, overrides)
    summary = run_prepare(settings, dry_run=dry_run, overwrite=settings.overwrite)
    typer.echo(str(summary))


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="recipe, e.g. configs/emoji_rpo.yaml")] = "",
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, write nothing")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="list every setting with its default and stop")] = False,
) -> None:
    """Train on a prepared store; with evaluate=true also sample, score and report before and after."""
    from fastpref.config import load_config

    if keys:
        _print_keys()
        return
    if not config:
        raise UserError("no CONFIG given", "fastpref train", "name a recipe, e.g. configs/emoji_rpo.yaml")
    _run_training(load_config(config, overrides), dry_run)


@app.command()
def sample(
    config: ConfigFile,
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="a prompt; may be repeated")] = None,
    prompts: Annotated[Path | None, typer.Option(help="prompts from txt, json, jsonl or parquet")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="pictures per prompt")] = 1,
    lora: Annotated[Path | None, typer.Option(help="LoRA file; a run directory means its LoRA")] = None,
    unet: Annotated[Path | None, typer.Option(help="UNet folder of a full fine-tuning")] = None,
    out: Annotated[Path, typer.Option(help="where the pictures go")] = Path("samples"),
) -> None:
    """Draw pictures, deterministic per prompt and seed, with or without a LoRA."""
    from fastpref.config import load_config
    from fastpref.data.records import read_captions
    from fastpref.evaluate.sample import run_sample

    settings = load_config(config, overrides)
    wanted = list(prompt or [])
    if prompts is not None:
        wanted += read_captions(str(prompts), None)
    if not wanted:
        raise UserError("nothing to draw", "fastpref sample", "give --prompt TEXT or --prompts FILE")
    written = run_sample(settings, wanted, list(range(seeds)), lora=_lora_file(lora), unet=unet, out_dir=out)
    typer.echo(f"{len(written)} pictures in {out}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory, e.g. runs/quickstart")],
    overrides: Overrides = None,
) -> None:
    """Sample held-out prompts before and after, score them, and renew summary.json and report.html."""
    from fastpref.atomic import write_json
    from fastpref.evaluate.report import write_report
    from fastpref.train.run_dir import read_json

    config = _config_of_run(run, overrides)
    _trained(run)
    summary = read_json(run / "summary.json")
    evaluation = {tag: _evaluate(config, run, tag) for tag in ("before", "after")}
    write_json(run / "evaluation.json", evaluation)
    write_json(run / "summary.json", summary | {"evaluation": evaluation})
    typer.echo(f"{write_report(run)}")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory, e.g. runs/quickstart")]) -> None:
    """Write RUN/report.html from what the run left there."""
    from fastpref.evaluate.report import write_report

    _config_of_run(run, None)
    typer.echo(f"{write_report(run)}")


@app.command()
def score(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory with samples/, e.g. runs/quickstart")],
    scorer: Annotated[list[str], typer.Option(help="NAME=PATH[,OPTION=PATH]; may be repeated")],
    against: Annotated[Path | None, typer.Option(help="baseline run; default: this run before training")] = None,
    prompts: Annotated[Path | None, typer.Option(help="only this prompt set (txt, json, jsonl, parquet)")] = None,
    out: Annotated[Path | None, typer.Option(help="where the table goes; default: RUN/scores")] = None,
    device: Annotated[Device, typer.Option(help="where the scorers run")] = "auto",
) -> None:
    """Score a run's pictures by PickScore, HPSv2, ImageReward, LAION Aesthetic or CLIP: medians and win rates."""
    from fastpref.evaluate.scores import run_scores

    baseline = run / "samples" / "before" if against is None else against / "samples" / "after"
    folder = out or run / "scores"
    wanted = None if prompts is None else str(prompts)
    table = run_scores(baseline, run / "samples" / "after", scorer, folder, prompts=wanted, device=device)
    for row in table.rows:
        typer.echo(
            f"{row.scorer}: median {row.median_before:.4g} -> {row.median_after:.4g}, win rate {row.win_rate:.3f} "
            f"[{row.win_rate_low:.3f}, {row.win_rate_high:.3f}] of {row.n} pairs"
        )
    typer.echo(f"{folder}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory, e.g. runs/quickstart")],
    out: Annotated[Path, typer.Option(help="file (LoRA layouts) or folder (pipeline) to write")],
    layout: Annotated[Layout, typer.Option(help="merged pipeline folder, or LoRA file in that naming")] = "pipeline",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it exists")] = False,
) -> None:
    """Write a merged pipeline folder, or the LoRA in diffusers' or kohya/ComfyUI naming."""
    from fastpref.models.export import run_export

    typer.echo(f"{run_export(run, out, layout=layout, overwrite=overwrite)}")


def main() -> None:
    """Run a command; a user's error is one line on stderr and exit code 2."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"] or ["--help"]
    try:
        code = app(arguments, standalone_mode=False)
    except UserError as error:
        _fail(str(error), debug)
    except typer.Abort:
        _fail("interrupted", debug)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors, whichever click typer carries
            raise
        _fail(f"{error.format_message()} (see --help)", debug)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"error: {' '.join(line.split())}\n")
    sys.exit(2)


def _run_training(config: Config, dry_run: bool) -> None:
    from fastpref.atomic import write_json
    from fastpref.train.job import Stopped, TrainJob
    from fastpref.train.run_dir import check_run_dir, open_run_dir

    resuming = check_run_dir(config)
    earlier, evaluation = _earlier(config) if resuming else ({}, {})
    job = TrainJob.open(config)
    if dry_run:
        typer.echo(f"ok: {config.method}, {len(job.store)} pairs, {config.steps} steps of {config.batch_size} pairs")
        return
    run_dir = open_run_dir(config, resuming)
    if config.evaluate and "before" not in evaluation:
        evaluation["before"] = _evaluate(config, run_dir, "before")
        write_json(run_dir / "evaluation.json", evaluation)
    try:
        summary = job.run(run_dir)
    except Stopped as stop:
        raise typer.Exit(stop.exit_code) from None
    job.seconds_before = max(job.seconds_before, earlier.get("seconds_total") or 0.0)
    if config.evaluate and ("after" not in evaluation or earlier.get("steps") != config.steps):
        evaluation["after"] = _evaluate(config, run_dir, "after")
        write_json(run_dir / "evaluation.json", evaluation)
    summary = {**summary, "seconds_total": job.seconds_total(), "evaluation": evaluation or None}
    write_json(run_dir / "summary.json", summary)
    if config.evaluate:
        from fastpref.evaluate.report import write_report

        write_report(run_dir)
    typer.echo(_closing_line(run_dir, summary))


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
    return line


def _evaluate(config: Config, run_dir: Path, tag: str) -> dict[str, Any]:
    from fastpref.evaluate.runner import evaluate_policy

    lora, unet = _trained(run_dir) if tag == "after" else (None, None)
    return evaluate_policy(config, lora=lora, unet=unet, out_dir=run_dir, tag=tag, progress=True)


def _trained(run_dir: Path) -> tuple[Path | None, Path | None]:
    lora, unet = run_dir / "pytorch_lora_weights.safetensors", run_dir / "unet"
    if not lora.exists() and not unet.exists():
        raise UserError("no trained weights there", str(run_dir), "finish the training first (resume=auto)")
    return (lora, None) if lora.exists() else (None, unet)


def _lora_file(path: Path | None) -> Path | None:
    return path / "pytorch_lora_weights.safetensors" if path is not None and path.is_dir() else path


def _config_of_run(run: Path, overrides: list[str] | None) -> Config:
    from fastpref.config import load_config

    if not (run / "config.yaml").is_file():
        raise UserError("not a run directory", str(run), "give a folder that fastpref train wrote")
    return load_config(run / "config.yaml", overrides)


def _print_keys() -> None:
    from fastpref.config import Config

    for name, field in Config.model_fields.items():
        typer.echo(f"{name}={field.default}  # {field.description}")


if __name__ == "__main__":
    main()
