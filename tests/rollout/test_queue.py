"""The scoring queue: nothing is scored while candidates are handed over, and chunks and order do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.rollout.queue import ScoringQueue


class Recorder:
    """Scores by row alone: mean of the latents, of x0, the timestep and the prompt's length."""

    def __init__(self, needs_x0: bool) -> None:
        self.needs_x0 = needs_x0
        self.calls: list[tuple[int, int]] = []

    def score(self, latents: Tensor, x0: Tensor | None, t: int, prompts: Sequence[str]) -> Tensor:
        assert (x0 is not None) == self.needs_x0 and len(prompts) == len(latents)
        self.calls.append((t, len(latents)))
        seen = latents.sum(dim=(1, 2, 3)) + (0 if x0 is None else 10 * x0.sum(dim=(1, 2, 3)))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=latents.device)
        return seen + 1000 * t + 100_000 * lengths


def submissions(needs_x0: bool, device: str = "cpu") -> list[tuple[Tensor, Tensor | None, int, list[str]]]:
    """Three batches of prompts that all pass the same timesteps, as a rollout hands them over."""
    g = torch.Generator().manual_seed(0)
    out = []
    for batch, n in enumerate((4, 3, 8)):
        for t in (951, 451, 0):
            latents, x0 = torch.randn(2, n, 2, 3, 3, generator=g).to(device)
            out.append((latents, x0 if needs_x0 else None, t, ["x" * (batch + row) for row in range(n)]))
    return out


def literal(submission: tuple[Any, ...]) -> Tensor:
    latents, x0, t, prompts = submission
    rows = [
        Recorder(x0 is not None).score(latents[i][None], None if x0 is None else x0[i][None], t, [prompts[i]])
        for i in range(len(latents))
    ]
    return torch.cat(rows).double().cpu()


@pytest.mark.parametrize("needs_x0", [True, False])
def test_nothing_is_scored_before_results_and_chunks_do_not_matter(needs_x0: bool) -> None:
    handed_over = submissions(needs_x0)
    for chunk in (1, 2, 5, 7, 100):
        scorer = Recorder(needs_x0)
        queue = ScoringQueue(scorer, chunk=chunk)
        for submission in handed_over:
            queue.submit(*submission)
        assert scorer.calls == [], "the rollout waited for a score"
        results = queue.results()
        assert [len(scores) for scores in results] == [4] * 3 + [3] * 3 + [8] * 3
        for scores, submission in zip(results, handed_over, strict=True):
            assert scores.dtype == torch.float64 and torch.equal(scores, literal(submission))
        assert max(rows for _, rows in scorer.calls) == min(chunk, 15)
        timesteps = [t for t, _ in scorer.calls]
        assert timesteps == sorted(timesteps, reverse=True), "one timestep after another"
        assert len(scorer.calls) == 3 * -(-15 // chunk), "submissions of a timestep share chunks"
        assert queue.results() == [], "the queue is empty afterwards"


def test_progress_is_told_after_every_chunk_and_may_end_it() -> None:
    told: list[tuple[int, int]] = []
    queue = ScoringQueue(Recorder(False), chunk=10, on_progress=lambda done, total: told.append((done, total)))
    for submission in submissions(False):
        queue.submit(*submission)
    queue.results()
    assert told == [(10, 45), (15, 45), (25, 45), (30, 45), (40, 45), (45, 45)]

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    scorer = Recorder(False)
    queue = ScoringQueue(scorer, chunk=10, on_progress=stop)
    for submission in submissions(False):
        queue.submit(*submission)
    with pytest.raises(Stop):
        queue.results()
    assert len(scorer.calls) == 1


def test_nan_is_a_score_like_any_other_and_no_candidates_are_none() -> None:
    queue = ScoringQueue(Recorder(False), chunk=2)
    latents = torch.ones(3, 1, 2, 2)
    latents[1] = float("nan")
    queue.submit(latents, None, 0, ["", "", ""])
    queue.submit(latents[:0], None, 7, [])
    first, second = queue.results()
    assert first.isnan().tolist() == [False, True, False] and first[0] == 4.0 and len(second) == 0
    with pytest.raises(ValueError, match="chunk is 0"):
        ScoringQueue(Recorder(False), chunk=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_scores_come_from_a_second_stream() -> None:
    streams = []

    class Watched(Recorder):
        def score(self, *arguments: Any) -> Tensor:
            streams.append(torch.cuda.current_stream())
            return super().score(*arguments)

    handed_over = submissions(True, "cuda")
    queue = ScoringQueue(Watched(True), chunk=3)
    for latents, x0, t, prompts in handed_over:
        queue.submit(latents.clone(), x0, t, prompts)  # the clone's memory is free again at once
    results = queue.results()
    assert all(torch.allclose(a, literal(b), rtol=1e-6) for a, b in zip(results, handed_over, strict=True))
    assert streams and all(stream != torch.cuda.current_stream() for stream in streams)
