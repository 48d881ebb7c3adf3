"""Evaluation against two folders of pictures: a style encoder is fitted or given, and what does not fit is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastpref.evaluate.judges as judges
from fastpref.cli import app
from fastpref.config import Config, load_config
from fastpref.emoji import HELDOUT_PARQUET, STYLE_DIR, TRAIN_PARQUET
from fastpref.emoji.records import EmojiImages, read_records
from fastpref.emoji.style import load_style_encoder
from fastpref.errors import UserError
from fastpref.evaluate.folders import read_folder
from fastpref.evaluate.judges import find_judges
from fastpref.evaluate.reals import open_reals
from fastpref.evaluate.runner import evaluate_pictures, evaluate_policy


def write_folder(path: Path, captions: list[str], images: np.ndarray, metadata: bool = False) -> Path:
    """Pictures with NAME.txt beside them, or all captions in metadata.jsonl."""
    path.mkdir()
    lines = []
    for number, (caption, image) in enumerate(zip(captions, images, strict=True)):
        Image.fromarray(image).save(path / f"{number:03d}.png")
        lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": caption}))
        if not metadata:
            (path / f"{number:03d}.txt").write_text(f"{caption}\n")
    if metadata:
        (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """80 training emoji as two folders of real pictures, and the held-out ones as two sets of pictures to measure."""
    folder, train = tmp_path_factory.mktemp("folders"), read_records(TRAIN_PARQUET)
    rows = slice(0, 560, 7)
    captions = train.captions[rows]
    return {
        "target": write_folder(folder / "target", captions, train.line[rows]),
        "base": write_folder(folder / "base", captions[::-1], train.flat[rows][::-1], metadata=True),
        "line": write_folder(folder / "line", captions, train.line[rows]),
        "flat": write_folder(folder / "flat", captions, train.flat[rows]),
    }


def _config(world: dict[str, Path], *overrides: str) -> Config:
    folders = [f"eval_target_images={world['target']}", f"eval_base_images={world['base']}", "eval_clip=emoji"]
    return load_config("", [*folders, *overrides])


@pytest.fixture(scope="module")
def fitted(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an evaluation that fitted its style encoder, in few small steps."""
    out = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "FIT_SIZE", 32)
        patch.setattr(judges, "FIT_STEPS", 80)
        config = _config(world)
        find_judges(config, open_reals(config), out)
    return out


def test_a_fitted_style_encoder_measures_captions_it_has_not_seen(world: dict[str, Path], fitted: Path) -> None:
    config = _config(world)
    stamp = os.stat(fitted / "style_encoder" / "model.safetensors").st_mtime_ns
    line, flat = (evaluate_pictures(config, world[name], out_dir=fitted) for name in ("line", "flat"))
    assert os.stat(fitted / "style_encoder" / "model.safetensors").st_mtime_ns == stamp, "fitted once"
    assert line["style_share"] > 0.85 and flat["style_share"] < 0.15
    assert line["style_distance"] == line["details"]["floor"] < flat["style_distance"]
    assert flat["details"]["distance_left"] == pytest.approx(1)
    details = line["details"]
    assert (details["pictures"], details["pool"], details["left_out_pictures"]) == (40, 40, 40)
    assert details["style_accuracy"]["clean"] > 0.85 and details["real_style_accuracy"] > 0.85
    encoder = load_style_encoder(fitted / "style_encoder")
    assert len(encoder.config["fitted_on"]) == 40 and encoder.config["styles"] == ["base", "target"]


def test_a_given_style_encoder_measures_every_caption(world: dict[str, Path], tmp_path: Path) -> None:
    result = evaluate_pictures(_config(world, f"eval_style={STYLE_DIR}"), world["line"], out_dir=tmp_path)
    assert (result["details"]["pictures"], result["details"]["left_out_pictures"]) == (80, 0)
    assert result["style_share"] > 0.95 and result["prompt_retrieval"]["top1"] > 0.95
    assert not list(tmp_path.iterdir())


def test_any_pipeline_against_two_folders(
    world: dict[str, Path], fitted: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    overrides = [f"eval_style={fitted}/style_encoder", "eval_prompts=5", "eval_seeds=1", "sample_steps=1"]
    config = _config(world, f"model={models['sd15']}", *overrides)
    result = evaluate_policy(config, out_dir=tmp_path, tag="before")
    assert result["details"]["pictures"] == 5 and 0 <= result["style_share"] <= 1
    assert result["style_distance"] > result["details"]["floor"], "noise is no line art"
    seen = set(load_style_encoder(fitted / "style_encoder").config["fitted_on"])
    index = json.loads((tmp_path / "samples" / "before" / "index.json").read_text())["pictures"]
    assert not seen & {judges.prompt_id(entry["prompt"]) for entry in index}
    arguments = [str(models["sd15"]), *(f"{k}={v}" for k, v in _settings(config)), "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, ["evaluate", *arguments])
    assert answer.exit_code == 0 and "Style share: " in answer.stdout, answer.output
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())["before"]
    assert again["style_share"] == result["style_share"]
    pictures = tmp_path / "samples" / "before"  # index.json gives the captions
    answer = CliRunner().invoke(app, ["evaluate", str(pictures), *arguments[1:-1], str(tmp_path / "out2")])
    measured = json.loads((tmp_path / "out2" / "evaluation.json").read_text())["before"]
    assert measured["style_distance"] == pytest.approx(result["style_distance"], rel=1e-6)


def _settings(config: Config) -> list[tuple[str, Any]]:
    keys = ("eval_target_images", "eval_base_images", "eval_clip", "eval_style", "eval_prompts", "eval_seeds")
    return [(key, getattr(config, key)) for key in (*keys, "sample_steps")]


def test_what_does_not_fit_is_one_line_before_anything_is_drawn(world: dict[str, Path], tmp_path: Path) -> None:
    heldout: EmojiImages = read_records(HELDOUT_PARQUET)
    other = write_folder(tmp_path / "other", heldout.captions[:6], heldout.flat[:6])
    few = write_folder(tmp_path / "few", heldout.captions[:6], heldout.line[:6])
    same = write_folder(tmp_path / "same", heldout.captions[:6], heldout.line[:6])
    (tmp_path / "empty").mkdir()
    bare = write_folder(tmp_path / "bare", heldout.captions[:6], heldout.line[:6])
    (bare / "002.txt").unlink()
    for target, base, message in (
        (world["target"], other, "0 captions are in both folders"),
        (few, same, "000.png and 000.png are one picture"),
        (few, few, "overlap"),
        (tmp_path, few, "overlap"),
        (few, tmp_path / "empty", "no pictures in the folder"),
        (few, tmp_path / "none", "no such folder of pictures"),
        (bare, other, "1 of 6 pictures have no caption, e.g. 002.png"),
        (few, other, "fitting needs 16"),
    ):
        config = _config({"target": target, "base": base})
        with pytest.raises(UserError, match=message) as error:
            evaluate_policy(config, out_dir=tmp_path / "run", tag="before")
        assert "\n" not in str(error.value)
    both = [f"eval_target_images={few}", f"eval_base_images={other}"]
    for overrides, message in (
        ([*both, f"eval_style={STYLE_DIR}"], "no CLIP for prompt_retrieval"),
        ([*both, "eval_clip=nowhere", f"eval_style={STYLE_DIR}"], "no CLIP model there"),
        ([*both, "eval_clip=emoji", f"eval_style={few}"], "no style encoder"),
        (both[:1], "eval_base_images is not set"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_policy(load_config("", overrides), out_dir=tmp_path / "run", tag="before")
    assert not (tmp_path / "run").exists()
    config = load_config("", [*both, "eval_clip=emoji", f"eval_style={STYLE_DIR}"])
    with pytest.raises(UserError, match="80 of 80 pictures have a caption without real images"):
        evaluate_pictures(config, world["line"], out_dir=tmp_path)


def test_captions_of_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", ["one", "two"], np.zeros((2, 8, 8, 3), np.uint8))
    assert [(file.name, file.caption) for file in read_folder(folder)] == [("000.png", "one"), ("001.png", "two")]
    rows = ['{"file_name": "001.png", "caption": "three"}', "", '{"file_name": "000.png", "prompt": "four"}']
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    assert [(file.name, file.caption) for file in read_folder(folder)] == [("001.png", "three"), ("000.png", "four")]
    for row, message in (
        ("{", "is not JSON"),
        ('{"file_name": "001.png"}', "no file_name or no caption"),
        ("[1]", "no file_name"),
        ("", "names no pictures"),
    ):
        (folder / "metadata.jsonl").write_text(row)
        with pytest.raises(UserError, match=message):
            read_folder(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "../../x.png", "text": "x"}')
    with pytest.raises(UserError, match="leaves the directory"):
        read_folder(folder)[0].load(1 << 20)
