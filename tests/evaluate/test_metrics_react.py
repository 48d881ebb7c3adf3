"""The measures on real emoji: each moves the way it must when pictures get worse, and stays where it must stay.

The pictures are held-out ones that neither the style encoder nor the CLIP was trained on.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fastpref.emoji import CLIP_DIR, HELDOUT_PARQUET, STYLE_DIR
from fastpref.emoji.records import EmojiImages, read_records
from fastpref.emoji.style import load_style_encoder
from fastpref.evaluate.style import RealPool, encode, evaluate_style, make_pool
from fastpref.models.similarity import load_clip


@functools.cache
def _heldout() -> EmojiImages:
    return read_records(HELDOUT_PARQUET)


@functools.cache
def _encoders() -> tuple[Any, Any]:
    return load_style_encoder(STYLE_DIR), load_clip(CLIP_DIR)


@functools.cache
def _pool() -> RealPool:
    captions = _heldout().captions
    line, flat = ([Image.fromarray(image) for image in side] for side in (_heldout().line, _heldout().flat))
    sides = [encode(zip(side, captions, strict=True), *_encoders()) for side in (line, flat)]
    return make_pool(*sides)


def _measure(images: np.ndarray | list[Image.Image], captions: list[str] | None = None) -> dict[str, Any]:
    pictures = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
    return evaluate_style(encode(zip(pictures, captions or _heldout().captions, strict=True), *_encoders()), _pool())


def _noisy(images: np.ndarray, std: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 255 * std, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def _blurred(images: np.ndarray, sigma: float) -> list[Image.Image]:
    return [Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)) for image in images]


def _mixed(share: float) -> np.ndarray:
    """Flat colour for that share of the captions, line art for the rest."""
    flat = np.random.default_rng(1).permutation(len(_heldout().captions)) < share * len(_heldout().captions)
    return np.where(flat[:, None, None, None], _heldout().flat, _heldout().line)


def test_real_line_art_is_at_the_floor_and_flat_colour_far_above() -> None:
    line, flat = _measure(_heldout().line), _measure(_heldout().flat)
    assert line["style_distance"] == line["details"]["floor"] and line["details"]["distance_left"] == 0
    assert flat["style_distance"] == flat["details"]["base_distance"] > 4 * line["details"]["floor"]
    assert line["style_share"] > 0.9 and flat["style_share"] < 0.1
    # A picture taken for the other style looks for its caption among those, so even real ones miss some.
    assert line["prompt_retrieval"] == line["details"]["ceiling"]
    assert min(line["prompt_retrieval"]["top1"], flat["prompt_retrieval"]["top1"]) > 0.85
    assert line["details"]["real_style_accuracy"] > 0.93


def test_the_distance_is_monotone_in_the_share_of_the_wrong_style() -> None:
    results = [_measure(_mixed(share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    left = [result["details"]["distance_left"] for result in results]
    assert left == sorted(left) and min(np.diff(left)) > 0.08
    assert 0.25 < left[2] < 0.6
    shares = [result["style_share"] for result in results]
    assert shares == sorted(shares, reverse=True) and shares[2] == pytest.approx(0.5, abs=0.08)
    assert min(result["prompt_retrieval"]["top1"] for result in results) > 0.85, "content is untouched by style"


@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_degraded_line_art_stays_line_art_but_leaves_the_floor(kind: str) -> None:
    line = _heldout().line
    strengths = (0.05, 0.1, 0.2, 0.6) if kind == "noise" else (0.6, 0.9, 1.3, 3.0)
    results = [_measure(_noisy(line, s) if kind == "noise" else _blurred(line, s)) for s in strengths]
    floor = results[0]["details"]["floor"]
    distances = [result["style_distance"] for result in results]
    assert distances == sorted(distances)
    assert distances[1] > 1.2 * floor and distances[2] > 1.7 * floor
    assert distances[2] < 0.7 * results[0]["details"]["base_distance"], "worse pictures are no other style"
    assert min(result["style_share"] for result in results[:2]) > 0.9
    top5 = [result["prompt_retrieval"]["top5"] for result in results]
    assert min(top5[:3]) > 0.9, "the content can still be seen"
    assert top5[3] < 0.8, "and now it cannot"


def test_shuffled_captions_cost_the_content_and_nothing_else() -> None:
    captions = _heldout().captions
    plain, shuffled = _measure(_heldout().line), _measure(_heldout().line, captions[5:] + captions[:5])
    assert shuffled["prompt_retrieval"]["top1"] < 0.03 and shuffled["prompt_retrieval"]["top5"] < 0.25
    assert shuffled["style_share"] == plain["style_share"]
    # Some pictures now meet their own image among those they are held against, so it is rather below the floor.
    assert -0.2 < shuffled["details"]["distance_left"] <= 0


def test_one_picture_for_all_prompts_is_caught_by_distance_and_retrieval() -> None:
    distances, floors = [], []
    for row in (0, 20, 40, 60):
        collapsed = _measure(_heldout().line[[row] * len(_heldout().captions)])
        distances.append(collapsed["style_distance"])
        floors.append(collapsed["details"]["floor"])
        assert collapsed["style_share"] in (0.0, 1.0)
        assert collapsed["prompt_retrieval"]["top1"] == pytest.approx(1 / len(_heldout().captions))
    assert min(distances) > 5 * floors[0]


def test_pictures_of_nothing_are_caught() -> None:
    rng = np.random.default_rng(0)
    for images in (rng.integers(0, 256, _heldout().line.shape, dtype=np.uint8), np.full_like(_heldout().line, 255)):
        result = _measure(images)
        assert result["style_distance"] > 5 * result["details"]["floor"]
        assert result["prompt_retrieval"]["top5"] < 0.2


def test_the_features_follow_the_degradation() -> None:
    """What the encoder was trained to say of a picture's noise and blur, it says of held-out pictures."""
    encoder = _encoders()[0]
    line = _heldout().line

    def said(images: list[Image.Image] | np.ndarray) -> torch.Tensor:
        stack = np.stack([np.asarray(image) for image in images])
        return encoder(torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255).degradations.mean(0)

    noise = torch.stack([said(_noisy(line, std))[0] for std in (0.0, 0.05, 0.1, 0.2)])
    blur = torch.stack([said(_blurred(line, sigma))[1] for sigma in (0.01, 0.6, 0.9, 1.3)])
    assert (noise.diff() > 0.1).all() and (blur.diff() > 0.1).all()
    assert abs(float(noise[0])) < 0.1 and abs(float(blur[0])) < 0.1
