"""Style Alignment (Diffusion-RPO, arXiv 2406.06382): did the pictures take on the target style and keep their content?

* ``style_share``: share of pictures that the style classifier takes for the target style.
* ``style_distance``: Fréchet distance (arXiv 1706.08500, equation 6) between the pictures and real target-style
  images of other captions in the style encoder's features:  |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½).  The distance of
  few pictures is biased upwards, so its ``floor`` and ``base_distance`` are measured in just the same way: the real
  target-style and base-style images of the same captions, as many of them, against the same other real images.
* ``prompt_retrieval``: each picture looks for its caption among the real images of its own style, by CLIP image
  embedding, so that line art is not punished for being line art.

All arithmetic after the encoders is float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL.Image import Image
from torch import Tensor

from fastpref.errors import UserError
from fastpref.evaluate.distance import style_distances
from fastpref.evaluate.sheets import to_batch

TOP_K = (1, 5)
_ENCODER_BATCH, _ENCODER_PIXELS = 64, 1 << 21  # pictures at once, and no more than so many pixels


class StyleOutput(Protocol):
    """What a style encoder says about N pictures."""

    @property
    def features(self) -> Tensor:
        """``(N, F)``."""

    @property
    def style_logits(self) -> Tensor:
        """``(N, styles)``."""


class StyleEncoder(Protocol):
    """Pictures ``(N, 3, H, W)`` in [0, 1] to features and style logits."""

    def __call__(self, images: Tensor) -> StyleOutput:
        """See the class."""


class ImageEmbedder(Protocol):
    """A CLIP's image side: RGB pictures to unit rows ``(N, E)``."""

    def images(self, images: list[Image]) -> Tensor:
        """See the class."""


@dataclass(frozen=True)
class Encoded:
    """Pictures as the measures see them: captions, features ``(N, F)``, styles ``(N,)``, embeddings ``(N, E)``."""

    captions: list[str]
    features: Tensor
    styles: Tensor
    embeddings: Tensor


@dataclass(frozen=True)
class RealPool:
    """The real images of the evaluation records: for each caption one in the target style and one in the base style."""

    target: Encoded
    base: Encoded
    target_style: int

    @property
    def base_style(self) -> int:
        """Index of the style logit most base-style images go to."""
        return _majority(self.base.styles)


def encode(images: Iterable[tuple[Image, str]], style: StyleEncoder, clip: ImageEmbedder) -> Encoded:
    """Run both encoders over (picture, caption) pairs, in batches; pictures are of one size and never all in memory."""
    captions: list[str] = []
    features, styles, embeddings = [], [], []
    for batch in _batches(images):
        with torch.no_grad():
            output = style(to_batch([image for image, _ in batch]))
        captions += [caption for _, caption in batch]
        features.append(output.features.double().cpu())
        styles.append(output.style_logits.argmax(dim=-1).cpu())
        embeddings.append(clip.images([image for image, _ in batch]).double())
    if not captions:
        raise UserError("no pictures to measure", "evaluate", "check the evaluation records")
    return Encoded(captions, torch.cat(features), torch.cat(styles), torch.cat(embeddings))


def _batches(images: Iterable[tuple[Image, str]]) -> Iterator[list[tuple[Image, str]]]:
    batch: list[tuple[Image, str]] = []
    for image, caption in images:
        batch.append((image, caption))
        if len(batch) * image.width * image.height >= _ENCODER_PIXELS or len(batch) == _ENCODER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def make_pool(target: Encoded, base: Encoded) -> RealPool:
    """The pool of the evaluation records' winners and losers.

    Raises:
        UserError: the style encoder takes both for the same style, so no share or distance would mean anything.
    """
    target_style = _majority(target.styles)
    if target_style == _majority(base.styles):
        raise UserError(
            "the style encoder takes winners and losers of the evaluation records for one style",
            "evaluate",
            "use an encoder trained to tell these styles apart",
        )
    return RealPool(target, base, target_style)


def evaluate_style(pictures: Encoded, pool: RealPool) -> dict[str, Any]:
    """The three measures of generated pictures, and under ``details`` what to hold them against.

    Returns:
        ``style_share`` in [0, 1], ``style_distance`` ≥ 0, ``prompt_retrieval: {top1, top5}`` in [0, 1], and
        ``details``: ``floor`` and ``base_distance`` (what real target-style and base-style images of the prompts get
        for a ``style_distance``), ``distance_left`` (the share of the way from the base to the floor that is still to
        go; below 0 where the pictures came out below the floor), ``distance_counts`` (captions measured and held
        against in each of the ``splits``), ``ceiling`` (retrieval by the real target-style images), ``cross_style``
        (retrieval by the real image in the other style), ``chance``, ``real_style_accuracy``, ``pictures``,
        ``prompts``, ``pool``.
    """
    prompts = set(pictures.captions)
    own = [i for i, caption in enumerate(pool.target.captions) if caption in prompts]
    asked = _rows(pool.target, own)
    correct = torch.cat([pool.target.styles == pool.target_style, pool.base.styles == pool.base_style])
    gallery = len(set(pool.target.captions))
    found = retrieval(pictures, pool)
    distance = style_distances(pictures, pool.target, pool.base)
    return {
        "style_share": float((pictures.styles == pool.target_style).double().mean()),
        "style_distance": distance.pictures,
        "prompt_retrieval": found,
        "details": {
            "pictures": len(pictures.captions),
            "prompts": len(prompts),
            "pool": len(pool.target.captions),
            "floor": distance.floor,
            "base_distance": distance.base,
            "distance_left": distance.left,
            "distance_counts": {"measured": distance.measured, "against": distance.against, "splits": distance.splits},
            "ceiling": retrieval(asked, pool),
            "cross_style": retrieval(asked, pool, other_style=True),
            "chance": {f"top{k}": min(1.0, k / gallery) for k in TOP_K},
            "real_style_accuracy": float(correct.double().mean()),
        },
    }


def retrieval(queries: Encoded, pool: RealPool, *, other_style: bool = False) -> dict[str, float]:
    """Share of queries whose own caption's real image is among the k nearest of its style; ties count against it.

    Args:
        queries: pictures; each must have its caption in the pool.
        other_style: search the gallery of the style that the query is not.

    Raises:
        UserError: a caption without a real image.
    """
    known = set(pool.target.captions)
    missing = [caption for caption in queries.captions if caption not in known]
    if missing:
        raise UserError(
            f"no real image of '{missing[0]}'", "prompt_retrieval", "sample captions of the evaluation records"
        )
    use_target = (queries.styles == pool.target_style) != other_style
    hits = torch.empty(len(queries.captions), dtype=torch.long)
    for gallery, rows in ((pool.target, use_target), (pool.base, ~use_target)):
        index = rows.nonzero().flatten()
        if len(index):
            captions = [queries.captions[i] for i in index.tolist()]
            hits[index] = _ranks(queries.embeddings[index], captions, gallery)
    return {f"top{k}": float((hits < k).double().mean()) for k in TOP_K}


def _ranks(embeddings: Tensor, captions: list[str], gallery: Encoded) -> Tensor:
    """How many other captions have an image at least as near as the own caption's nearest."""
    names = {caption: i for i, caption in enumerate(dict.fromkeys(gallery.captions))}
    columns = torch.tensor([names[caption] for caption in gallery.captions])
    similarity = embeddings @ gallery.embeddings.T
    nearest = torch.full((len(embeddings), len(names)), -torch.inf, dtype=similarity.dtype)
    nearest = nearest.scatter_reduce(1, columns.expand(len(embeddings), -1), similarity, reduce="amax")
    own = torch.tensor([names[caption] for caption in captions])
    best = nearest.gather(1, own[:, None])
    return (nearest >= best).sum(dim=1) - 1


def _majority(styles: Tensor) -> int:
    return int(torch.bincount(styles).argmax())


def _rows(encoded: Encoded, index: list[int]) -> Encoded:
    captions = [encoded.captions[i] for i in index]
    return Encoded(captions, encoded.features[index], encoded.styles[index], encoded.embeddings[index])
