"""Each measure has the value it must have where that is known, and moves the way it must when pictures get worse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from fastpref.errors import UserError
from fastpref.evaluate.distance import frechet_distance, style_distances
from fastpref.evaluate.style import Encoded, RealPool, encode, evaluate_style, make_pool, retrieval

SIZE, CONCEPTS, FLAT, LINE = 16, 24, 0, 1


@dataclass
class Output:
    features: torch.Tensor
    style_logits: torch.Tensor


class FakeStyle:
    """Line art is grey: the style is the saturation; features are saturation, brightness and coarse pixels."""

    def __call__(self, images: torch.Tensor) -> Output:
        saturation = (images.amax(1) - images.amin(1)).mean((1, 2))
        coarse = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)
        features = torch.cat([10 * saturation[:, None], coarse], dim=1)
        return Output(features, torch.stack([saturation - 0.05, 0.05 - saturation], dim=1))


class FakeClip:
    """Sees grey levels only."""

    def images(self, images: list[Image.Image]) -> torch.Tensor:
        rows = np.stack([np.asarray(image.convert("L"), dtype=np.float32).ravel() for image in images])
        rows -= rows.mean(axis=1, keepdims=True)
        return torch.nn.functional.normalize(torch.from_numpy(rows), dim=-1)


def _world() -> tuple[list[str], list[Image.Image], list[Image.Image]]:
    """Captions, line art and flat colour of the same shapes."""
    rng = np.random.default_rng(0)
    captions = [f"thing {i}" for i in range(CONCEPTS)]
    shapes = rng.random((CONCEPTS, SIZE, SIZE, 1)).repeat(3, axis=3)
    colour = shapes * np.stack([rng.permutation([1.0, 0.6, 0.2]) for _ in captions])[:, None, None]
    return captions, [_image(shape) for shape in shapes], [_image(shape) for shape in colour]


def _image(array: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(array, 0, 1) * 255).astype(np.uint8))


def _encode(images: list[Image.Image], captions: list[str]) -> Encoded:
    return encode(zip(images, captions, strict=True), FakeStyle(), FakeClip())


@pytest.fixture(scope="module")
def pool() -> RealPool:
    captions, line, flat = _world()
    return make_pool(_encode(line, captions), _encode(flat, captions))


def test_real_target_images_are_perfect(pool: RealPool) -> None:
    captions, line, _ = _world()
    result = evaluate_style(_encode(line, captions), pool)
    assert list(result) == ["style_share", "style_distance", "prompt_retrieval", "details"]
    assert result["style_share"] == 1.0
    assert result["prompt_retrieval"] == {"top1": 1.0, "top5": 1.0}
    details = result["details"]
    assert details["ceiling"] == {"top1": 1.0, "top5": 1.0}
    assert details["cross_style"]["top1"] > 0.9
    assert details["chance"] == {"top1": 1 / CONCEPTS, "top5": 5 / CONCEPTS}
    assert details["real_style_accuracy"] == 1.0
    assert 0 < details["floor"] < details["base_distance"]
    assert result["style_distance"] == pytest.approx(details["floor"], rel=1e-12)
    assert details["distance_left"] == pytest.approx(0, abs=1e-12)
    assert details["distance_counts"] == {"measured": CONCEPTS // 2, "against": CONCEPTS // 2, "splits": 16}


def test_the_wrong_style_moves_style_and_leaves_content(pool: RealPool) -> None:
    captions, line, flat = _world()
    mixed = evaluate_style(_encode(flat[:12] + line[12:], captions), pool)
    wrong = evaluate_style(_encode(flat, captions), pool)
    assert (mixed["style_share"], wrong["style_share"]) == (0.5, 0.0)
    base = wrong["details"]["base_distance"]
    assert mixed["details"]["floor"] < mixed["style_distance"] < wrong["style_distance"] == pytest.approx(base)
    assert wrong["details"]["distance_left"] == pytest.approx(1)
    assert wrong["prompt_retrieval"] == {"top1": 1.0, "top5": 1.0}


def test_shuffled_captions_lose_the_content_only(pool: RealPool) -> None:
    captions, line, _ = _world()
    result = evaluate_style(_encode(line, captions[7:] + captions[:7]), pool)
    assert result["prompt_retrieval"]["top1"] == 0.0
    assert result["prompt_retrieval"]["top5"] < 0.6
    assert result["style_share"] == 1.0
    assert abs(result["details"]["distance_left"]) < 0.1


def test_noise_and_blur_cost_distance_and_content(pool: RealPool) -> None:
    captions, line, _ = _world()
    rng = np.random.default_rng(1)
    distances, top1 = [], []
    for strength in (0.0, 0.5, 1.0):
        noisy = [
            _image((1 - strength) * np.asarray(image) / 255 + strength * rng.random((SIZE, SIZE, 1)).repeat(3, 2) ** 2)
            for image in line
        ]
        result = evaluate_style(_encode(noisy, captions), pool)
        distances.append(result["style_distance"])
        top1.append(result["prompt_retrieval"]["top1"])
    assert distances[0] < distances[1] < distances[2]
    assert top1[0] == 1.0 and top1[2] < 0.3
    blank = [Image.new("RGB", (SIZE, SIZE), "grey")] * CONCEPTS
    assert evaluate_style(_encode(blank, captions), pool)["prompt_retrieval"] == {"top1": 0.0, "top5": 0.0}


def test_retrieval_ranks_by_hand() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)
    target = Encoded(["a", "b", "c"], embeddings, torch.full((3,), LINE), embeddings)
    base = Encoded(["a", "b", "c"], embeddings, torch.full((3,), FLAT), embeddings.flip(0))
    pool = RealPool(target, base, LINE)
    query = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    line, flat = torch.tensor([LINE]), torch.tensor([FLAT])
    # nearest first: among line art a, b, c; among flat colour c, b, a
    for caption, style, top1 in (("a", line, 1.0), ("b", line, 0.0), ("c", flat, 1.0), ("a", flat, 0.0)):
        assert retrieval(Encoded([caption], query, style, query), pool) == {"top1": top1, "top5": 1.0}
    assert retrieval(Encoded(["c"], query, line, query), pool, other_style=True)["top1"] == 1.0
    with pytest.raises(UserError, match="no real image of 'd'"):
        retrieval(Encoded(["d"], query, line, query), pool)


def test_a_caption_with_two_images_is_one_answer() -> None:
    embeddings = torch.eye(3, dtype=torch.float64)
    target = Encoded(["a", "a", "b"], embeddings, torch.full((3,), LINE), embeddings)
    base = Encoded(["a", "a", "b"], embeddings, torch.full((3,), FLAT), embeddings)
    query = torch.tensor([[0.0, 0.9, 0.4]], dtype=torch.float64)
    assert retrieval(Encoded(["a"], query, torch.tensor([LINE]), query), RealPool(target, base, LINE))["top1"] == 1.0


def test_frechet_distance_matches_scipy_and_the_closed_form() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(300, 5).double() @ torch.randn(5, 5).double(), torch.randn(200, 5).double() * 2 + 1
    keep = 1 - 5 / (5 + 200)
    covariances = []
    for rows in (a, b):
        covariance = np.cov(rows.numpy().T)
        covariances.append(keep * covariance + (1 - keep) * np.diag(np.diag(covariance)))
    cross = sqrtm(covariances[0] @ covariances[1]).real.trace()
    mean = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected = mean + covariances[0].trace() + covariances[1].trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(5 * 9, rel=1e-9)


def test_frechet_distance_is_stable_for_few_samples() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(32, 32).double() / 32**0.5

    def draw(count: int, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(count, 32).double() @ mixing + shift

    near = [frechet_distance(draw(20), draw(80)) for _ in range(8)]
    far = [frechet_distance(draw(20, 0.5), draw(80)) for _ in range(8)]
    assert all(np.isfinite(near)) and max(near) < min(far)
    unshrunk = [frechet_distance(draw(20), draw(80), count=10**9) for _ in range(8)]
    assert np.mean(near) < 0.8 * np.mean(unshrunk)
    with pytest.raises(UserError, match="at least two"):
        frechet_distance(draw(1), draw(8))


def _rows(captions: list[str], features: torch.Tensor) -> Encoded:
    return Encoded(captions, features.double(), torch.zeros(len(captions), dtype=torch.long), features.double())


def test_the_floor_is_what_a_perfect_model_gets() -> None:
    captions = [f"caption {i}" for i in range(120)]

    def draw(seed: int, shift: float, count: int) -> torch.Tensor:
        return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + shift

    for asked in (40, 120):  # few of the captions, and all of them
        found = []
        for seed in range(30):
            target, base = _rows(captions, draw(seed, 0, 120)), _rows(captions, draw(1000 + seed, 1, 120))
            twice = _rows(captions[:asked] * 2, draw(2000 + seed, 0, 2 * asked))
            found.append(style_distances(twice, target, base))
        perfect, floor, base_distance = (
            torch.tensor([getattr(d, name) for d in found]) for name in ("pictures", "floor", "base")
        )
        assert abs(float((perfect - floor).mean())) < 3 * float((perfect - floor).std()) / 30**0.5
        # Pictures and floor share captions, counts and reference, so their difference spreads less than the way to go.
        assert float((perfect - floor).std()) < 0.1 * float((base_distance - floor).mean())
        assert float(base_distance.mean()) == pytest.approx(8 + float(floor.mean()), rel=0.1)
        assert found[-1] == style_distances(twice, target, base)
        counts = [(d.measured, d.against, d.splits) for d in found]
        assert set(counts) == {(40, 80, 1) if asked == 40 else (60, 60, 16)}


def test_distances_use_every_picture_and_never_its_own_caption() -> None:
    """The real image of a measured caption is not in the reference: copying it gains nothing."""
    generator = torch.Generator().manual_seed(0)
    captions = [f"caption {i}" for i in range(20)]
    target, base = _rows(captions, torch.randn(20, 3, generator=generator)), _rows(captions, torch.ones(20, 3) * 9)
    copies = style_distances(_rows(captions[:8], target.features[:8]), target, base)
    assert copies.pictures == copies.floor
    own = frechet_distance(target.features[:8], target.features[8:], count=8)
    assert copies.floor == pytest.approx(own, rel=1e-9)
    assert copies.left == 0
    # Two pictures a caption: the mean of both rounds; a caption with one picture gives it to both.
    far = target.features[:8] + 5
    both = _rows(captions[:8] + captions[:7], torch.cat([target.features[:8], far[:7]]))
    second = torch.cat([far[:7], target.features[7:8]])
    expected = (copies.floor + frechet_distance(second, target.features[8:], count=8)) / 2
    assert style_distances(both, target, base).pictures == pytest.approx(expected, rel=1e-9)
    assert style_distances(copies_of(target, 8), target, target).left is None
    with pytest.raises(UserError, match="1 of 20 captions"):
        style_distances(_rows(captions[:1], far[:1]), target, base)


def copies_of(target: Encoded, count: int) -> Encoded:
    return _rows(target.captions[:count], target.features[:count])


def test_an_encoder_blind_to_style_is_refused() -> None:
    captions, line, _ = _world()
    with pytest.raises(UserError, match="for one style"):
        make_pool(_encode(line, captions), _encode(line, captions))
