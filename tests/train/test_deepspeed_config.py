"""DeepSpeed's settings come from the recipe; a JSON that says otherwise is one line. And how rows fall to ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpref.config import Config, load_config
from fastpref.errors import UserError
from fastpref.train.deepspeed_config import derive, read_settings, zero_stage
from fastpref.train.deepspeed_runtime import LossScale
from fastpref.train.job import _check_ranks
from fastpref.train.trainer import PolicyTrainer
from fastpref.train.world import World

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


def recipe(*more: str) -> Config:
    return load_config("", ["engine=deepspeed", "batch_size=32", "micro_batch_size=4", "precision=bf16", *more])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_bundled_files_fit_every_recipe(path: Path) -> None:
    config = recipe(f"deepspeed={path}")
    settings = derive(config, read_settings(config), 4)
    stage = int(path.stem.removeprefix("zero")[0])
    assert settings["zero_optimization"]["stage"] == stage
    assert ("offload_optimizer" in settings["zero_optimization"]) == path.stem.endswith("offload")
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & set(settings), "weights in training are fp32"


def test_the_recipe_decides_and_auto_means_that() -> None:
    auto = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}},
    }
    settings = derive(recipe("zero_stage=3", "max_grad_norm=0.5"), auto, 4)
    assert settings["train_batch_size"] == 32 and settings["gradient_accumulation_steps"] == 2
    assert settings["train_micro_batch_size_per_gpu"] == 4 and settings["gradient_clipping"] == 0.5
    assert settings["zero_optimization"]["stage"] == 3
    assert [zero_stage(recipe(), {}), zero_stage(recipe(), {"zero_optimization": {"stage": 1}})] == [2, 1]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"train_batch_size": 64},
            'train_batch_size is 64 (zero.json): write "auto" or leave it out; the recipe says 32',
        ),
        ({"gradient_accumulation_steps": 1}, "the recipe says 2"),
        ({"gradient_clipping": 2.0}, "the recipe says 1.0 (max_grad_norm)"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True (zero.json)"),
        ({"bf16": {"enabled": False}}, "(precision=bf16)"),
        ({"zero_optimization": {"stage": 3}}, "the recipe says 1 (zero_stage)"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type is lamb"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "optimizer.params.lr is 1.0"),
        ({"optimizer": {"params": {"momentum": 0.9}}}, "nothing of the kind"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' is set"),
        ({"zero_optimization": {"overlap_comm": True}}, "overlap_comm is true"),
        ({"zero_optimization": 3}, "no JSON object of sections"),
        ([1], "no JSON object of sections"),
    ],
)
def test_a_contradiction_is_one_line(wrong: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero.json").write_text(json.dumps(wrong))
    config = recipe("deepspeed=zero.json", "zero_stage=1")
    with pytest.raises(UserError) as error:
        derive(config, read_settings(config), 4)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_unreadable_file_and_a_stage_there_is_not() -> None:
    with pytest.raises(UserError, match="cannot read the DeepSpeed settings"):
        read_settings(recipe("deepspeed=none.json"))
    with pytest.raises(UserError, match="use 1, 2 or 3; or engine=local"):
        zero_stage(recipe(), {"zero_optimization": {"stage": 0}})


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["optimizer=adafactor"], "flat partitions"),
        (["engine=local", "zero_stage=2"], "set engine=deepspeed"),
    ],
)
def test_settings_that_do_not_go_together(more: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe(*more)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["batch_size=4"], "8 ranks for batch_size 4 (batch_size): use at most 4 ranks"),
        (["batch_size=20"], "batch_size is 20, no multiple of the 8 ranks (batch_size): use 16 or 24"),
        (["method=spo", "rollout_prompts=6"], "8 ranks for rollout_prompts 6"),
    ],
)
def test_more_ranks_than_work_is_one_line(more: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        _check_ranks(recipe(*more), World(size=8))
    assert says in str(error.value)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 7))
def test_every_row_is_in_one_forward_and_ranks_have_as_many(rows: int, ranks: int, size: int) -> None:
    config = load_config("", [f"micro_batch_size={size}", "method=spo"])
    cuts = []
    for rank in range(ranks):
        trainer: Any = type("Some", (), {"config": config, "engine": type("E", (), {"world": World(rank, ranks)})})()
        cuts.append(PolicyTrainer.micro_batches(trainer, rows))
    assert len({len(cut) for cut in cuts}) == 1
    assert [row for cut in cuts for part in cut for row in range(rows)[part]] == list(range(rows))
    assert all(len(range(rows)[part]) <= size for cut in cuts for part in cut)


def test_the_loss_scale_is_that_of_torch() -> None:
    scale, torch_scale = LossScale(True), torch.amp.GradScaler("cpu")
    torch_scale.scale(torch.ones(()))  # it starts with the first use
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for finite in [True, False, True, True, False]:
        weight.grad = torch.full((1,), 1.0 if finite else float("inf"))
        torch_scale.step(optimizer)
        torch_scale.update()
        scale.update(finite)
    assert scale.state() == torch_scale.state_dict()
    other = LossScale(True)
    other.load(torch_scale.state_dict())
    assert (other.value, other.good) == (scale.value, scale.good)
