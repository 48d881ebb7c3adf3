"""Full-size SDXL on a machine with 24 GiB: does RPO, SPO and full fine-tuning fit, and was the plan right?

    python benchmarks/sdxl_full_size.py [--only rpo,spo,dpo] [--folder runs/sdxl_full_size] [--report] [--readme]

The UNet has SDXL's public configuration, 2,567,463,684 parameters, and random weights: made on the meta device, drawn
in bf16 and written shard by shard, never in fp32. Text encoders and VAE are SDXL's in what they put out and small
inside; they are not in memory in offline training and hardly matter in the rollout. Prompts and pictures are bundled
emoji at 512 px, 64x64 latents. Each run is `fastpref train` in a process of its own, whose peak RSS counts all of it:
loading, steps, checkpoint and export. Runs that are in results/sdxl_full_size.csv with these settings are not done
again; the seconds in it are those of a shared machine.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, TABLES, fill, markdown, provenance, read_csv, write_csv

from fastpref.atomic import write_bytes, write_json, write_tensors
from fastpref.models import public

OUT = RESULTS / "sdxl_full_size.csv"
SHARD_BYTES = 512 << 20
_HOST = torch.device("cpu")
COMMON = {
    **{"precision": "bf16", "gradient_checkpointing": "full", "resolution": 512, "threads": 1, "seed": 1},
    **{"evaluate": False, "tracker": "none", "overwrite": True, "keep_checkpoints": 1},
}
LORA = {"train": "lora", "lora_rank": 8, "learning_rate": 1e-4}
RUNS: dict[str, dict[str, Any]] = {
    "rpo": LORA | {"method": "rpo", "steps": 3, "batch_size": 2, "micro_batch_size": 1, "group_size": 2, "beta": 5000},
    "spo": {
        **LORA,
        **{"method": "spo", "steps": 1, "rollout_prompts": 1, "rollout_batch_size": 1, "candidates": 2},
        # the first of 20 steps and the three inner ones behind it: one segment
        **{"sample_steps": 20, "plain_steps": 0, "inner_steps": 3, "timestep_range": [800, 1000]},
        **{"batch_size": 4, "micro_batch_size": 1, "score_threshold": 0.0, "scorer": "sdxl_full_size:random_scores"},
    },
    "dpo": {
        **{"method": "dpo", "train": "full", "optimizer": "adamw8bit", "step_in_backward": True, "pure_bf16": True},
        **{"steps": 1, "batch_size": 1, "learning_rate": 2e-5, "beta": 5000},
    },
}
WHAT = {
    "rpo": "RPO, LoRA rank 8 on q, k, v, out; groups of 2 pairs; 3 steps",
    "spo": "SPO, the same LoRA; one segment of K = 2 with 3 inner steps; 1 update",
    "dpo": "DPO, all weights in bf16, frozen copy, 8-bit AdamW in the backward; 1 step",
}
LIMITS_GIB = {"rpo": 9.0, "dpo": 20.0}
GIB = 1 << 30


def random_scores(latents: torch.Tensor, prompts: list[str], t: int) -> torch.Tensor:
    """A random scorer."""
    return torch.randn(len(latents), generator=torch.Generator().manual_seed(t))


random_scores.takes = "latents"  # type: ignore[attr-defined]


def make_model(folder: Path) -> Path:
    """Write the pipeline folder."""
    write_weights(make_pipeline(folder), folder / "unet")
    return folder


def make_pipeline(folder: Path) -> Any:
    """Write the pipeline folder but for the UNet's weights; the UNet without any, on the meta device."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from fastpref.emoji.random_models import make_random_sdxl, text_config

    make_random_sdxl(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    for name, kind, width in (("", CLIPTextModel, 768), ("_2", CLIPTextModelWithProjection, 1280)):
        kind(text_config(tokenizer, width, 2, 1280)).save_pretrained(folder / f"text_encoder{name}")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**public.UNETS["sdxl"])
    if (count := sum(p.numel() for p in unet.parameters())) != public.PARAMETERS["sdxl"]:
        raise ValueError(f"the UNet has {count} parameters, SDXL's has {public.PARAMETERS['sdxl']}")
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    unet.save_config(folder / "unet")
    return unet


def write_weights(unet: torch.nn.Module, folder: Path, device: torch.device = _HOST) -> None:
    """Random weights of torch's default scale, in shards with an index as diffusers writes them."""
    shards, where = list(shards_of(unet)), {}
    for number, names in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor.cpu() for name, tensor in drawn_shard(unet, names, number, device).items()}
        write_tensors(folder / file, tensors, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * public.PARAMETERS["sdxl"]}, "weight_map": where}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def shards_of(unet: torch.nn.Module) -> Iterator[list[str]]:
    """Names of parameters, about SHARD_BYTES of bf16 at a time."""
    names: list[str] = []
    size = 0
    for name, parameter in unet.named_parameters():
        names.append(name)
        size += 2 * parameter.numel()
        if size >= SHARD_BYTES:
            yield names
            names, size = [], 0
    yield names


def drawn_shard(
    unet: torch.nn.Module, names: list[str], number: int, device: torch.device = _HOST
) -> dict[str, torch.Tensor]:
    """The weights of a shard of :func:`shards_of`, by its number; another kind of device draws other ones."""
    random = torch.Generator(device).manual_seed(number)
    return {name: drawn(name, unet.get_parameter(name).shape, random, device) for name in names}


def drawn(name: str, shape: torch.Size, random: torch.Generator, device: torch.device = _HOST) -> torch.Tensor:
    """Matrices uniform within 1/sqrt(inputs); gains one, offsets zero."""
    if len(shape) < 2:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16, device=device)
    bound = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape, dtype=torch.bfloat16, device=device).uniform_(-bound, bound, generator=random)


def make_inputs(folder: Path, *, weights: bool = True) -> None:
    """Model and prepared store, each unless it is there whole; ``weights``: the UNet's 5 GB too."""
    from fastpref.config import parse_config
    from fastpref.data.prepare import prepare
    from fastpref.emoji.random_models import make_random_clip

    if not (folder / "made").is_file():
        (make_model if weights else make_pipeline)(folder / "model")
        make_random_clip(folder / "clip")
        write_bytes(folder / "made", b"")
    settings = settings_of("rpo", folder) | {"clip": str(folder / "clip"), "records": str(few_records(folder))}
    prepare(parse_config(settings), progress=False)


def few_records(folder: Path) -> Path:
    """Eight of the bundled pairs."""
    import pyarrow.parquet as pq

    from fastpref.atomic import write_table
    from fastpref.emoji import TRAIN_PARQUET

    path = folder / "records.parquet"
    if not path.is_file():
        write_table(path, pq.read_table(TRAIN_PARQUET).slice(0, 8))
    return path


def settings_of(run: str, folder: Path) -> dict[str, Any]:
    """The recipe."""
    places = {"model": str(folder / "model"), "store": str(folder / "store"), "output_dir": str(folder / "runs")}
    return {**COMMON, **RUNS[run], **places, "name": run, "records": str(folder / "records.parquet")}


def train(run: str, folder: Path) -> None:
    """What the process of one run does."""
    from fastpref.config import parse_config
    from fastpref.runs import run_training

    print(run_training(parse_config(settings_of(run, folder))))


def predict(run: str, folder: Path) -> int:
    """Bytes that the plan gives the run on this machine, from a process of its own: its imports are part of them."""
    command = [sys.executable, __file__, "--predict", run, "--folder", str(folder)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(answer.stdout.split()[-1])


def plan(run: str, folder: Path) -> None:
    """What the process of a prediction does."""
    from fastpref.config import parse_config
    from fastpref.plan.report import make_plan

    planned = make_plan(parse_config(settings_of(run, folder)), 1, "cpu")
    print(planned.peak(planned.best))


def measure(run: str, folder: Path) -> dict[str, Any]:
    """Train in a process of its own; the row."""
    subprocess.run([sys.executable, __file__, "--train", run, "--folder", str(folder)], check=True)
    finished = folder / "runs" / run
    summary = json.loads((finished / "summary.json").read_text())
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    if not math.isfinite(last["loss"]) or summary["skipped_steps"]:
        raise ValueError(f"{run}: the last step had loss {last['loss']}, {summary['skipped_steps']} steps were skipped")
    return {
        "run": run,
        "settings": json.dumps(RUNS[run], sort_keys=True),
        "steps": summary["steps"],
        "peak_rss_bytes": summary["peak_rss_bytes"],
        "seconds_train_shared_machine": round(summary["seconds_train"]),
        **{name: summary[name] for name in ("unet_forwards", "unet_recomputed", "unet_backwards")},
        "loss": last["loss"],
        **provenance(),
    }


def table(rows: list[dict[str, str]]) -> str:
    """As Markdown."""
    lines = []
    for row in rows:
        peak, limit = int(row["peak_rss_bytes"]) / GIB, LIMITS_GIB.get(row["run"])
        planned = int(row["planned_bytes"]) / GIB
        lines.append(
            [
                WHAT[row["run"]],
                f"{planned:.1f} GiB ({planned / peak - 1:+.0%})",
                f"{peak:.1f} GiB" + ("" if limit is None else f" (at most {limit:.0f})"),
                f"{row['unet_forwards']} + {row['unet_recomputed']} again / {row['unet_backwards']}",
            ]
        )
    return markdown(["run", "planned", "peak RSS", "UNet rows forward / backward"], lines)


def main() -> None:
    """Do what is missing, then write CSV and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "sdxl_full_size")
    parser.add_argument("--report", action="store_true", help="tables from the CSV only")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--replan", action="store_true", help="predict again, for all rows")
    parser.add_argument("--train", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--predict", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train(options.train, options.folder)
    if options.predict:
        return plan(options.predict, options.folder)
    rows = {row["run"]: row for row in read_csv(OUT)}
    for run in [] if options.report else options.only.split(","):
        if run in rows and rows[run]["settings"] == json.dumps(RUNS[run], sort_keys=True):
            continue
        make_inputs(options.folder)
        rows[run] = measure(run, options.folder)
        write_csv(OUT, [rows[name] for name in RUNS if name in rows])
    for run, row in rows.items():
        if options.replan or not row.get("planned_bytes"):
            make_inputs(options.folder)
            row["planned_bytes"] = predict(run, options.folder)
    write_csv(OUT, [rows[name] for name in RUNS if name in rows])
    text = table([row for row in read_csv(OUT)])
    write_bytes(OUT.with_suffix(".md"), f"{text}\n".encode())
    print(text)
    if options.readme:
        fill(TABLES, "table: sdxl_full_size", text)


if __name__ == "__main__":
    main()
