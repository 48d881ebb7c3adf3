"""What a user gets wrong is found before anything is written, an earlier run stays, and resuming keeps the books."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastpref.cli import evaluate
from fastpref.config import Config, save_config
from fastpref.errors import UserError
from fastpref.runs import run_training

Recipe = Callable[..., Config]
FINISHED = ["name=a", "method=dpo", "steps=2", "checkpoint_every=1"]


def train(config: Config) -> Path:
    run_training(config)
    return config.run_dir


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(sd15_config_in: Callable[[Path], Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(sd15_config_in(tmp_path_factory.mktemp("trained"))(*FINISHED))


@pytest.fixture
def finished(sd15_config: Recipe, trained: Path) -> Path:
    """A run of the test's own."""
    config = sd15_config(*FINISHED)
    shutil.copytree(trained, config.run_dir)
    save_config(config, config.run_dir / "config.yaml")
    return config.run_dir


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lora_targets=[nope]", "no layer of the UNet is named 'nope'"),
        ("lora_targets=[to_q, nope]", "no layer of the UNet is named 'nope'"),
        ("lora_targets=[norm1]", "'norm1' is a"),
        ("tracker=wandb", "needs wandb"),
        ("optimizer=adamw8bit", "needs bitsandbytes"),
        ("timestep_range=[0, 2000]", "ends above 1000"),
        ("unet=PICKLE", "cannot read the weights"),
        ("unet=SDXL", "the UNet is one of SDXL"),
        ("init_lora=PICKLE", "must be safetensors"),
    ],
)
def test_a_bad_setting_leaves_the_run_it_would_overwrite(
    sd15_config: Recipe,
    finished: Path,
    sdxl: Path,
    tmp_path: Path,
    override: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("wandb", "bitsandbytes"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    pickle = tmp_path / "weights.safetensors"
    pickle.write_bytes(b"\x80\x04K\x01." * 20)
    before = contents(tmp_path)
    setting = override.replace("PICKLE", str(pickle)).replace("SDXL", str(sdxl / "unet"))
    with pytest.raises(UserError, match=says):
        train(sd15_config("name=a", "method=dpo", "overwrite=true", setting))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("part", ["unet", "scheduler", "model_index.json"])
def test_a_model_folder_with_a_part_missing_names_it(
    sd15_config: Recipe, sd15: Path, tmp_path: Path, part: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(sd15, copy)
    if part == "model_index.json":
        (copy / part).write_text("[]")
    else:
        shutil.rmtree(copy / part)
    with pytest.raises(UserError, match=f"no {part}/" if part != "model_index.json" else "not a JSON object"):
        train(sd15_config(f"model={copy}"))
    assert not (tmp_path / "runs").exists()


def test_init_lora_with_full_training_is_refused_not_ignored(sd15_config: Recipe, finished: Path) -> None:
    with pytest.raises(UserError, match="trains no LoRA"):
        sd15_config("train=full", f"init_lora={finished}")


def test_fewer_steps_than_the_checkpoint_change_nothing(sd15_config: Recipe, finished: Path) -> None:
    before = contents(finished)
    with pytest.raises(UserError, match="a checkpoint is at step 2"):
        train(sd15_config("name=a", "method=dpo", "steps=1", "resume=auto", "checkpoint_every=1"))
    assert contents(finished) == before


def test_a_second_adapter_is_no_warning(sd15_config: Recipe, finished: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Already found a `peft_config`")
        run = train(sd15_config("name=b", "method=dpo", "steps=1", f"init_lora={finished}"))
    assert json.loads((run / "metrics.jsonl").read_text())["reward_winner"] == 0, "the start is the reference"


def test_resumed_time_adds_up_and_finished_pictures_are_kept(
    sd15_config: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def draw(config: Config, run_dir: Path, tag: str) -> dict[str, Any]:
        drawn.append(tag)
        return {"style_share": None, "style_distance": None, "prompt_retrieval": None, "details": {}}

    monkeypatch.setattr("fastpref.runs.evaluate_tag", draw)
    common = ["name=e", "method=dpo", "evaluate=true", "resume=auto", "checkpoint_every=1"]
    first = summary(train(sd15_config(*common, "steps=2")))
    again = summary(train(sd15_config(*common, "steps=2")))
    assert drawn == ["before", "after"]
    assert again["seconds_total"] > first["seconds_total"] >= first["seconds_train"]
    assert again["unet_forwards"] == first["unet_forwards"] and again["evaluation"] == first["evaluation"]
    longer = summary(train(sd15_config(*common, "steps=4")))
    assert drawn == ["before", "after", "after"] and longer["unet_forwards"] == 2 * first["unet_forwards"]
    train(sd15_config(*common, "steps=4", "eval_prompts=3"))
    assert drawn[3:] == ["before", "after"], "pictures of other prompts cannot be compared"


@pytest.mark.parametrize("text", ["{", "[]", '{"seconds_total": "x"}'])
def test_a_damaged_summary_is_one_line(sd15_config: Recipe, finished: Path, text: str) -> None:
    (finished / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary\.json"):
        train(sd15_config("name=a", "method=dpo", "steps=2", "resume=auto", "checkpoint_every=1"))


def test_evaluating_an_unfinished_run_draws_nothing(finished: Path) -> None:
    (finished / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(UserError, match="no trained weights"):
        evaluate(finished, None)
    assert not (finished / "samples").exists()


def test_a_damaged_line_of_the_metrics_is_named_and_a_cut_one_dropped(sd15_config: Recipe, finished: Path) -> None:
    path = finished / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    again = ("name=a", "method=dpo", "steps=3", "resume=auto", "checkpoint_every=1")
    path.write_bytes(b"\x98" + first[1:] + second)
    with pytest.raises(UserError, match="line 1 of the metrics is damaged"):
        train(sd15_config(*again))
    path.write_bytes(first + second + b'{"step": 3, "lo')
    train(sd15_config(*again))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_folder_in_the_place_of_the_result_is_one_line(sd15_config: Recipe, finished: Path) -> None:
    weights = finished / "pytorch_lora_weights.safetensors"
    weights.unlink()
    weights.mkdir()
    with pytest.raises(UserError, match="cannot write the file"):
        train(sd15_config("name=a", "method=dpo", "steps=2", "resume=auto", "checkpoint_every=1"))


@pytest.mark.parametrize("method", ["dpo", "spm"])
def test_a_dry_run_reads_the_whole_store(
    sd15_config: Recipe, sd15_store: Path, clip: Path, tmp_path: Path, method: str
) -> None:
    store = shutil.copytree(sd15_store, tmp_path / "store")
    config = sd15_config(f"store={store}", f"method={method}", f"clip={clip}", *["train=full"] * (method == "spm"))
    assert run_training(config, dry_run=True).startswith("ok: ")
    file = store / "latents-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"latents-00001\.safetensors is damaged"):
        run_training(config, dry_run=True)
