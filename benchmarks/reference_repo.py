"""The user's own checkout of a public DPO script, launched as it is, and timed from what it prints."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from fastpref.config import Config
from fastpref.errors import UserError
from fastpref.models.loading import model_dir_of, resolve_device

_WARM_UP = 2  # steps left out
_PROGRESS = re.compile(rb"Steps:.*?(\d+)/(\d+)")


@dataclass(frozen=True)
class PublicScript:
    """Where it lies in its repository, and the flags it is started with."""

    name: str
    path: str
    flags: tuple[str, ...]
    needs_cuda: bool = False


_COMMON = (
    *("--pretrained_model_name_or_path", "--dataset_name", "--output_dir", "--resolution", "--train_batch_size"),
    *("--max_train_steps", "--learning_rate", "--lr_warmup_steps", "--beta_dpo", "--mixed_precision", "--seed"),
    *("--no_hflip", "--dataloader_num_workers", "--gradient_checkpointing"),
)
SCRIPTS = (
    PublicScript(
        "diffusers",
        "examples/research_projects/diffusion_dpo/train_diffusion_dpo_sdxl.py",
        (*_COMMON, "--rank", "--dataset_split_name", "--vae_encode_batch_size"),
    ),
    PublicScript(
        "DiffusionDPO", "train.py", (*_COMMON, "--sdxl", "--split", "--proportion_empty_prompts"), needs_cuda=True
    ),
)


def find_script(repo: Path) -> PublicScript:
    """The script of a checkout.

    Raises:
        UserError: it is not there, or does not have the flags that it is started with.
    """
    expected = "a checkout of huggingface/diffusers or SalesforceAIResearch/DiffusionDPO"
    found = [script for script in SCRIPTS if (repo / script.path).is_file()]
    if not found:
        places = " or ".join(script.path for script in SCRIPTS)
        raise UserError("no public script there", str(repo), f"expected is {expected}, with {places}")
    text = (repo / found[0].path).read_text()
    lacking = [flag for flag in found[0].flags if f'"{flag}"' not in text and f"'{flag}'" not in text]
    if lacking:
        raise UserError(
            f"the script has changed: it has no flag {lacking[0]}",
            str(repo / found[0].path),
            f"expected are {' '.join(found[0].flags)}; give a checkout that has them",
        )
    return found[0]


def command(script: PublicScript, repo: Path, python: str, config: Config, steps: int, out: Path) -> list[str]:
    """How the script is started: the recipe's model, records, batch, precision and optimizer, one process."""
    values = {
        "--pretrained_model_name_or_path": str(model_dir_of(config)),
        "--dataset_name": str(Path(config.records).parent),
        "--output_dir": str(out),
        "--resolution": str(config.resolution),
        "--train_batch_size": str(config.batch_size),
        "--max_train_steps": str(steps),
        "--learning_rate": str(config.learning_rate),
        "--lr_warmup_steps": "0",
        "--beta_dpo": str(int(config.beta)),
        "--mixed_precision": {"fp32": "no"}.get(config.precision, config.precision),
        "--seed": str(config.seed),
        "--dataloader_num_workers": "0",
        "--rank": str(config.lora_rank),
        "--dataset_split_name": "train",
        "--split": "train",
        "--vae_encode_batch_size": "8",
        "--proportion_empty_prompts": "0",
    }
    arguments = [python, str(repo / script.path)]
    for flag in script.flags:
        if flag in values:
            arguments += [flag, values[flag]]
        elif flag != "--gradient_checkpointing" or config.gradient_checkpointing == "full":
            arguments.append(flag)
    return arguments


def environment(out: Path, device: str = "cpu") -> dict[str, str]:
    """What the script finds around it: our number of threads, no network, no tracker, its caches beside its output."""
    threads = str(torch.get_num_threads())
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    return on_cpu | {
        **{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
        **{"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(out.parent / "datasets")},
        **{"WANDB_MODE": "disabled"},
    }


def run_script(repo: Path, python: str, config: Config, steps: int, out: Path) -> float:
    """Seconds a step of the checkout, the median of ``steps`` after the first ones.

    Raises:
        UserError: the checkout is not as expected, or the script failed.
    """
    script = find_script(repo)
    if script.needs_cuda and not torch.cuda.is_available():
        raise UserError(f"{script.name} runs on a GPU only", str(repo), "there is none here: give diffusers' checkout")
    process = subprocess.Popen(
        command(script, repo, python, config, _WARM_UP + steps, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment(out, resolve_device(config.device).type)},
    )
    assert process.stdout is not None
    seen, tail = {0: time.perf_counter()}, b""
    try:
        while block := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            now, tail = time.perf_counter(), (tail + block)[-4096:]
            for match in _PROGRESS.finditer(tail):
                seen.setdefault(int(match[1]), now)
    except BaseException:  # whoever gives up waiting leaves no script behind on the device
        process.kill()
        process.wait()
        raise
    if process.wait() or _WARM_UP + steps not in seen:
        last = tail.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{script.name} ended with {process.returncode}", str(repo), f"it says: {''.join(last)[:200]}")
    return step_seconds(seen)


def step_seconds(seen: dict[int, float]) -> float:
    """Median seconds a step, given when each progress count was first seen."""
    steps = sorted(step for step in seen if step >= _WARM_UP)
    return median((seen[b] - seen[a]) / (b - a) for a, b in pairwise(steps))
