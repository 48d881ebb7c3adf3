"""An evaluation leaves the pictures, the sheets and honest numbers."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import fastpref.emoji
import fastpref.emoji.style
from fastpref.config import Config, parse_config
from fastpref.data.records import read_captions
from fastpref.emoji.random_models import make_random_clip
from fastpref.errors import UserError
from fastpref.evaluate.reals import open_reals
from fastpref.evaluate.runner import choose_prompts, evaluate_policy, paired_pictures
from fastpref.evaluate.sheets import before_after_sheet, contact_sheet, fit_text, to_batch

Output = namedtuple("Output", ["features", "style_logits"])


class FakeStyle:
    """Line art is what has no colour."""

    def __call__(self, images: torch.Tensor) -> Output:
        saturation = (images.amax(1) - images.amin(1)).mean((1, 2))
        features = torch.nn.functional.avg_pool2d(images, 16).flatten(1)
        return Output(features, torch.stack([saturation - 0.02, 0.02 - saturation], dim=1))


@pytest.fixture
def encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpref.emoji.style, "load_style_encoder", lambda path: FakeStyle())
    monkeypatch.setattr(fastpref.emoji, "CLIP_DIR", make_random_clip(tmp_path / "clip"))


def _config(model: Path, **settings: object) -> Config:
    plain = {"model": str(model), "sample_steps": 2, "guidance_scale": 3.0, "eval_prompts": 3, "eval_batch_size": 4}
    return parse_config({**plain, **settings})


def test_before_and_after(models: dict[str, Path], loras: dict[str, Path], tmp_path: Path, encoders: None) -> None:
    config, run = _config(models["sdxl"]), tmp_path / "run"
    before = evaluate_policy(config, out_dir=run, tag="before")
    assert not (run / "samples" / "before_after.png").exists()
    after = evaluate_policy(config, lora=loras["sdxl"], out_dir=run, tag="after")
    for result in (before, after):
        assert list(result) == ["style_share", "style_distance", "prompt_retrieval", "details"]
        assert 0 <= result["style_share"] <= 1
        assert 0 < result["details"]["floor"] < result["details"]["base_distance"] and result["style_distance"] > 0
        assert set(result["prompt_retrieval"]) == {"top1", "top5"}
        assert result["details"]["work"] == {"unet_forwards": 24, "vae_decodes": 6, "text_forwards": 6}
        assert result["details"]["real_style_accuracy"] > 0.9
        json.dumps(result, allow_nan=False)
    assert before["style_distance"] != after["style_distance"]
    pairs = paired_pictures(run / "samples")
    prompts = choose_prompts(read_captions("emoji"), 3)
    assert list(pairs) == prompts
    assert [len(files) for files in pairs.values()] == [2, 2, 2]
    first = pairs[prompts[0]][0]
    assert not np.array_equal(np.asarray(Image.open(first[0])), np.asarray(Image.open(first[1])))
    names = sorted(p.name for p in (run / "samples").iterdir())
    assert names == ["after", "after.png", "before", "before.png", "before_after.png"]
    repeated = evaluate_policy(_config(models["sdxl"], eval_batch_size=6), out_dir=tmp_path / "again", tag="before")
    assert repeated["style_share"] == before["style_share"]
    assert repeated["style_distance"] == pytest.approx(before["style_distance"], rel=1e-2)


def test_fewer_prompts_later_leave_no_stale_pictures(models: dict[str, Path], tmp_path: Path) -> None:
    settings = {"eval_seeds": 1, "sample_steps": 1}
    for count in (3, 2):
        evaluate_policy(_config(models["sd15"], eval_prompts=count, **settings), out_dir=tmp_path, tag="before")
    assert len(list((tmp_path / "samples" / "before").glob("*.png"))) == 2


def test_metrics_that_cannot_be_had_are_left_out_not_made_up(models: dict[str, Path], tmp_path: Path) -> None:
    result = evaluate_policy(_config(models["sd15"], eval_seeds=1), out_dir=tmp_path, tag="before")
    assert [result[key] for key in ("style_share", "style_distance", "prompt_retrieval")] == [None] * 3
    reasons = result["details"]["left_out"]
    assert set(reasons) == {"style_share", "style_distance", "prompt_retrieval"}
    assert "the model draws 64 x 64" in reasons["style_share"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\nyellow dog\n")
    other = evaluate_policy(_config(models["sdxl"], eval_records=str(prompts)), out_dir=tmp_path, tag="after")
    assert other["details"]["left_out"]["style_share"].startswith("no style encoder")
    assert other["details"]["prompts"] == 2


def test_real_images_come_winner_and_loser_side() -> None:
    reals = open_reals(parse_config({}))
    winners, losers = (list(reals.images((32, 32), target=target)) for target in (True, False))
    assert [caption for _, caption in winners] == [caption for _, caption in losers] == read_captions("emoji")
    shares = [
        (torch.argmax(FakeStyle()(to_batch([image for image, _ in side])).style_logits, 1) == 1).double().mean().item()
        for side in (winners, losers)
    ]
    assert shares[0] == 1.0 and shares[1] < 0.2


def test_the_choice_of_prompts_ignores_the_order_and_grows() -> None:
    captions = [f"caption {i}" for i in range(20)]
    few, more = choose_prompts(captions, 5), choose_prompts(captions[::-1] + captions, 9)
    assert more[:5] == few and len(set(more)) == 9
    assert few != captions[:5]
    with pytest.raises(UserError, match="no captions"):
        choose_prompts([], 5)


def test_sheets_show_each_picture_in_its_place() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9)]
    a, b, c, d = (Image.new("RGB", (32, 32), colour) for colour in colours)
    sheet = np.asarray(before_after_sheet([[(a, b), (c, d)]], ["a caption"]))
    found = {colour: np.argwhere((sheet == colour).all(axis=2)) for colour in colours}
    assert all(len(places) == 96 * 96 for places in found.values())
    middle = {colour: places.mean(axis=0) for colour, places in found.items()}
    before, after, other_before, other_after = (middle[colour] for colour in colours)
    assert before[0] == other_before[0] < after[0] == other_after[0]
    assert before[1] == after[1] < other_before[1] == other_after[1]
    page = np.asarray(contact_sheet([[a], [b], [c], [d]], ["1", "2", "3", "a caption longer than its picture is wide"]))
    assert all((page == colour).all(axis=2).sum() == 96 * 96 for colour in colours)


@pytest.mark.parametrize(
    "text", ["", "cat", "a caption longer than its picture is wide", "two\nlines\r\n of it", "Wi" * 30]
)
def test_a_caption_is_cut_to_the_width_as_letter_by_letter(text: str) -> None:
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(13)
    for width in (0, 30, 64, 200):
        kept = " ".join(text.split())
        if draw.textlength(kept, font=font) > width:
            while kept and draw.textlength(kept + "…", font=font) > width:
                kept = kept[:-1]
            kept += "…"
        assert fit_text(draw, text, width, font) == kept


def test_a_caption_of_100_000_letters_is_measured_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """It and its halvings, 18 times, not once a letter."""
    measured: list[int] = []
    original = ImageDraw.ImageDraw.textlength

    def counted(self: ImageDraw.ImageDraw, text: str, *args: Any, **kwargs: Any) -> float:
        measured.append(len(text))
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "textlength", counted)
    contact_sheet([[Image.new("RGB", (64, 64))]], ["x" * 100_000])
    assert len(measured) <= 18 and max(measured) == 100_000
