"""A rank that is killed or stands still: the other one names it and exits, and the run goes on from its checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from forked import Process
from ranks import Task
from safetensors.torch import load_file

from fastpref.cli import RANK_LOST
from fastpref.config import Config

BASE = ["method=dpo", "beta=200", "micro_batch_size=4", "lora_targets=[to_q]", "threads=1"]


@pytest.fixture
def recipe(sdxl_config: Callable[..., Config], one_level_unet: Path) -> Callable[..., Config]:
    return lambda *more: sdxl_config(*BASE, f"unet={one_level_unet}", *more)


def wait_for(path: Path, lines: int, process: Process) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        time.sleep(0.02)
    ranks.finish([process], timeout=0)
    raise AssertionError(f"no line {lines} in {path}")


def test_a_killed_rank_is_named_and_the_run_resumed_is_the_same_run(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    config = recipe("name=killed", "steps=16", "checkpoint_every=3", "resume=auto")
    (file,) = ranks.recipe_files([Task(config)], tmp_path)
    processes = ranks.start(["-m", "fastpref.cli", "train", file])
    wait_for(config.run_dir / "metrics.jsonl", 8, processes[0])
    processes[1].send_signal(signal.SIGKILL)
    (code, said), (killed, _) = ranks.finish(processes, timeout=300)
    assert (code, killed) == (RANK_LOST, -signal.SIGKILL)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (
        line.startswith("error: rank 1 stopped answering in step ")
        and "rank 0 gives up" in line
        and "resume=auto" in line
        and "Traceback" not in said
    )
    whole = recipe("name=whole", "steps=16", "checkpoint_every=3")
    tasks = [Task(config), Task(whole)]
    results = ranks.finish(ranks.start([ranks.__file__, *ranks.recipe_files(tasks, tmp_path)]))
    assert [code for code, _ in results] == [0, 0], results[0][1]
    left, right = (load_file(run.run_dir / "pytorch_lora_weights.safetensors") for run in (config, whole))
    assert all(torch.equal(left[name], right[name]) for name in right)


@pytest.mark.parametrize("count", [1, 2])
def test_a_kill_during_a_write_beside_the_training_leaves_the_checkpoint_before(
    recipe: Callable[..., Config], tmp_path: Path, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last rank's part of step 4's is half written while step 5 is done; resumed, it is the same run."""
    common = ["steps=6", "checkpoint_every=2", "checkpoint_async=true", "ema_decay=0.9"]
    config, whole = recipe("name=killed", "resume=auto", *common), recipe("name=whole", *common)
    files = ranks.recipe_files([Task(config, fault="slow disk")], tmp_path)
    processes = ranks.start([ranks.__file__, *files], ranks=count)
    wait_for(config.run_dir / "metrics.jsonl", 5, processes[0])
    for process in processes:
        process.kill()
    ranks.finish(processes)
    left = sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
    assert left == [".step-000004.tmp", "step-000002"]
    if count == 1:
        for run in (config, whole):
            ranks.train(run)
        said = capfd.readouterr().err
    else:
        files = ranks.recipe_files([Task(config), Task(whole)], tmp_path)
        results = ranks.finish(ranks.start([ranks.__file__, *files], ranks=count))
        assert [code for code, _ in results] == [0] * count, results[0][1]
        said = results[0][1]
    assert "resuming after step 2" in said
    left_weights, right = (load_file(run.run_dir / "pytorch_lora_weights.safetensors") for run in (config, whole))
    assert all(torch.equal(left_weights[name], right[name]) for name in right)
    assert sorted(path.name for path in (config.run_dir / "checkpoints").iterdir()) == ["step-000004", "step-000006"]


def test_a_rank_that_stands_still_is_named_after_rank_timeout(recipe: Callable[..., Config], tmp_path: Path) -> None:
    """Under every engine: DeepSpeed's collectives too, which it runs in a process group of its own. All at once."""
    engines = {"local": [], **{f"zero{stage}": ["engine=deepspeed", f"zero_stage={stage}"] for stage in (2, 3)}}
    started = {}
    for name, engine in engines.items():
        config = recipe(f"name={name}", "steps=16", "rank_timeout=6", *engine)
        files = ranks.recipe_files([Task(config, fault="stop")], tmp_path)
        started[name] = ranks.start([ranks.__file__, *files])
    for name, processes in started.items():
        ((code, said),) = ranks.finish(processes[:1], timeout=300)
        processes[1].kill()
        assert code, name
        line = "rank 1 stopped answering in step 4 for 6 s (rank_timeout), rank 0 gives up"
        assert line in " ".join(said.split()), name
