"""Training, judging, resuming and planning with captions of two blocks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastpref.config import Config, load_config
from fastpref.data.prepare import prepare
from fastpref.errors import UserError
from fastpref.models.latent_reward_file import CONFIG_NAME, FOLDER_NAME
from fastpref.plan.report import make_plan
from fastpref.runs import evaluate_tag, run_training
from fastpref.train.job import TrainJob
from fastpref.train.reference import prepare_reference

Recipe = Callable[..., Config]
START = "a red cat on the moon blue heart in green circle yellow dog"  # 13 of the 14 tokens that a block has
LINE = "captions are cut after 28 tokens"


@pytest.fixture(scope="module")
def recipe(sdxl: Path, clip: Path, few_records: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Recipes on the random SDXL and a store of captions of more than a block, prepared in two."""
    folder = tmp_path_factory.mktemp("long")
    table = pq.read_table(few_records)
    captions = [f"{START} {caption}" for caption in table.column("caption").to_pylist()]
    long = table.set_column(table.column_names.index("caption"), "caption", pa.array(captions))
    pq.write_table(long, folder / "long.parquet")
    settings = [
        *(f"model={sdxl}", f"clip={clip}", f"records={folder}/long.parquet", f"eval_records={folder}/long.parquet"),
        *(f"store={folder}/store", "max_caption_tokens=150", "resolution=32", "evaluate=false", "tracker=none"),
        *("batch_size=4", "lora_rank=4", "learning_rate=1e-3", "guidance_scale=3", f"output_dir={folder}/runs"),
    ]

    def make(*overrides: str) -> Config:
        return load_config("", [*settings, *overrides])

    assert prepare(make(), progress=False).pairs == 40
    return make


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Positions of the prompts that any UNet was given."""
    from diffusers import UNet2DConditionModel

    found: set[int] = set()
    original = UNet2DConditionModel.forward

    def forward(self: Any, sample: Any, timestep: Any, encoder_hidden_states: torch.Tensor, *a: Any, **k: Any) -> Any:
        found.add(encoder_hidden_states.shape[1])
        return original(self, sample, timestep, encoder_hidden_states, *a, **k)

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
    return found


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(config.run_dir / "pytorch_lora_weights.safetensors")


def test_a_resumed_run_is_the_whole_one_and_the_key_is_fixed(recipe: Recipe, seen: set[int]) -> None:
    """With dropout of captions: the empty prompt has as many positions."""
    common = ["method=dpo", "caption_dropout=0.5", "checkpoint_every=1"]
    whole, parts = recipe(*common, "name=whole", "steps=2"), recipe(*common, "name=parts", "steps=1")
    run_training(whole)
    run_training(parts)
    with pytest.raises(UserError, match="max_caption_tokens is 77 but the run was started with 150"):
        run_training(recipe(*common, "name=parts", "steps=2", "resume=auto", "max_caption_tokens=77"))
    run_training(recipe(*common, "name=parts", "steps=2", "resume=auto"))
    first, second = weights(whole), weights(parts)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert seen == {32}


def test_a_ledger_is_that_of_the_store(recipe: Recipe) -> None:
    """In fp64, where AdamW's first steps, of the gradient's sign, do not turn rounding into weights."""
    common = ["method=dpo", "steps=2", "precision=fp64"]
    with_ledger = recipe(*common, "name=ledger", "reference=ledger")
    prepare_reference(with_ledger, progress=False)
    run_training(with_ledger)
    beside = recipe(*common, "name=beside")
    run_training(beside)
    for name, tensor in weights(beside).items():
        torch.testing.assert_close(weights(with_ledger)[name], tensor, rtol=0, atol=1e-9)  # of steps of 1e-3


def test_evaluation_draws_with_the_length_of_the_training(
    recipe: Recipe, seen: set[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["eval_prompts=2", "eval_seeds=1", "sample_steps=2", f"output_dir={tmp_path}"]
    config = recipe("method=dpo", *quick)
    with pytest.raises(UserError, match="store was prepared with max_caption_tokens=150, not 77"):
        TrainJob.open(recipe("method=dpo", "max_caption_tokens=77"))
    evaluate_tag(config, tmp_path, "before")
    assert seen == {32} and "cut" not in capsys.readouterr().err
    evaluate_tag(recipe("method=dpo", *quick, "max_caption_tokens=77"), tmp_path, "before")
    assert seen == {32, 16}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("2 of 2 captions are cut after 14 tokens"), said


def test_spo_rolls_out_and_trains_on_both_blocks_and_says_what_is_cut(
    recipe: Recipe, seen: set[int], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{START} with white hat\n{START} {START} {START} hat\n{START} {START} {START} sun\nred\n")
    small = ["sample_steps=4", "plain_steps=1", "candidates=3", "rollout_prompts=4", "score_threshold=0", "steps=1"]
    config = recipe("method=spo", "resolution=16", f"prompts={prompts}", *small)
    said = io.StringIO()
    job = TrainJob.open(config, Console(file=said, width=60))
    hint = "(the longest has 40): max_caption_tokens=225 takes them whole"
    assert said.getvalue() == f"2 of 4 {LINE}, 2 of them to the same text as another caption {hint}\n"
    run_training(config.model_copy(update={"output_dir": str(tmp_path)}))
    assert seen == {32} and job.trainer.describe() == "4 prompts"


def test_a_latent_reward_model_judges_the_length_it_was_trained_with(
    recipe: Recipe, seen: set[int], tmp_path: Path
) -> None:
    config = recipe("method=lrm", "train=full", "steps=1", f"output_dir={tmp_path}", "eval_prompts=2")
    run_training(config)
    folder = config.run_dir / FOLDER_NAME
    assert json.loads((folder / CONFIG_NAME).read_text())["max_caption_tokens"] == 150
    assert evaluate_tag(config, config.run_dir, "after")["details"]["pairs"] >= 2
    small = ["method=lpo", "sample_steps=4", "plain_steps=1", "candidates=3", "rollout_prompts=4", "score_threshold=0"]
    judged = recipe(*small, f"scorer={folder}", f"output_dir={tmp_path}", "steps=1", "name=lpo")
    run_training(judged)
    assert seen == {32}
    with pytest.raises(UserError, match="reward model was trained with max_caption_tokens=150, not 77"):
        TrainJob.open(recipe(*small, f"scorer={folder}", "max_caption_tokens=77"))


def test_a_step_aware_model_sees_pictures_predicted_from_both_blocks(
    recipe: Recipe, seen: set[int], tmp_path: Path
) -> None:
    config = recipe("method=spm", "train=full", "steps=1", f"output_dir={tmp_path}", "eval_prompts=2")
    run_training(config)
    assert evaluate_tag(config, config.run_dir, "after")["details"]["pairs"] >= 2
    assert seen == {32}


@pytest.mark.parametrize("method", ["dpo", "spo"])
def test_the_plan_counts_the_longer_prompt(recipe: Recipe, method: str) -> None:
    """Cross-attention is linear in the prompt's length, everything else does not depend on it."""
    plans = [make_plan(recipe(f"method={method}", f"max_caption_tokens={k}"), 1, "h100") for k in (77, 150, 225)]
    one, two, three = (plan.count for plan in plans)
    assert three.flops - two.flops == two.flops - one.flops > 0
    assert three.rollout_flops - two.rollout_flops == two.rollout_flops - one.rollout_flops
    assert (two.rollout_flops > one.rollout_flops) == (method == "spo")
    assert three.activations > two.activations > one.activations


def test_the_plan_of_a_public_model_has_77_positions_a_block(recipe: Recipe) -> None:
    from fastpref.plan.models import models_of

    config = recipe("model=stabilityai/sdxl", "method=dpo")
    lengths = [config.model_copy(update={"max_caption_tokens": tokens}) for tokens in (77, 150, 225)]
    assert [models_of(of_length, "sdxl").shapes.tokens for of_length in lengths] == [77, 154, 231]
