"""The pictures of step pools mark what the files say, and the report of a stepwise run shows them and its rounds."""

from __future__ import annotations

import json
import math
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastpref.atomic import write_tensors
from fastpref.config import parse_config, save_config
from fastpref.emoji import MODEL_DIR
from fastpref.errors import UserError
from fastpref.evaluate.pool_sheet import COLUMNS, LOSER, PALE, WINNER, PoolColumn, pool_sheet
from fastpref.evaluate.pools import MAX_COLUMNS, MAX_ROWS, draw_pools, extremes, read_pool, read_rounds, totals
from fastpref.evaluate.report import write_report
from fastpref.models.loading import load_vae
from fastpref.models.one_step import LatentDecoder
from fastpref.models.work import Work

GREY = (128, 128, 128)
TIMESTEPS = [501, 1, 0]
SCORES = torch.tensor([[1.0, 3.0, 2.0, 0.5], [2.0, 2.0, 2.0, 2.0], [math.nan, 1.0, 2.0, 3.0]])


@pytest.fixture(scope="module")
def decoder() -> LatentDecoder:
    return LatentDecoder(load_vae(MODEL_DIR, "fp32", torch.device("cpu")), 4, Work())


def _write_pool(run: Path, number: int, scores: torch.Tensor = SCORES, method: str = "spo", **other: Any) -> Path:
    segments, candidates = scores.shape
    latents = torch.randn(segments, candidates, 4, 8, 8, generator=torch.Generator().manual_seed(number))
    tensors = {"latents": latents, "scores": scores, "chosen": torch.arange(segments) % candidates}
    tensors["kept"] = torch.tensor([1] + [0] * (segments - 1), dtype=torch.uint8)
    steps = json.dumps(list(range(segments - 1, -1, -1)) if segments != 3 else TIMESTEPS)
    path = run / "pools" / f"round-{number:05d}.safetensors"
    about = {"prompt": f"red <b>heart {number}", "timesteps": steps, "method": method}
    write_tensors(path, tensors | {k: v for k, v in other.items() if v is not None}, about)
    return path


def _row(number: int, kept: int = 24, **other: Any) -> dict[str, Any]:
    row = {"round": number, "step": 10 * number, "prompts": 16, "pools": 48, "pairs_kept": kept, "transitions": kept}
    row |= {"pools_dropped_nan": 1, "threshold": [0.3] * 3, "timesteps": TIMESTEPS, "score_mean": [1.0, 2.0, 3.0]}
    row |= {"score_best": [2.0, 3.0, 4.0], "score_worst": [0.0, 1.0, None], "gap_median": [1.0] * 3}
    row |= {"kept_share": [0.75, 0.5, 0.25], "gap_quantiles": {"0.5": 1.0}, "unet_forwards": 1000}
    return row | {"seconds_rollout": 3.0, "seconds_scoring": 1.0, "seconds_training": 5.0} | other


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two rounds of SPO under way; the second's line was cut, then its training ended."""
    settings = {"name": "demo", "method": "spo", "scorer": "s", "batch_size": 8}
    save_config(parse_config(settings), tmp_path / "config.yaml")
    rows = [_row(0, kept=40), _row(1, kept=1), _row(1, kept=12, seconds_training=None)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"round": 2, "pai')
    line = {"loss": 0.7, "ratio_winner": 1.01, "ratio_loser": 0.99, "ratio_clipped": 0.125, "accuracy": 0.5}
    rows = [{"step": step, "round": 0, **line, "pairs_kept": 40, "grad_norm": 1.0, "lr": 1e-3} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in (0, 1):
        _write_pool(tmp_path, number)
    return tmp_path


def _colours(image: Image.Image) -> dict[Any, int]:
    return {colour: count for count, colour in image.getcolors(image.width * image.height) or []}


def _sheet(**marks: Any) -> Image.Image:
    images = [Image.new("RGB", (32, 32), GREY)] * 3
    column = PoolColumn("t = 1", images, **{"winner": None, "loser": None, "chosen": None, "kept": True} | marks)
    return pool_sheet([column], "cat")


def test_the_winner_has_its_colour_around_it_and_the_loser_its_own() -> None:
    page = np.asarray(_sheet(winner=2, loser=0)).astype(int)
    grey = np.argwhere((page == GREY).all(-1))
    left, right = grey[:, 1].min(), grey[:, 1].max()
    assert right - left == 255, "a whole factor of 32 pixels"
    rows = np.flatnonzero((page[:, (left + right) // 2] == GREY).all(-1))
    starts = [int(rows[0]), *(int(b) for a, b in pairwise(rows) if b > a + 1)]
    assert len(starts) == 3
    for start, colour in zip(starts, (LOSER, None, WINNER), strict=True):
        frame = page[start + 128, left - 3], page[start + 128, right + 3], page[start + 258, left + 128]
        for pixel in frame:
            assert tuple(pixel) == colour if colour else tuple(pixel) not in (WINNER, LOSER)
    # Triangles: the winner's narrows upwards, the loser's downwards.
    for start, upper_is_narrower in ((starts[2], True), (starts[0], False)):
        badge = (page[start - 8 : start + 22, left - 8 : left + 22] == 255).all(-1)
        upper, lower = badge[9:13].sum(), badge[17:21].sum()
        assert min(upper, lower) > 0 and (upper < lower) == upper_is_narrower


def test_what_is_not_kept_fades_to_paper_and_the_dot_does_not() -> None:
    kept, dropped = (_colours(_sheet(winner=1, chosen=0, kept=kept)) for kept in (True, False))
    faded = tuple(round(c + (255 - c) * PALE) for c in WINNER)
    assert max(abs(a - b) for a, b in zip(faded, min(dropped, key=lambda c: math.dist(c, faded)), strict=True)) <= 1
    assert dropped.get(GREY, 0) == 0 < kept[GREY]
    without = _colours(_sheet(winner=1, kept=False))
    ink = (32, 33, 36)
    assert dropped[ink] - without[ink] > 200


def test_bands_hold_at_most_so_many_steps() -> None:
    columns = [PoolColumn(f"t = {t}", [Image.new("RGB", (8, 8), GREY)] * 2, 0, 1, 0, True) for t in range(20)]
    one, two = pool_sheet(columns[:COLUMNS], "cat"), pool_sheet(columns, "cat")
    assert two.width < one.width and two.height > 1.5 * one.height
    assert _colours(two)[GREY] == 20 * 2 * (128**2 - 22**2), "all but the corner of each badge"


def test_extremes() -> None:
    assert [extremes(row) for row in SCORES] == [(1, 3), (None, None), (None, None)]


def test_the_latents_are_decoded_in_their_places(run: Path, decoder: LatentDecoder) -> None:
    ((pool, picture), _), reason = draw_pools(run, "emoji")
    assert (pool.prompt, pool.timesteps, reason) == ("red <b>heart 0", TIMESTEPS, "")
    assert picture == run / "samples" / "pools" / "round-00000.png"
    page = np.asarray(Image.open(picture)).astype(int)
    pixels = decoder.images(pool.latents[0, :1])[0].add(1).mul(127.5).round().clamp(0, 255).byte()
    tile = pixels.permute(1, 2, 0).numpy().repeat(256 // pixels.shape[-1], 0).repeat(256 // pixels.shape[-1], 1)
    # The first candidate of the first step is unmarked: its tile is whole, right of the margin and the frame.
    top = next(y for y in range(page.shape[0] - 256) if np.abs(page[y : y + 256, 36:292] - tile).max() <= 1)
    assert np.abs(page[top : top + 256, 36:292] - tile).max() <= 1
    second = page[top + 256 + 30 + 128, 28 + 3]
    assert tuple(second) == WINNER and tuple(page[top + 3 * 286 + 128, 28 + 3]) == LOSER


def test_drawn_only_where_missing_or_older(run: Path) -> None:
    first = [picture for _, picture in draw_pools(run, "emoji")[0]]
    first[0].write_bytes(b"mine")
    os.utime(first[1], ns=(0, 0))
    draw_pools(run, "emoji")
    assert first[0].read_bytes() == b"mine" and Image.open(first[1]).width > 500
    drawn, reason = draw_pools(run, "nowhere")
    assert len(drawn) == 2 and reason == ""
    first[0].unlink()
    drawn, reason = draw_pools(run, "nowhere")
    assert [pool.number for pool, _ in drawn] == [1] and "no such model folder" in reason


def test_many_candidates_and_many_steps_are_thinned_out(tmp_path: Path) -> None:
    scores = torch.zeros(50, 40)
    scores[:, 30], scores[:, 20] = 1.0, -1.0
    path = _write_pool(tmp_path, 0, scores, chosen=torch.full((50,), 35), latents=torch.zeros(50, 40, 4, 2, 2))
    assert read_pool(path).shown(7) == [0, 1, 2, 3, 4, 20, 30, 35] and MAX_ROWS == 8
    (_, picture), = draw_pools(tmp_path, "emoji")[0]  # fmt: skip
    found = _colours(Image.open(picture))
    band = MAX_COLUMNS // 2 * 158
    assert Image.open(picture).width == pytest.approx(band, abs=80)
    assert WINNER in found and LOSER in found


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ({"latents": torch.zeros(3, 5, 4, 8, 8)}, "do not fit together"),
        ({"kept": torch.zeros(2, dtype=torch.uint8)}, "do not fit together"),
        ({"chosen": torch.tensor([0, 1, 4])}, "out of bounds"),
        ({"latents": torch.zeros(3, 4, 5, 8, 8)}, "latents of 5 channels, the VAE takes 4"),
    ],
)
def test_pools_that_do_not_fit_are_one_line(tmp_path: Path, damage: dict[str, torch.Tensor], what: str) -> None:
    _write_pool(tmp_path, 0, **damage)
    with pytest.raises(UserError, match=what) as error:
        draw_pools(tmp_path, "emoji")
    assert "\n" not in str(error.value)


def test_damaged_files_are_one_line_and_missing_ones_nothing(tmp_path: Path) -> None:
    assert draw_pools(tmp_path, "emoji") == ([], "") and read_rounds(tmp_path) == []
    path = _write_pool(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot read the pools"):
        read_pool(path)
    (tmp_path / "rollouts.jsonl").write_text('{"round": 0}\n')
    with pytest.raises(UserError, match="round 0 lacks something: 'timesteps'"):
        read_rounds(tmp_path)
    (tmp_path / "rollouts.jsonl").write_text(json.dumps(_row(0, kept_share=[0.5])) + "\n")
    with pytest.raises(UserError, match="kept_share has 1 values for 3 timesteps"):
        read_rounds(tmp_path)
    (tmp_path / "rollouts.jsonl").write_text("x\n" + json.dumps(_row(0)) + "\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_rounds(tmp_path)


def test_latents_that_are_not_finite_are_drawn_as_zero(tmp_path: Path, decoder: LatentDecoder) -> None:
    _write_pool(tmp_path, 0, latents=torch.full((3, 4, 4, 8, 8), math.nan))
    (_, picture), = draw_pools(tmp_path, "emoji")[0]  # fmt: skip
    zero = decoder.images(torch.zeros(1, 4, 8, 8))[0].add(1).mul(127.5).round().clamp(0, 255).byte()
    page = np.asarray(Image.open(picture))
    assert tuple(zero[:, 5, 5].tolist()) in {tuple(map(int, pixel)) for pixel in page[200:280, 36:292].reshape(-1, 3)}


def test_rounds_of_a_killed_and_resumed_run(run: Path) -> None:
    rounds = read_rounds(run)
    assert [(r.number, r.pairs_kept) for r in rounds] == [(0, 40), (1, 12)], "the later line wins, the torn one is not"
    assert math.isnan(rounds[0].score_worst[2]) and rounds[0].gap_needed == pytest.approx([2 * math.atanh(0.3)] * 3)
    sums = totals(rounds)
    assert (sums["pools"], sums["pairs_kept"], sums["rollout_unet_forwards"]) == (96, 52, 2000)
    assert (sums["seconds_rollout"], sums["seconds_training"]) == (6.0, 5.0)


def _text(run: Path) -> str:
    html = write_report(run).read_text()
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL).split())


def test_the_report_shows_pools_rounds_and_their_cost(run: Path) -> None:
    text, html = _text(run), (run / "report.html").read_text()
    assert "52 of 96 pools, 54%, were kept and trained on, over 2 rounds" in text
    assert "Round 0: red &lt;b&gt;heart 0 before any training" in text
    assert "Round 1: red &lt;b&gt;heart 1 after 10 steps of training" in text
    assert html.count("data:image/") == 2 and "http" not in html
    assert "each column holds the 4 candidates" in text and "promise to become" in text
    assert "2 of 96 pools were dropped because a score of theirs was not finite" in text
    labels = re.findall(r'aria-label="([^:"]+): ([^"]*)"', html)
    assert [title for title, _ in labels] == [
        *("Scores by timestep", "Score gaps by timestep", "Pairs kept by timestep", "Pairs kept by round"),
        *("Loss", "Likelihood ratios", "Pairwise accuracy", "Ratios clipped", "Gradient norm", "Learning rate"),
    ]
    curves = dict(labels)
    assert curves["Scores by timestep"] == "best ends at 4, mean ends at 3, worst ends at 1"
    assert curves["Pairs kept by round"] == "kept ends at 0.25" and curves["Ratios clipped"].endswith("at 0.125")
    assert html.count("curve c earlier") == 3 and "solid: round 1; dashed: round 0" in text
    assert "rollouts 6 s" in text and "scoring 2 s" in text and "training on the pairs 5 s" in text
    assert "of which in the rollouts 2,000" in text


def test_the_summary_has_the_last_word_and_lpo_says_that_it_is_noisy(run: Path) -> None:
    save_config(parse_config({"method": "lpo", "scorer": "s"}), run / "config.yaml")
    stepwise = {"rounds": 7, "prompts": 112, "pools": 2000, "pairs_kept": 500, "pools_dropped_nan": 0}
    stepwise |= {"rollout_unet_forwards": 9000, "seconds_rollout": 61.0, "seconds_scoring": 2.0}
    summary = {"unet_forwards": 12000, "stepwise": {**stepwise, "seconds_training": 3.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    text = _text(run)
    assert "500 of 2,000 pools, 25%, were kept and trained on, over 7 rounds" in text
    assert "noisy as they were scored and decoded" in text
    assert "rollouts 1 min 1 s" in text and "UNet forwards 12,000 of which in the rollouts 9,000" in text


def test_pools_that_cannot_be_drawn_do_not_stop_the_report(run: Path) -> None:
    settings = {"method": "spo", "scorer": "s", "model": "models/gone"}
    save_config(parse_config(settings), run / "config.yaml")
    text = _text(run)
    assert re.search(r"Pools are not drawn: .*models/gone", text) and "Scores by timestep" in text
