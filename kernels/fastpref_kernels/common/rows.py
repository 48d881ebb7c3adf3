"""Parts of the torch paths of several ops: how rows are cut and added up."""

from __future__ import annotations

from torch import Tensor


def row_chunks(n_rows: int, n_elements: int, chunk: int) -> list[slice]:
    """Slices of rows, of about `chunk` elements each, so that temporaries stay in the L2 cache."""
    step = max(1, chunk // n_elements)
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def sum_rows(x: Tensor) -> Tensor:
    """Sum of the last dimension by halving; overwrites x."""
    length = x.shape[-1]
    while length > 1:
        half = length // 2
        x[..., :half] += x[..., half : 2 * half]
        if length % 2:
            x[..., 0] += x[..., length - 1]
        length = half
    return x[..., 0]


def share_won(winner: Tensor, loser: Tensor) -> Tensor:
    """Share of rows where the winner's number is higher; a row of equal ones counts a half, one with NaN nothing."""
    return ((winner > loser).to(winner.dtype) + 0.5 * (winner == loser).to(winner.dtype)).mean()
