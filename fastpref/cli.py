"""The command line: composes the parts, computes nothing. Heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastpref.errors import UserError

app = typer.Typer(
    help="Align SDXL and SD1.5 with human preferences: SFT, Diffusion-DPO, Diffusion-RPO, SPO, LPO.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="recipe, e.g. configs/emoji_rpo.yaml")]
RANK_LOST = 3  # exit code
Device = Literal["auto", "cpu", "cuda"]
ImageFormat = Literal["png", "jpeg"]
Family = Literal["sdxl", "sd15"]
Layout = Literal["pipeline", "diffusers", "kohya"]
PredictionType = Literal["auto", "epsilon", "v_prediction", "v_prediction_zero_snr"]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings over the recipe's")]


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    return None


@app.command()
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="validate and count only, with GB and hours")] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="instead: the reference ledger, for a prepared store")
    ] = False,
) -> None:
    """Encode preference records once: latents, text and CLIP embeddings into a store.

    With --reference: the frozen reference's errors of every draw that the recipe trains on, beside the store; training
    with reference=ledger then neither loads nor runs a reference.
    """
    from fastpref.config import load_config
    from fastpref.data.prepare import prepare as run_prepare

    settings = load_config(config, overrides)
    if reference:
        from fastpref.train.reference import prepare_reference

        typer.echo(f"{prepare_reference(settings, dry_run=dry_run)}")
        return
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
    from fastpref.runs import run_training
    from fastpref.train.job import Stopped
    from fastpref.train.world import RankLost

    try:
        if said := run_training(load_config(config, overrides), dry_run=dry_run):
            typer.echo(said)
    except Stopped as stop:
        raise typer.Exit(stop.exit_code) from None
    except RankLost as lost:
        sys.stderr.write(f"error: {lost}\n")
        os._exit(RANK_LOST)  # leaving in order would wait for the one that is lost


@app.command()
def sample(
    config: ConfigFile,
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="a prompt; may be repeated")] = None,
    prompts: Annotated[Path | None, typer.Option(help="prompts from txt, json, jsonl or parquet")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="pictures per prompt")] = 1,
    lora: Annotated[Path | None, typer.Option(help="LoRA file, or folder (a run directory, peft's) with one")] = None,
    unet: Annotated[Path | None, typer.Option(help="UNet, folder or file, of a full fine-tuning")] = None,
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
    written = run_sample(settings, wanted, list(range(seeds)), lora=lora, unet=unet, out_dir=out)
    typer.echo(f"{len(written)} pictures in {out}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="PATH", help="run directory, model (folder or file) or pictures")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="where the evaluation of a pipeline or of pictures goes")] = Path(
        "evaluation"
    ),
) -> None:
    """Measure style and content: of a run before and after, of any pipeline, or of pictures that are already there.

    A run gets samples, summary.json and report.html renewed. For other styles than the bundled ones set
    eval_target_images=FOLDER eval_base_images=FOLDER eval_clip=FOLDER and, to fit none, eval_style=FOLDER.
    """
    from fastpref.runs import evaluate_folder, evaluate_run

    if (run / "config.yaml").is_file():
        typer.echo(f"{evaluate_run(run, overrides)}")
    else:
        typer.echo("\n".join(evaluate_folder(run, overrides, out)))


@app.command("make-pairs")
def make_pairs(
    config: Annotated[str, typer.Argument(metavar="[CONFIG]", help="recipe whose model draws; '' for defaults")] = "",
    overrides: Overrides = None,
    prompts: Annotated[Path | None, typer.Option(help="prompts from txt, json, jsonl or parquet")] = None,
    style: Annotated[str, typer.Option(help="style words of the winner, or a template with {prompt}")] = "",
    winners: Annotated[Path | None, typer.Option(help="instead: folder of pictures in the target style")] = None,
    losers: Annotated[Path | None, typer.Option(help="and folder of pictures in the base style")] = None,
    out: Annotated[Path, typer.Option(help="gets train/, heldout/ and contact_sheet.png")] = Path("pairs"),
    seeds: Annotated[int, typer.Option(min=1, help="pairs per prompt")] = 1,
    size: Annotated[int | None, typer.Option(help="pixels; default: the model's own")] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA file, or folder (a run directory, peft's) with one")] = None,
    heldout: Annotated[float, typer.Option(min=0, max=0.9, help="share of prompts kept for evaluation")] = 0.1,
    shard_size: Annotated[int, typer.Option(min=1, help="pairs in a parquet file")] = 64,
    image_format: Annotated[ImageFormat, typer.Option("--format", help="of drawn pictures")] = "png",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the pairs in OUT")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, write nothing")] = False,
) -> None:
    """Make style pairs for prepare: winner drawn with the style words, loser without, same noise; or from two folders.

    A killed run continues with the first missing shard. Then: records=OUT/train eval_records=OUT/heldout.
    """
    from fastpref.config import load_config
    from fastpref.data.records import read_captions
    from fastpref.evaluate.make_pairs import pairs_from_folders, pairs_from_prompts

    settings = load_config(config, overrides)
    options: dict[str, Any] = {"heldout": heldout, "shard_size": shard_size, "overwrite": overwrite, "dry_run": dry_run}
    if winners is not None and losers is not None and prompts is None:
        typer.echo(f"{pairs_from_folders(settings, winners, losers, out, **options)}")
        return
    if prompts is None or winners is not None or losers is not None:
        todo = "give --prompts FILE and --style WORDS, or --winners FOLDER and --losers FOLDER"
        raise UserError("nothing to make pairs of", "fastpref make-pairs", todo)
    options |= {"seeds": seeds, "size": size, "lora": lora, "image_format": image_format}
    typer.echo(f"{pairs_from_prompts(settings, read_captions(str(prompts)), style, out, **options)}")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory, e.g. runs/quickstart")]) -> None:
    """Write RUN/report.html from what the run left there."""
    from fastpref.evaluate.report import write_report
    from fastpref.runs import config_of_run

    config_of_run(run)
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
    run: Annotated[Path, typer.Argument(metavar="PATH", help="run directory, LoRA or UNet (file or folder)")],
    out: Annotated[Path, typer.Option(help="file (LoRA layouts) or folder (pipeline) to write")],
    model: Annotated[
        str | None, typer.Option(help="the model it is for, a folder or file; default: the run's own")
    ] = None,
    prediction_type: Annotated[
        PredictionType | None, typer.Option(help="what a --model in one file predicts; default: as its run says")
    ] = None,
    layout: Annotated[Layout, typer.Option(help="merged pipeline folder, or LoRA file in that naming")] = "pipeline",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it exists")] = False,
) -> None:
    """Write a merged pipeline folder, or the LoRA in diffusers' or kohya/ComfyUI naming.

    A LoRA or UNet without a run beside it, as others publish them, needs --model.
    """
    from fastpref.models.export import run_export

    base: dict[str, Any] = {"model": model, "prediction_type": prediction_type}
    typer.echo(f"{run_export(run, out, layout=layout, **base, overwrite=overwrite)}")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="ranks, one a GPU")] = 1,
    device: Annotated[str, typer.Option(help="h100, a100, rtx4090, …; cpu is this machine")] = "h100",
    family: Annotated[Family | None, typer.Option(help="public base model, where the recipe's is not here")] = None,
) -> None:
    """Predict memory per GPU, traffic, work and disk of a recipe, and the nearest change that fits."""
    from rich.console import Console

    from fastpref.config import load_config
    from fastpref.plan.render import render
    from fastpref.plan.report import make_plan

    Console().print(render(make_plan(load_config(config, overrides), gpus, device, family)))


@app.command()
def doctor() -> None:
    """List what this machine offers: torch, GPUs, optional packages, disk and memory, and why what is missing is."""
    from rich.console import Console

    from fastpref.doctor import findings, table

    Console().print(table(findings()))


def main() -> None:
    """Run a command; a user's error is one line on stderr and exit code 2."""
    debug = "--debug" in sys.argv
    # deepspeed's launcher adds --local_rank
    own = [a for a in sys.argv[1:] if a != "--debug" and not a.startswith("--local_rank")]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of packages that nobody asked for
    try:
        code = app(own or ["--help"], standalone_mode=False)
    except UserError as error:
        _fail(str(error), debug, quiet=_said_elsewhere(error))
    except typer.Abort:
        _fail("interrupted", debug)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        _fail(f"cannot write ({error.filename or 'output'}): {error.strerror}; make room, then run it again", debug)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors, whichever click typer carries
            raise
        _fail(f"{error.format_message()} (see --help)", debug)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, debug: bool, quiet: bool = False) -> None:
    if debug:
        traceback.print_exc()
    if quiet:
        time.sleep(1)  # the launcher stops the rank that says it as soon as another one ends
    else:
        sys.stderr.write(f"error: {' '.join(line.split())}\n")
    sys.exit(2)


def _said_elsewhere(error: UserError) -> bool:
    """Whether another rank prints it: rank 0 what all raise; before they have met, the first one of each machine."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    return rank != "0" and (local_rank != "0" if error.shared is None else error.shared)


def _print_keys() -> None:
    from fastpref.config import Config

    for name, field in Config.model_fields.items():
        typer.echo(f"{name}={field.default}  # {field.description}")


if __name__ == "__main__":
    main()
