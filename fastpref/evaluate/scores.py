"""Scores of pictures before and after training: medians, win rates and their bootstrap intervals, paired.

A pair is the picture before and the picture after, drawn for the same prompt from the same seed. Pairs of one prompt
are alike, so the bootstrap draws prompts, each with all its seeds (Davison & Hinkley 1997, section 3.8: clusters).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from fastpref.atomic import make_directory, write_bytes
from fastpref.config import parse_config
from fastpref.data.images import ImageError, load_rgb
from fastpref.errors import UserError

if TYPE_CHECKING:
    import torch

Key = tuple[str, int]  # prompt, seed
Interval = tuple[float, float]


class Scorer(Protocol):
    """Rates pictures; higher is better."""

    name: str

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """``(N,)`` fp32 on the CPU for N RGB pictures and their prompts; row i depends on row i only."""


@dataclass(frozen=True)
class ScoreRow:
    """One scorer's verdict on ``n`` pairs of ``prompts`` prompts; intervals are of 95 %, bootstrap over prompts."""

    scorer: str
    n: int
    prompts: int
    median_before: float
    median_after: float
    mean_before: float
    mean_after: float
    mean_difference: float
    mean_difference_low: float
    mean_difference_high: float
    win_rate: float
    win_rate_low: float
    win_rate_high: float


@dataclass(frozen=True)
class ScoreTable:
    """Rows, and what they were computed from: ``before[name]``, ``after[name]`` ``(n,)`` float64 along ``keys``."""

    rows: list[ScoreRow]
    keys: list[Key]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


def compare(
    before: Mapping[Key, Path],
    after: Mapping[Key, Path],
    scorers: Sequence[Scorer],
    *,
    batch_size: int = 8,
    resamples: int = 10_000,
    seed: int = 0,
) -> ScoreTable:
    """Score the pictures that both sides have of the same prompt and seed.

    Args:
        before, after: (prompt, seed) to picture file.
        resamples, seed: of the bootstrap; the same call gives the same table.

    Raises:
        UserError: no common prompt and seed, a picture that cannot be read, a score that is not finite, or two scorers
            of one name.
    """
    keys = sorted(before.keys() & after.keys())
    if not keys:
        raise UserError("no prompt and seed is on both sides", "", "sample the same prompts and seeds twice")
    names = [scorer.name for scorer in scorers]
    if not names or len(set(names)) < len(names):
        raise UserError("give at least one scorer and each once", ", ".join(names))
    scored = [{s.name: _score_all(s, side, keys, batch_size) for s in scorers} for side in (before, after)]
    groups = [prompt for prompt, _ in keys]
    rows = [summarise(name, scored[0][name], scored[1][name], groups, resamples=resamples, seed=seed) for name in names]
    return ScoreTable(rows, keys, *scored)


def summarise(
    name: str, before: np.ndarray, after: np.ndarray, groups: Sequence[str], *, resamples: int, seed: int
) -> ScoreRow:
    """The row of one scorer from paired scores ``(n,)``; ``groups[i]`` is the prompt of pair i."""
    difference = after - before
    wins = win_values(before, after)
    low, high = bootstrap_intervals(np.stack([difference, wins]), groups, resamples=resamples, seed=seed)
    return ScoreRow(
        scorer=name,
        n=len(before),
        prompts=len(set(groups)),
        median_before=float(np.median(before)),
        median_after=float(np.median(after)),
        mean_before=float(before.mean()),
        mean_after=float(after.mean()),
        mean_difference=float(difference.mean()),
        mean_difference_low=float(low[0]),
        mean_difference_high=float(high[0]),
        win_rate=float(wins.mean()),
        win_rate_low=float(low[1]),
        win_rate_high=float(high[1]),
    )


def win_values(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """1 where after is above before, 0 where below, a half where they tie."""
    return (1.0 + np.sign(after - before)) / 2.0


def bootstrap_intervals(
    values: np.ndarray, groups: Sequence[str], *, resamples: int, seed: int, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals of the means of K statistics over the same n pairs.

    Whole groups are drawn with replacement, as many as there are; with a single group its pairs are drawn instead.

    Args:
        values: ``(K, n)``. groups: length n.

    Returns:
        ``(K,)`` lower and ``(K,)`` upper ends, float64.
    """
    labels = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    if labels.max() == 0:
        labels = np.arange(values.shape[1])
    count = int(labels.max()) + 1
    sizes = np.bincount(labels, minlength=count).astype(float)
    sums = np.stack([np.bincount(labels, weights=row, minlength=count) for row in values])
    rng = np.random.default_rng(seed)
    means = np.empty((len(values), resamples))
    chunk = max(1, 2_000_000 // count)
    for start in range(0, resamples, chunk):
        drawn = rng.integers(count, size=(min(chunk, resamples - start), count))
        means[:, start : start + len(drawn)] = sums[:, drawn].sum(-1) / sizes[drawn].sum(-1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=1)
    return low, high


def read_pictures(folder: Path, prompts: Sequence[str] | None = None) -> dict[Key, Path]:
    """(prompt, seed) to file of a ``samples/<tag>`` folder, with ``prompts`` only those of the set.

    Raises:
        UserError: no pictures there, a damaged index, or a prompt of the set without a picture.
    """
    from fastpref.evaluate.runner import read_index

    pictures = read_index(folder)
    if not pictures:
        raise UserError(
            "no pictures there", str(folder), "run fastpref evaluate RUN, which writes samples/before, /after"
        )
    if prompts is None:
        return pictures
    wanted = set(prompts)
    lacking = sorted(wanted - {prompt for prompt, _ in pictures})
    if lacking:
        what = f"{len(lacking)} of {len(wanted)} prompts have no picture, e.g. {lacking[0][:60]!r}"
        raise UserError(what, str(folder), "sample the prompt set first")
    return {key: file for key, file in pictures.items() if key[0] in wanted}


def run_scores(
    baseline: Path,
    candidate: Path,
    specs: Sequence[str],
    out_dir: Path,
    *,
    prompts: str | None = None,
    device: str = "auto",
    **options: Any,
) -> ScoreTable:
    """Compare two folders of pictures and write ``scores.csv``, ``score_pairs.csv`` and ``scores.png``.

    Args:
        baseline, candidate: ``samples/<tag>`` folders, e.g. of one run or of two.
        specs: as of :func:`fastpref.evaluate.scorers.load_scorer`.
        prompts: file of the prompt set, as of :func:`fastpref.data.records.read_captions`; default all prompts.
        device: auto, cpu or cuda. options: ``batch_size``, ``resamples``, ``seed`` of :func:`compare`.
    """
    from fastpref.data.records import read_captions
    from fastpref.evaluate.scorers import load_scorer
    from fastpref.models.loading import resolve_device

    wanted = None if prompts is None else read_captions(prompts)
    before, after = read_pictures(baseline, wanted), read_pictures(candidate, wanted)
    on = str(resolve_device(device))
    table = compare(before, after, [load_scorer(spec, on) for spec in specs], **options)
    write_scores(table, out_dir)
    return table


def write_scores(table: ScoreTable, out_dir: Path) -> list[Path]:
    """``scores.csv`` (a row a scorer), ``score_pairs.csv`` (a row a pair and scorer) and the plot ``scores.png``."""
    make_directory(out_dir)
    header = [field.name for field in fields(ScoreRow)]
    pairs = [
        [name, prompt, seed, repr(float(before)), repr(float(after))]
        for name in table.before
        for (prompt, seed), before, after in zip(table.keys, table.before[name], table.after[name], strict=True)
    ]
    files = {
        "scores.csv": _csv(header, [list(asdict(row).values()) for row in table.rows]),
        "score_pairs.csv": _csv(["scorer", "prompt", "seed", "before", "after"], pairs),
        "scores.png": _plot(table),
    }
    for name, data in files.items():
        write_bytes(out_dir / name, data)
    return [out_dir / name for name in files]


def _score_all(scorer: Scorer, files: Mapping[Key, Path], keys: Sequence[Key], batch_size: int) -> np.ndarray:
    scores = []
    for start in range(0, len(keys), batch_size):
        batch = list(keys[start : start + batch_size])
        rows = scorer.score([_read(files[key]) for key in batch], [prompt for prompt, _ in batch])
        scores.append(np.asarray(rows.double().cpu()))
        if not np.isfinite(scores[-1]).all():
            where = str(files[batch[int(np.argmin(np.isfinite(scores[-1])))]])
            raise UserError(f"{scorer.name} gives no finite score", where, "check the scorer's checkpoint")
    return np.concatenate(scores)


def _read(file: Path) -> Image.Image:
    try:
        return load_rgb(file.read_bytes(), parse_config({}).max_image_pixels)
    except (OSError, ImageError) as error:
        raise UserError("cannot read the picture", str(file), str(error)) from None


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue().encode()


def _plot(table: ScoreTable) -> bytes:
    """Win rates with their intervals on top, below a histogram of the paired differences of each scorer."""
    from matplotlib.figure import Figure

    rows = table.rows
    figure = Figure(figsize=(8, 1.4 + 0.35 * len(rows) + 2.4), layout="constrained")
    grid = figure.add_gridspec(2, len(rows), height_ratios=[1 + 0.35 * len(rows), 2.4])
    forest = figure.add_subplot(grid[0, :])
    for i, row in enumerate(rows):
        forest.plot([row.win_rate_low, row.win_rate_high], [i, i], color="C0", linewidth=2)
        forest.plot(row.win_rate, i, "o", color="C0")
        forest.annotate(f"{row.win_rate:.3f}", (row.win_rate, i), (0, 5), textcoords="offset points", ha="center")
    forest.axvline(0.5, color="grey", linewidth=1, linestyle="--")
    forest.set(yticks=range(len(rows)), yticklabels=[row.scorer for row in rows], xlim=(0, 1))
    forest.set(ylim=(len(rows) - 0.4, -0.8), xlabel="win rate of after, 95 % interval")
    for i, row in enumerate(rows):
        panel = figure.add_subplot(grid[1, i])
        difference = table.after[row.scorer] - table.before[row.scorer]
        panel.hist(difference, bins=min(30, max(5, row.n // 5)), color="C0")
        panel.axvline(0, color="grey", linewidth=1, linestyle="--")
        panel.set_title(row.scorer, fontsize=9)
        panel.set_xlabel("after − before", fontsize=8)
        panel.tick_params(labelsize=7)
        if i == 0:
            panel.set_ylabel("pairs", fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()
