"""Train the bundled models from the bundled parquet: ``python -m fastpref.emoji.build [STAGE|all] [--resume]``.

Stages, in order: vae, clip, style, unet (with the text encoders), refine (a second cycle of the same), card. Only
``train.parquet`` is learned from; the held-out pictures are read to state accuracies. Checkpoints and logs go to
``runs/emoji-build`` and ``--resume`` continues from them; what is finished is exported to the folders named in
``fastpref.emoji``.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from fastpref.emoji import HELDOUT_PARQUET, TRAIN_PARQUET
from fastpref.emoji.records import read_records
from fastpref.emoji.training import THREADS, FitResult, Workspace

STAGES = ("vae", "clip", "style", "unet", "refine", "card")


def record_result(work: Workspace, stage: str, result: FitResult) -> None:
    """Keep what the model card states about a stage in ``results.json``."""
    path = work.file("results.json")
    results = json.loads(path.read_text()) if path.is_file() else {}
    results[stage] = asdict(result)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)


def run_stage(stage: str, work: Workspace) -> None:
    """Run one stage to its end; later stages read what earlier ones left in the workspace."""
    train, heldout = read_records(TRAIN_PARQUET), read_records(HELDOUT_PARQUET)
    if stage == "vae":
        from fastpref.emoji.vae import build_vae

        result = build_vae(train, heldout, work)
    elif stage == "clip":
        from fastpref.emoji.clip import build_clip

        result = build_clip(train, heldout, work)
    elif stage == "style":
        from fastpref.emoji.style_training import build_style

        result = build_style(train, heldout, work)
    elif stage == "unet":
        from fastpref.emoji.pipeline import build_pipeline

        result = build_pipeline(train, work)
    elif stage == "refine":
        from fastpref.emoji.pipeline import refine_pipeline

        result = refine_pipeline(train, work)
    else:
        from fastpref.emoji.card import write_card

        write_card(train, heldout, work)
        return
    record_result(work, stage, result)


def main() -> None:
    parser = argparse.ArgumentParser(description="train the bundled emoji models (two to three hours of two cores)")
    parser.add_argument("stage", nargs="?", default="all", choices=("all", *STAGES))
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in the workspace")
    parser.add_argument("--workspace", type=Path, default=Path("runs/emoji-build"), help="checkpoints and logs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    work = Workspace(arguments.workspace, arguments.seed, arguments.resume)
    for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
        run_stage(stage, work)


if __name__ == "__main__":
    main()
