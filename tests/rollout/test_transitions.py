"""Which pairs of the pools are kept, and which transitions they make."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fastpref.models.loading import load_noise_schedule
from fastpref.models.timesteps import denoising_steps
from fastpref.rollout.collect import gap_quantiles, round_figures
from fastpref.rollout.pool import Pool, PoolSampler
from fastpref.rollout.transitions import select, thresholds, transitions_of


@pytest.fixture(scope="module")
def sampler(sdxl: Path) -> PoolSampler:
    steps = denoising_steps(sdxl, 20)
    return PoolSampler(steps, load_noise_schedule(sdxl), 4, 20, 3, 2, 5.0, 1.0, 0)


def test_the_steps_are_those_of_the_papers(sampler: PoolSampler) -> None:
    assert [step.t for step in sampler.steps] == list(range(951, 0, -50))
    assert sampler.steps[-1].t_prev == 0 and sampler.steps[0].t_prev == 901
    assert list(sampler.segments) == [4, 8, 12, 16]
    assert sampler.score_timesteps == [551, 351, 151, 0]


def test_a_pair_is_kept_where_the_softmax_is_clear_enough() -> None:
    """p_w - p_l > θ over best and worst; 0.3 needs a gap of 0.619."""
    scores = torch.tensor([[0.0, 1.0, 0.4, 0.2], [0.0, 0.61, 0.3, 0.1], [0.63, 0.0, 0.3, 0.1], [2.0, 2.0, 2.0, 2.0]])
    found = select(scores, 0.3)
    two = torch.stack([scores.amax(1), scores.amin(1)], dim=1).double()
    clear = (two.softmax(dim=1)[:, 0] - two.softmax(dim=1)[:, 1]) > 0.3
    assert found.kept.tolist() == clear.tolist() == [True, False, True, False]
    assert found.winner[:3].tolist() == [1, 1, 0] and found.loser[:3].tolist() == [0, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_pool_with_a_score_that_is_no_number_is_dropped(bad: float) -> None:
    found = select(torch.tensor([[5.0, 0.0, bad], [5.0, 0.0, 1.0]]), 0.3)
    assert found.kept.tolist() == [False, True]
    assert found.gap.isnan().tolist() == [True, False]


def test_a_threshold_schedule_is_linear_in_sigma(sampler: PoolSampler) -> None:
    every = PoolSampler(sampler.steps, sampler.schedule, 0, 20, 0, 4, 5.0, 1.0, 0)
    theta, sigmas = thresholds(every, (0.35, 0.5), over_all_steps=False), [every.sigma(i) for i in range(20)]
    assert min(theta) == pytest.approx(0.35) and max(theta) == pytest.approx(0.5)
    slopes = [(theta[i] - 0.35) / (sigmas[i] - min(sigmas)) for i in range(20) if sigmas[i] != min(sigmas)]
    assert max(slopes) == pytest.approx(min(slopes))
    t, before = every.steps[0]
    alpha, alpha_before = every.schedule.alphas_cumprod[t], every.schedule.alphas_cumprod[before]
    assert sigmas[0] ** 2 == pytest.approx(float((1 - alpha_before) / (1 - alpha) * (1 - alpha / alpha_before)))
    assert thresholds(every, 0.3, over_all_steps=True) == [0.3] * 20


OFFICIAL_SIGMAS = [0.0206, 0.0406, 0.1673, 0.2144, 0.2509, 0.2836, 0.3144, 0.3442, 0.3732, 0.4016]
OFFICIAL_SIGMAS += [0.4293, 0.4565, 0.4829, 0.5087, 0.5336, 0.5576, 0.5807, 0.6029, 0.6241, 0.6444]


@pytest.mark.parametrize("theta", [(0.35, 0.5), (0.45, 0.6)])
@pytest.mark.parametrize("end", [20, 9])
def test_thresholds_over_all_steps_are_those_of_the_official_code(
    sampler: PoolSampler, theta: tuple[float, float], end: int
) -> None:
    """It reads σ, in four digits, from a table of t = 1, 51, …, 951 (Kwai-Kolors/LPO at 9c2e8b8, compare_funcs.py).

    So 5e-5 is the most by which σ differs, and (high - low)·5e-5·4 / (0.6444 - 0.0206) by which θ does.
    """
    cut = PoolSampler(sampler.steps, sampler.schedule, 0, end, 0, 4, 5.0, 1.0, 0)
    low, high = theta
    span = OFFICIAL_SIGMAS[-1] - OFFICIAL_SIGMAS[0]
    official = [
        (OFFICIAL_SIGMAS[step.t // 50] - OFFICIAL_SIGMAS[0]) / span * (high - low) + low for step in cut.steps[:end]
    ]
    found = thresholds(cut, theta, over_all_steps=True)
    assert found == pytest.approx(official, abs=(high - low) * 2e-4 / span)
    used = thresholds(cut, theta, over_all_steps=False)
    assert (used[0], used[-1]) == pytest.approx(theta[::-1])
    assert (used == pytest.approx(found)) == (end == 20)


def pool(n: int, k: int, length: int) -> Pool:
    start, paths = torch.randn(n, 4, 2, 2), torch.randn(n, k, length, 4, 2, 2)
    return Pool(8, start, paths, None, 351, torch.zeros(n, dtype=torch.int64))


def test_transitions_of_a_segment_are_a_chain(sampler: PoolSampler) -> None:
    """Inner steps: the first transition shares its state, each later one begins where the one before ended."""
    segment = pool(3, 2, 4)
    verdict = select(torch.tensor([[0.0, 9.0], [0.0, 0.0], [9.0, 0.0]]), 0.4)
    found = transitions_of(segment, verdict, torch.tensor([70, 71, 72]))
    assert found.prompt.tolist() == [70] * 4 + [72] * 4
    assert found.step.tolist() == [8, 9, 10, 11] * 2
    assert found.shared.tolist() == [True, False, False, False] * 2
    for row, (prompt, win, lose) in enumerate([(0, 1, 0), (2, 0, 1)]):
        rows = slice(4 * row, 4 * row + 4)
        assert torch.equal(found.x_w[rows], segment.paths[prompt, win])
        assert torch.equal(found.x_l[rows], segment.paths[prompt, lose])
        assert torch.equal(found.x_t[rows][0], segment.start[prompt])
        assert torch.equal(found.x_t_l[rows][0], segment.start[prompt])
        assert torch.equal(found.x_t[rows][1:], segment.paths[prompt, win, :-1])
        assert torch.equal(found.x_t_l[rows][1:], segment.paths[prompt, lose, :-1])


def test_figures_count_what_was_kept_and_dropped() -> None:
    scores = [
        torch.tensor([[0.0, 2.0], [0.0, 0.1], [math.nan, 1.0]]),
        torch.tensor([[4.0, 0.0], [1.0, 1.0], [0.0, 3.0]]),
    ]
    theta = [0.3, 0.3]
    steps = PoolSampler([], None, 0, 0, 0, 2, 5.0, 1.0, 0)  # type: ignore[arg-type]
    figures = round_figures(steps, theta, [select(rows, 0.3) for rows in scores])
    assert (figures["pools"], figures["pairs_kept"], figures["pools_dropped_nan"]) == (6, 3, 1)
    assert figures["kept_share"] == pytest.approx([1 / 3, 2 / 3])
    assert figures["score_best"] == pytest.approx([1.05, 8 / 3])
    assert figures["gap_median"] == pytest.approx([0.1, 3.0])
    assert figures["gap_quantiles"]["1.0"] == 4.0


def test_quantiles_of_nothing_are_none() -> None:
    assert set(gap_quantiles(torch.tensor([math.nan])).values()) == {None}
