"""Aspect-ratio buckets: rectangles of (nearly) one area, as in SDXL's training (arXiv 2307.01952, appendix I)."""

from __future__ import annotations

import numpy as np

from fastpref.errors import UserError

MAX_ASPECT = 4.0
Size = tuple[int, int]  # width, height in pixels


def bucket_granularity(resolution: int, vae_scale_factor: int, unet_downsampling: int) -> int:
    """Pixels that every side is a multiple of: eight latent pixels, or what the UNet needs for small pictures."""
    coarse = 8 * vae_scale_factor
    return coarse if resolution >= 8 * coarse else vae_scale_factor * unet_downsampling


def make_buckets(resolution: int, granularity: int) -> list[Size]:
    """All ``(width, height)`` buckets, narrowest first.

    For every short side that is a multiple of ``granularity`` the long side is the longest multiple that keeps the area
    within ``resolution``²; sides differ by a factor of at most 4. At 1024 and 64: 512×2048, … 1024×1024, … 2048×512.

    Raises:
        UserError: ``resolution`` is no multiple of ``granularity``.
    """
    if resolution % granularity:
        raise UserError(
            f"resolution is {resolution}, must be a multiple of {granularity} with buckets",
            "resolution",
            "or buckets=false",
        )
    portrait = []
    for short in range(granularity, resolution + 1, granularity):
        long = resolution * resolution // short // granularity * granularity
        if long <= MAX_ASPECT * short:
            portrait.append((short, long))
    return portrait + [(long, short) for short, long in reversed(portrait) if short != long]


def choose_buckets(buckets: list[Size], sizes_w: np.ndarray, sizes_l: np.ndarray) -> np.ndarray:
    """The bucket of each pair: the one nearest, in log aspect ratio, to the geometric mean of its two pictures.

    Args:
        buckets: ``(width, height)`` each.
        sizes_w, sizes_l: ``(n, 2)`` width and height of winners and losers.

    Returns:
        ``(n,)`` int16 positions in ``buckets``.
    """
    wanted = (_log_aspect(sizes_w) + _log_aspect(sizes_l)) / 2
    offered = _log_aspect(np.asarray(buckets))
    chosen = np.empty(len(wanted), dtype=np.int16)
    for start in range(0, len(wanted), 65536):
        part = slice(start, start + 65536)
        chosen[part] = np.abs(wanted[part, None] - offered[None]).argmin(axis=1)
    return chosen


def _log_aspect(sizes: np.ndarray) -> np.ndarray:
    sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
    return np.log(sizes[:, 0] / sizes[:, 1])
