"""How far pictures are from the target style: the Fréchet distance, with a floor and a start measured alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastpref.errors import UserError

if TYPE_CHECKING:
    from fastpref.evaluate.style import Encoded

_SPLITS = 16  # random splits of the captions that style_distance is averaged over
_MAX_ROUNDS = 16  # pictures of one caption that style_distance looks at
_MIN_CAPTIONS = 2


@dataclass(frozen=True)
class StyleDistances:
    """Three Fréchet distances measured alike; ``measured`` captions, one picture each, against ``against`` others."""

    pictures: float
    floor: float
    base: float
    measured: int
    against: int
    splits: int

    @property
    def left(self) -> float | None:
        """(pictures - floor) / (base - floor); None where the base is no farther than the floor."""
        return (self.pictures - self.floor) / (self.base - self.floor) if self.base > self.floor else None


def style_distances(pictures: Encoded, target: Encoded, base: Encoded) -> StyleDistances:
    """Distances of generated, real target-style and real base-style pictures of the same captions, comparable.

    Captions are split into measured ones, for which there are pictures, and others; the three sets hold one picture of
    each measured caption and are held against the real target-style images of the other captions, so that counts,
    captions, shrinkage and reference are the same and no picture meets the real image of its own caption. Where nearly
    all captions were sampled, half of them are measured, averaged over random splits; where a caption has several
    pictures, each is measured in turn and the distances are averaged.

    Raises:
        UserError: fewer than two captions on a side.
    """
    known = sorted(set(target.captions))
    asked = sorted(set(pictures.captions) & set(known) & set(base.captions))
    measured = min(len(asked), len(known) // 2)
    if measured < _MIN_CAPTIONS:
        what = f"{len(asked)} of {len(known)} captions of real images have pictures"
        raise UserError(what, "style_distance", f"at least {_MIN_CAPTIONS} are needed on either side")
    splits = 1 if measured == len(asked) else _SPLITS
    generator = torch.Generator().manual_seed(0)
    sides = [_by_caption(side) for side in (pictures, target, base)]
    totals = [0.0, 0.0, 0.0]
    for _ in range(splits):
        chosen = [asked[i] for i in torch.randperm(len(asked), generator=generator)[:measured].tolist()]
        held = set(chosen)
        other = [i for i, caption in enumerate(target.captions) if caption not in held]
        reference = target.features[other]
        for k, (side, rows) in enumerate(zip((pictures, target, base), sides, strict=True)):
            totals[k] += _mean_distance(side.features, [rows[caption] for caption in chosen], reference) / splits
    return StyleDistances(totals[0], totals[1], totals[2], measured, len(known) - measured, splits)


def _mean_distance(features: Tensor, rows: list[list[int]], reference: Tensor) -> float:
    """Mean over rounds; round k takes the k-th picture of every caption, from the first again where there are fewer."""
    rounds = min(_MAX_ROUNDS, max(len(own) for own in rows))
    draws = [[own[k % len(own)] for own in rows] for k in range(rounds)]
    return sum(frechet_distance(features[draw], reference, count=len(rows)) for draw in draws) / rounds


def _by_caption(encoded: Encoded) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for i, caption in enumerate(encoded.captions):
        rows.setdefault(caption, []).append(i)
    return rows


def frechet_distance(a: Tensor, b: Tensor, *, count: int | None = None) -> float:
    """Fréchet distance of two sets of features ``(N, F)`` and ``(M, F)``, float64, with shrunk covariances.

    A covariance of fewer samples than features is singular, and the plain distance then measures sampling noise. Both
    are shrunk towards their diagonals, ``C ← (1 - λ) C + λ diag(C)`` with ``λ = F / (F + count)``: which vanishes for
    many samples, keeps every variance, and is the same on both sides.

    Args:
        count: the number of samples λ is computed from; default: the smaller set's.

    Raises:
        UserError: fewer than two rows on a side.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"{min(len(a), len(b))} picture", "style_distance", "needs at least two on each side")
    width = a.shape[1]
    shrinkage = width / (width + (count or min(len(a), len(b))))
    mean_a, cov_a = _moments(a.double(), shrinkage)
    mean_b, cov_b = _moments(b.double(), shrinkage)
    root = _symmetric_root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _moments(features: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    covariance = torch.cov(features.T).reshape(features.shape[1], features.shape[1])
    return features.mean(dim=0), torch.lerp(covariance, torch.diag(covariance.diag()), shrinkage)


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
