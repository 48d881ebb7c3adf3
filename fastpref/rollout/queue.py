"""Scoring off the critical path: the rollout hands over candidates and goes on; the scores are there in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.rollout.scoring import StepScorer

Progress = Callable[[int, int], None]  # (rows scored, rows in all)


class _Submission(NamedTuple):
    latents: Tensor
    x0: Tensor | None
    t: int
    prompts: list[str]


class ScoringQueue:
    """Scores candidates without making the rollout wait.

    Candidates on a GPU are scored on a second stream, beside the rollout's own kernels; elsewhere the inputs are kept
    and scored in :meth:`results`, those of one timestep together. Submitted tensors must not be changed in place.

    Args:
        chunk: candidates the scorer is given at once.
        on_progress: called after every chunk that is scored in :meth:`results`; what it raises ends that.
    """

    def __init__(self, scorer: StepScorer, *, chunk: int = 32, on_progress: Progress | None = None) -> None:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}, must be >= 1")
        self.scorer, self.chunk, self.on_progress = scorer, chunk, on_progress
        self._stream: torch.cuda.Stream | None = None
        self._waiting: list[_Submission] = []
        self._scored: list[Tensor] = []

    def submit(self, latents: Tensor, x0: Tensor | None, t: int, prompts: Sequence[str]) -> None:
        """Hand over n candidates; the arguments are those of :meth:`StepScorer.score`."""
        submission = _Submission(latents, x0, t, list(prompts))
        if not latents.is_cuda:
            self._waiting.append(submission)
            return
        self._stream = self._stream or torch.cuda.Stream(latents.device)
        self._stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(self._stream):
            parts = [self._score(part) for part in _chunks([submission], self.chunk)]
        for tensor in (latents, x0):
            if tensor is not None:
                tensor.record_stream(self._stream)  # its memory is not given away before it was read there
        self._scored.append(torch.cat([torch.empty(0, dtype=torch.float64, device=latents.device), *parts]))

    def results(self) -> list[Tensor]:
        """The scores (n,), fp64 on the CPU, of every submission in its turn; the queue is empty afterwards."""
        if self._stream is not None:
            self._stream.synchronize()
            scored, self._scored = [scores.cpu() for scores in self._scored], []
            return scored
        waiting, self._waiting = self._waiting, []
        total, done = sum(len(submission.latents) for submission in waiting), 0
        results = [torch.empty(0)] * len(waiting)
        for t in dict.fromkeys(submission.t for submission in waiting):
            places = [place for place, submission in enumerate(waiting) if submission.t == t]
            group = [waiting[place] for place in places]
            parts = [torch.empty(0, dtype=torch.float64)]
            for part in _chunks(group, self.chunk):
                parts.append(self._score(part).cpu())
                done += len(part.latents)
                if self.on_progress is not None:
                    self.on_progress(done, total)
            sizes = [len(submission.latents) for submission in group]
            for place, scores in zip(places, torch.cat(parts).split(sizes), strict=True):
                results[place] = scores
        return results

    def _score(self, part: _Submission) -> Tensor:
        return self.scorer.score(part.latents, part.x0, part.t, part.prompts).double()


def _chunks(group: list[_Submission], size: int) -> Iterator[_Submission]:
    """Submissions of one timestep, joined and cut into at most ``size`` candidates; only a chunk is ever copied."""
    ends = [0]
    for submission in group:
        ends.append(ends[-1] + len(submission.latents))
    for start in range(0, ends[-1], size):
        stop = min(start + size, ends[-1])
        pieces = []
        for submission, first, last in zip(group, ends[:-1], ends[1:], strict=True):
            low, high = max(start, first) - first, min(stop, last) - first
            if low < high:
                pieces.append((submission, slice(low, high)))
        yield _join(pieces)


def _join(pieces: list[tuple[_Submission, slice]]) -> _Submission:
    def joined(tensors: list[Tensor]) -> Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    x0 = [submission.x0[rows] for submission, rows in pieces if submission.x0 is not None]
    return _Submission(
        joined([submission.latents[rows] for submission, rows in pieces]),
        joined(x0) if x0 else None,
        pieces[0][0].t,
        [prompt for submission, rows in pieces for prompt in submission.prompts[rows]],
    )
