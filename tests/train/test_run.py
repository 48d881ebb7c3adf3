"""Whole runs through the command line: the contract's files, resuming after kill -9 and SIGTERM, and bad input."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastpref.config import Config, save_config
from fastpref.train.job import TrainJob
from fastpref.train.run_dir import open_run_dir

METRICS = (
    "step loss reward_winner reward_loser err_winner err_loser margin accuracy grad_norm lr seconds effective_contrasts"
)
SUMMARY = (
    "method steps samples_seen seconds_total seconds_train samples_per_second peak_rss_bytes peak_device_bytes "
    "world_size unet_forwards unet_recomputed unet_backwards vae_encodes vae_decodes text_forwards scorer_forwards "
    "evaluation"
)


BAD = [
    "missing file",
    "unknown key",
    "beta",
    "resolution",
    "sd3",
    "no model",
    "not a store",
    "no store",
    "run exists",
    "not a run",
    "read only",
    "too few pairs",
]


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(["-m", "fastpref.cli", *arguments])


def recipe_file(config: Config, folder: Path) -> str:
    path = folder / "recipe.yaml"
    save_config(config, path)
    return str(path)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pytorch_lora_weights.safetensors")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_time(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(run)]


def same(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def run_in_process(config: Config) -> Path:
    """What `fastpref train` does, without paying for a new interpreter."""
    from fastpref.runs import run_training

    run_training(config)
    return config.run_dir


# RPO with groups, micro-batches, dropout and EMA: everything that has state.
SMALL = ["method=rpo", "group_size=4", "micro_batch_size=4", "steps=16", "checkpoint_every=4", "beta=500"]
SMALL += ["caption_dropout=0.2", "ema_decay=0.9", "warmup_steps=4"]


@pytest.fixture
def small(one_level_config: Callable[..., Config]) -> Callable[..., Config]:
    return lambda *more: one_level_config(*SMALL, *more)


@pytest.fixture(scope="module")
def whole(
    sdxl_config_in: Callable[..., Callable[..., Config]], one_level_unet: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Its steps, uninterrupted."""
    return run_in_process(sdxl_config_in(tmp_path_factory.mktemp("whole"))(f"unet={one_level_unet}", *SMALL))


def test_a_run_leaves_what_the_contract_says(one_level_config: Callable[..., Config], tmp_path: Path) -> None:
    config = one_level_config("name=a", "method=rpo", "steps=4", "checkpoint_every=2", "tracker=tensorboard")
    result = cli("train", recipe_file(config, tmp_path))
    assert result.returncode == 0, result.stderr
    run = config.run_dir
    summary = json.loads((run / "summary.json").read_text())
    assert set(SUMMARY.split()) <= set(summary)
    assert (summary["method"], summary["steps"], summary["samples_seen"]) == ("rpo", 4, 32)
    assert (summary["unet_forwards"], summary["unet_backwards"]) == (4 * 32, 4 * 16)
    assert summary["best_checkpoint"] is None and not (run / "best").exists()
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]
    assert all(set(line) == set(METRICS.split()) for line in lines(run))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert list((run / "tensorboard").iterdir())
    from fastpref.config import load_config

    assert load_config(run / "config.yaml") == config
    assert weights(run)


def test_the_progress_line_ends_with_the_last_checkpoint(small: Callable[..., Config]) -> None:
    config, said = small("steps=3", "checkpoint_every=2"), io.StringIO()
    job = TrainJob.open(config, Console(file=said, width=200))
    job.run(open_run_dir(config, resuming=False))
    assert "3/3" in said.getvalue() and said.getvalue().splitlines()[-1].count("saved 3") == 1


def test_weights_are_exported_with_each_checkpoint_and_training_does_not_notice(small: Callable[..., Config]) -> None:
    """The averages are put in for the export and taken out again; the newest are kept."""
    plain = run_in_process(small("name=plain", "steps=6", "checkpoint_every=2"))
    config = small("name=exported", "steps=6", "checkpoint_every=2", "export_checkpoints=true", "keep_checkpoints=2")
    run = run_in_process(config)
    assert same(run, plain) and without_time(run) == without_time(plain)
    assert sorted(path.name for path in (run / "exports").iterdir()) == ["step-000004", "step-000006"]
    assert same(run / "exports" / "step-000006", run) and not same(run / "exports" / "step-000004", run)


def test_a_run_killed_half_way_and_resumed_is_the_whole_one(
    small: Callable[..., Config], whole: Path, tmp_path: Path
) -> None:
    config = small("name=killed")
    process = forked.Process(["-m", "fastpref.cli", "train", recipe_file(config, tmp_path)])
    _wait_for_line(config.run_dir / "metrics.jsonl", 9, process)
    process.kill()
    process.wait()
    assert not (config.run_dir / "pytorch_lora_weights.safetensors").exists()
    run = run_in_process(small("name=killed", "resume=auto"))
    assert same(run, whole)
    assert without_time(run) == without_time(whole)
    counts = [json.loads((r / "summary.json").read_text())["unet_forwards"] for r in (run, whole)]
    assert counts[0] == counts[1]


def test_sigterm_leaves_a_checkpoint_and_143(small: Callable[..., Config], whole: Path, tmp_path: Path) -> None:
    config = small("name=stopped", "checkpoint_every=1000")
    process = forked.Process(["-m", "fastpref.cli", "train", recipe_file(config, tmp_path)])
    _wait_for_line(config.run_dir / "metrics.jsonl", 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    (checkpoint,) = (config.run_dir / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == len(lines(config.run_dir))
    assert same(run_in_process(small("name=stopped", "resume=auto", "checkpoint_every=1000")), whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    small: Callable[..., Config], whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = run_in_process(small("name=cut", "steps=8"))
    file = run / "checkpoints" / "step-000008" / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    run_in_process(small("name=cut", "resume=auto"))
    error = " ".join(capfd.readouterr().err.split())
    assert "damaged checkpoint" in error and "step-000008" in error and "resuming after step 4" in error
    assert same(run, whole)


def test_resuming_with_other_settings_is_refused(small: Callable[..., Config], tmp_path: Path) -> None:
    run_in_process(small("name=a", "steps=1"))
    result = cli("train", recipe_file(small("name=a", "resume=auto", "beta=77"), tmp_path))
    assert result.returncode == 2 and "beta is 77.0 but the run was started with 500.0" in result.stderr


@pytest.mark.parametrize("train", ["lora", "full"])
def test_start_from_published_weights(one_level_config: Callable[..., Config], train: str) -> None:
    """A run started from another's result has that result as its reference: rewards start at zero."""
    common = ["method=dpo", "steps=2", "learning_rate=0.01", f"train={train}"]
    first = run_in_process(one_level_config("name=first", *common))
    start = f"init_lora={first}/pytorch_lora_weights.safetensors" if train == "lora" else f"unet={first}/unet"
    second = run_in_process(one_level_config("name=second", *common, start))
    fresh, again = lines(first), lines(second)
    # Zero but for fp32's rounding: on some processors the policy's pass adds up in another order than the copy's.
    assert abs(again[0]["reward_winner"]) < 1e-6 * again[0]["err_winner"] < 1e-4 < abs(again[1]["reward_winner"])
    assert again[0]["err_winner"] != fresh[0]["err_winner"], "the start is not the base"


def _wait_for_line(path: Path, count: int, process: forked.Process) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no line {count} in {path}; exit code {process.poll()}")


def _bad(name: str, config: Callable[..., Config], tmp_path: Path, clip: Path) -> tuple[list[str], str]:
    """Arguments of a command that must fail, and what its one line must say."""
    good = recipe_file(config("method=dpo"), tmp_path)
    if name == "missing file":
        return ["train", str(tmp_path / "none.yaml")], "no such config file"
    if name == "unknown key":
        return ["train", good, "temprature=1"], "did you mean 'temperature'?"
    if name == "beta":
        return ["train", good, "beta=0"], "beta is 0"
    if name == "resolution":
        return ["prepare", good, "resolution=36"], "multiple of 8"
    if name == "sd3":
        folder = tmp_path / "sd3"
        folder.mkdir()
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
        return ["train", good, f"model={folder}"], "StableDiffusion3Pipeline is not supported"
    if name == "no model":
        return ["train", good, f"model={tmp_path}/none"], "no such model folder"
    if name == "not a store":
        return ["train", good, f"store={clip}"], "not a store"
    if name == "no store":
        return ["train", good, f"store={tmp_path}/none"], "fastpref prepare"
    if name == "run exists":
        folder = tmp_path / "runs" / "there"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("{}")
        return ["train", good, "name=there"], "resume=auto"
    if name == "not a run":
        folder = tmp_path / "runs" / "precious"
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("x")
        return ["train", good, "name=precious", "overwrite=true"], "does not delete it"
    if name == "read only":
        folder = tmp_path / "sealed"
        folder.mkdir()
        os.chmod(folder, 0o555)
        return ["train", good, f"output_dir={folder}"], "read-only"
    if name == "too few pairs":
        return ["train", good, "batch_size=64"], "batch_size"
    raise KeyError(name)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    one_level_config: Callable[..., Config],
    tmp_path: Path,
    clip: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastpref.cli import main

    arguments, says = _bad(name, one_level_config, tmp_path, clip)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["fastpref", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: ") and says in captured.err
    assert "Traceback" not in captured.err
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_store_made_for_another_model_is_refused(
    one_level_config: Callable[..., Config], sd15_store: Path, tmp_path: Path
) -> None:
    from fastpref.errors import UserError
    from fastpref.train.job import TrainJob

    with pytest.raises(UserError, match="made for sd15, the model is sdxl"):
        TrainJob.open(one_level_config(f"store={sd15_store}"))


def test_a_changed_text_encoder_makes_it_another_model(
    one_level_config: Callable[..., Config], sdxl: Path, tmp_path: Path
) -> None:
    from fastpref.errors import UserError
    from fastpref.train.job import TrainJob

    copy = tmp_path / "copy"
    shutil.copytree(sdxl, copy)
    TrainJob.open(one_level_config(f"model={copy}"))
    file = next((copy / "text_encoder").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="made for another model"):
        TrainJob.open(one_level_config(f"model={copy}"))


def test_debug_shows_the_traceback() -> None:
    """In an interpreter of its own, as a user starts it."""
    command = [sys.executable, "-m", "fastpref.cli", "train", "none.yaml", "--debug"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "Traceback" in result.stderr
