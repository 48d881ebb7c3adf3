"""The config model: defaults, bounds, overrides, and one-line errors that name the key and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpref.config import Config, load_config, save_config
from fastpref.errors import UserError

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def fail(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config("", list(overrides))
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_every_recipe_is_valid_and_named_after_its_file(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.name == recipe.stem
    assert recipe.stem.endswith(config.method)


def test_unknown_key_suggests_the_nearest() -> None:
    assert "did you mean 'batch_size'?" in fail("batchsize=3")
    assert "did you mean 'learning_rate'?" in fail("learning_rates=3")


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("beta: 5\ntemprature: 0.1\n")
    with pytest.raises(UserError) as error:
        load_config(recipe)
    assert "temprature" in str(error.value) and str(recipe) in str(error.value) and "'temperature'" in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "beta=0",
        "beta=-1",
        "beta=.inf",
        "beta=.nan",
        "temperature=0",
        "steps=0",
        "label_smoothing=0.5",
        "threads=9223372036854775807",
    ],
)
def test_out_of_bounds_is_refused_by_name(override: str) -> None:
    assert override.split("=")[0] in fail(override)


def test_what_sft_has_no_mean_of_picks_no_best_checkpoint() -> None:
    with pytest.raises(UserError, match="keep_best is margin with method sft, which has no losers"):
        load_config("", ["method=sft", "keep_best=margin"])
    assert load_config("", ["method=sft", "keep_best=loss"]).checkpoint_async == "auto"


def test_resolution_must_be_a_multiple_of_8() -> None:
    assert "multiple of 8" in fail("resolution=33")


def test_batch_arithmetic() -> None:
    assert "micro_batch_size is 3, must divide batch_size 16" in fail("micro_batch_size=3")
    assert "group_size is 5, must divide batch_size 16" in fail("group_size=5")


def test_defaults_of_group_size() -> None:
    assert load_config("", ["method=rpo", "batch_size=16"]).group == 16
    assert load_config("", ["method=rpo", "batch_size=128"]).group == 64
    assert load_config("", ["method=dpo", "batch_size=16"]).group == 1
    assert load_config("", ["method=dpo", "group_size=8"]).group == 8


def test_scientific_notation_is_a_number() -> None:
    assert load_config("", ["learning_rate=1e-4", "safeguard=9e-1"]).learning_rate == 1e-4


def test_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_config("", ["method=dpo", "beta=123.5", "timestep_range=[10, 900]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_every_setting_has_a_description() -> None:
    assert [name for name, field in Config.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("text", ["- a\n- b\n", "beta: [", "\x00"])
def test_a_file_that_is_no_mapping_is_one_line(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(recipe)
    assert "\n" not in str(error.value) and str(recipe) in str(error.value)


@pytest.mark.parametrize("value", ["x" * 256, "a/" + "é" * 200 + "/b", '"\\0"', '"\\ud800"', "ab/" * 2000])
def test_what_no_file_can_be_called_is_no_path(value: str) -> None:
    with pytest.raises(UserError, match="no file can be called"):
        load_config("", [f"store={value}"])
