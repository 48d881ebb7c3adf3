"""Several GPUs through NCCL: every layout against one GPU, resuming, offload; and SPO steps on random SDXL weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpref.config import Config
from fastpref.runs import run_training

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import ranks
from ranks import Task

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.gpu
one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU: torch.cuda.is_available() is False")
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs for NCCL, here are {GPUS}")
MakeConfig = Callable[..., Config]
CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
METHODS = {
    "dpo": ["method=dpo", "micro_batch_size=4"],
    "rpo": ["method=rpo", "group_size=4", "micro_batch_size=2"],
}
BASE = ["beta=200", "learning_rate=0.001", "steps=6", "checkpoint_every=3", "device=cuda"]
LAYOUTS = {
    "replicas": [],
    **{path.stem: ["engine=deepspeed", f"deepspeed={path}"] for path in sorted(CONFIGS.glob("*.json"))},
}


def losses(config: Config) -> list[float]:
    return [json.loads(line)["loss"] for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


@two_gpus
@pytest.mark.parametrize("method", METHODS)
def test_two_gpus_train_as_one(sdxl_config: MakeConfig, tmp_path: Path, method: str) -> None:
    """Plain, ZeRO 1, 2, 3 and offload, each gone on with by replicas after three steps; to fp32 rounding."""
    single = sdxl_config("name=single", *BASE, *METHODS[method])
    run_training(single)
    tasks, wholes = [], []
    for name, engine in LAYOUTS.items():
        wholes.append(sdxl_config(f"name={name}", *BASE, *METHODS[method], *engine))
        resumed = sdxl_config(f"name={name}-resumed", *BASE, *METHODS[method], "resume=auto")
        tasks += [Task(wholes[-1]), Task(resumed, wholes[-1].run_dir)]
        wholes.append(resumed)
    results = ranks.finish(ranks.start([ranks.__file__, *ranks.recipe_files(tasks, tmp_path)]), timeout=1800)
    assert [code for code, _ in results] == [0, 0], results[0][1] + results[1][1]
    for config in wholes:
        assert losses(config) == pytest.approx(losses(single), abs=2e-3), config.name
        assert json.loads((config.run_dir / "summary.json").read_text())["world_size"] == 2


@one_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_spo_round_and_update(sdxl: Path, clip: Path, few_records: Path, tmp_path: Path, precision: str) -> None:
    """Rollout, scoring on a second stream and one update on random SDXL weights: finite, and the LoRA has moved."""
    from fastpref.config import load_config

    settings = {
        **{"method": "spo", "model": sdxl, "records": few_records, "clip": clip, "resolution": 16, "device": "cuda"},
        **{"sample_steps": 6, "plain_steps": 2, "candidates": 2, "rollout_prompts": 2, "batch_size": 4, "steps": 1},
        **{"score_threshold": 0.0, "lora_rank": 4, "precision": precision, "output_dir": tmp_path, "name": precision},
    }
    config = load_config("", [*(f"{key}={value}" for key, value in settings.items()), "evaluate=false", "tracker=none"])
    run_training(config)
    (line,) = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert line["grad_norm"] is not None and line["pairs_kept"] > 0
    weights = load_file(config.run_dir / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name or "lora.up" in name)
