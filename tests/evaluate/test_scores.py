"""Scores of two runs compared: medians, win rates, bootstrap intervals, files and pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastpref.errors import UserError
from fastpref.evaluate.runner import _save
from fastpref.evaluate.sample import Picture
from fastpref.evaluate.scorers import load_scorer
from fastpref.evaluate.scores import (
    bootstrap_intervals,
    compare,
    read_pictures,
    run_scores,
    summarise,
    win_values,
    write_scores,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _pictures(sizes: tuple[tuple[int, int], ...] = ((300, 200), (96, 130))) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, sizes, strict=True)]


# statistics


def _interval(values: np.ndarray, groups: list[str], **options: int) -> tuple[float, float]:
    low, high = bootstrap_intervals(values[None], groups, **{"resamples": 2000, "seed": 0, **options})
    return float(low[0]), float(high[0])


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(1), 0
    groups = [str(i // 2) for i in range(120)]
    for trial in range(300):
        effect = rng.normal(0.3, 1.0, 60).repeat(2) + rng.normal(0, 0.5, 120)
        low, high = _interval(effect, groups, resamples=300, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_seeds_of_one_prompt_do_not_count_as_new_evidence() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=50)
    once = _interval(values, [f"{i:02}" for i in range(50)])
    copied = _interval(values.repeat(4), [f"{i // 4:02}" for i in range(200)])
    assert copied == pytest.approx(once, rel=1e-12)
    naive = _interval(values.repeat(4), [f"{i:03}" for i in range(200)])
    assert naive[1] - naive[0] < 0.6 * (once[1] - once[0])
    assert _interval(values, ["one prompt"] * 50) == pytest.approx(once, rel=1e-12)
    assert _interval(values, ["a"] * 50, seed=1) != _interval(values, ["a"] * 50, seed=2)


def test_identical_pictures_tie_and_pairing_matters() -> None:
    rng = np.random.default_rng(3)
    before = rng.normal(0, 10, 80)
    groups = [str(i) for i in range(80)]
    same = summarise("s", before, before.copy(), groups, resamples=500, seed=0)
    assert (same.win_rate, same.win_rate_low, same.win_rate_high) == (0.5, 0.5, 0.5)
    assert (same.mean_difference, same.mean_difference_low, same.mean_difference_high) == (0, 0, 0)
    after = before + rng.normal(0.1, 0.05, 80)
    paired = summarise("s", before, after, groups, resamples=500, seed=0)
    assert paired.win_rate > 0.9 and paired.mean_difference_low > 0.08 and paired.mean_difference_high < 0.12
    shuffled = summarise("s", before, rng.permutation(after), groups, resamples=500, seed=0)
    assert shuffled.mean_difference == pytest.approx(paired.mean_difference)
    assert shuffled.win_rate_low < 0.5 < shuffled.win_rate_high and shuffled.mean_difference_low < -1
    assert win_values(np.array([1.0, 2, 3]), np.array([2.0, 2, 1])).tolist() == [1, 0.5, 0]


# pictures to table


class Brightness:
    name = "brightness"

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        return torch.tensor([float(np.asarray(image).mean()) for image in images])


class Broken(Brightness):
    name = "broken"

    def score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        return torch.where(torch.tensor([p == "cat" for p in prompts]), torch.nan, super().score(images, prompts))


GREYS = {  # before, after
    ("ant", 0): (10, 20),
    ("ant", 1): (30, 30),
    ("bee", 0): (50, 40),
    ("bee", 1): (70, 90),
    ("cat", 0): (100, 130),
    ("cat", 1): (5, 6),
}


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """The folder as evaluation writes it; 'after' also has a picture that 'before' lacks."""
    for tag, index in (("before", 0), ("after", 1)):
        greys = {key: pair[index] for key, pair in GREYS.items()} | ({("dog", 0): 200} if index else {})
        pictures = [Picture(p, s, Image.new("RGB", (32, 32), (grey,) * 3)) for (p, s), grey in greys.items()]
        _save(pictures, tmp_path / "samples", tag)
    return tmp_path / "samples"


def test_the_table_pairs_pictures_by_prompt_and_seed(samples: Path) -> None:
    before, after = read_pictures(samples / "before"), read_pictures(samples / "after")
    table = compare(before, after, [Brightness()], batch_size=4, resamples=200)
    (row,) = table.rows
    assert (row.scorer, row.n, row.prompts) == ("brightness", 6, 3)
    assert (row.median_before, row.median_after) == (40, 35)
    assert row.mean_before == pytest.approx(265 / 6) and row.mean_after == pytest.approx(316 / 6)
    assert row.mean_difference == pytest.approx(51 / 6)
    assert row.win_rate == pytest.approx(4.5 / 6)
    assert row.win_rate_low == 0.5 and row.win_rate_high == 1.0  # three times 'bee', three times 'cat'
    assert table.keys == sorted(GREYS)
    assert table.after["brightness"].tolist() == [float(GREYS[key][1]) for key in table.keys]
    again = compare(before, after, [Brightness()], batch_size=1, resamples=200)
    assert again.rows == table.rows
    reverse = compare(after, before, [Brightness()], resamples=200).rows[0]
    assert reverse.win_rate == pytest.approx(1 - row.win_rate) and reverse.mean_difference == -row.mean_difference


def test_files_say_what_the_table_says(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(json.dumps(["bee", "cat"]))
    prompts = str(tmp_path / "set.json")
    table = run_scores(
        samples / "before", samples / "after", ["clip=emoji"], tmp_path / "out", prompts=prompts, resamples=300
    )
    clip = load_scorer("clip=emoji")
    for tag, side in (("before", table.before), ("after", table.after)):
        pictures = read_pictures(samples / tag)
        for key, value in zip(table.keys, side["clip"], strict=True):
            assert value == pytest.approx(float(clip.score([Image.open(pictures[key])], [key[0]])), abs=1e-3)
    (row,) = csv.DictReader((tmp_path / "out/scores.csv").open())
    assert row["scorer"] == "clip" and int(row["n"]) == 4 and int(row["prompts"]) == 2
    assert float(row["win_rate"]) == table.rows[0].win_rate
    pairs = list(csv.DictReader((tmp_path / "out/score_pairs.csv").open()))
    assert [(p["prompt"], int(p["seed"])) for p in pairs] == table.keys
    assert [float(p["before"]) for p in pairs] == table.before["clip"].tolist()
    assert Image.open(tmp_path / "out/scores.png").size[0] > 900
    two = compare(read_pictures(samples / "before"), read_pictures(samples / "after"), [Brightness(), clip])
    assert [path.name for path in write_scores(two, tmp_path / "two")] == [
        "scores.csv",
        "score_pairs.csv",
        "scores.png",
    ]
    assert two.before["clip"][1] == two.after["clip"][1]  # the same picture, in two batches
    assert len((tmp_path / "two/score_pairs.csv").read_text().splitlines()) == 1 + 2 * 6


def test_user_errors_of_a_comparison(samples: Path, tmp_path: Path) -> None:
    before, after = read_pictures(samples / "before"), read_pictures(samples / "after")
    with pytest.raises(UserError, match="no pictures there"):
        read_pictures(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"1 of 2 prompts have no picture, e\.g\. 'dog'"):
        read_pictures(samples / "before", ["ant", "dog"])
    with pytest.raises(UserError, match="no prompt and seed is on both sides"):
        compare(before, {("dog", 0): after["dog", 0]}, [Brightness()])
    with pytest.raises(UserError, match="each once"):
        compare(before, after, [Brightness(), Brightness()])
    with pytest.raises(UserError, match=f"broken gives no finite score .*{before['cat', 0].name}"):
        compare(before, after, [Broken()])
    after["bee", 0].write_bytes(b"no picture")
    with pytest.raises(UserError, match=f"cannot read the picture .*{after['bee', 0].name}"):
        compare(before, after, [Brightness()])
    (samples / "after" / "index.json").write_text('{"pictures": [{"file": "x.png"}]}')
    with pytest.raises(UserError, match="index of the pictures"):
        read_pictures(samples / "after")
