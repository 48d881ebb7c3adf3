"""The two parquet files: split rules, losslessness, schema, and that the build reproduces them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from fastpref.emoji import HELDOUT_PARQUET, TRAIN_PARQUET
from fastpref.emoji.concepts import (
    DUPLICATE_RMS,
    MIN_TRAINING_USES,
    duplicate_clusters,
    rms_distances,
    select_concepts,
    split_heldout,
)
from fastpref.emoji.records import EmojiImages, build_records, decode_image, encode_image, read_records
from fastpref.errors import UserError


@pytest.fixture(scope="module")
def worlds() -> tuple[EmojiImages, EmojiImages]:
    return read_records(TRAIN_PARQUET), read_records(HELDOUT_PARQUET)


def test_world_is_large_enough_and_captions_are_unique(worlds: tuple[EmojiImages, EmojiImages]) -> None:
    train, heldout = worlds
    captions = train.captions + heldout.captions
    assert len(captions) >= 600
    assert 64 <= len(heldout.captions) <= 120
    assert len({tuple(sorted(c.split())) for c in captions}) == len(captions)


def test_heldout_captions_are_new_combinations_of_words_trained_on(worlds: tuple[EmojiImages, EmojiImages]) -> None:
    train, heldout = worlds
    uses = Counter(word for caption in train.captions for word in set(caption.split()))
    for caption in heldout.captions:
        assert len(caption.split()) >= 2
        assert min(uses[word] for word in caption.split()) >= MIN_TRAINING_USES, caption


def test_no_picture_is_near_identical_across_the_split(worlds: tuple[EmojiImages, EmojiImages]) -> None:
    train, heldout = worlds
    for style in ("flat", "line"):
        both = np.concatenate([getattr(train, style), getattr(heldout, style)])
        across = rms_distances(both)[: len(train.captions), len(train.captions) :]
        assert across.min() >= DUPLICATE_RMS


@pytest.mark.parametrize("path", [TRAIN_PARQUET, HELDOUT_PARQUET], ids=["train", "heldout"])
def test_schema_and_winner_side(path) -> None:
    table = pq.read_table(path)
    assert table.column_names == ["jpg_0", "jpg_1", "label_0", "caption", "has_label"]
    labels = table["label_0"].to_numpy()
    assert set(labels.tolist()) == {0.0, 1.0}
    assert 0.3 < labels.mean() < 0.7
    assert all(table["has_label"].to_pylist())
    for row in table.slice(0, 20).to_pylist():
        winner, loser = ("jpg_0", "jpg_1") if row["label_0"] else ("jpg_1", "jpg_0")
        saturation = {k: int(np.ptp(decode_image(row[k]).astype(int), axis=-1).max()) for k in (winner, loser)}
        assert saturation[winner] <= 2, "line art is grey"


def test_encoding_is_lossless() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(encode_image(image)), image)


def toy_npz(path, count: int = 60) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    colours, things = ("red", "blue", "green", "gold", "grey", "pink"), ("cat", "hat", "sun", "bus", "cup", "key")
    names = [f"{c}-{t}" for c in colours for t in things] + [f"thing{i}-alone" for i in range(count - 36)]

    def squares(colours: int) -> np.ndarray:  # of 8 x 8 pixels, which compress in a tenth of the time that noise takes
        return generator.integers(0, 256, (count, 4, 4, colours), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)

    arrays = {"names": np.array(names), "flat": squares(3), "mono": squares(1).repeat(3, axis=-1)}
    np.savez(path, **arrays)
    return arrays


def test_build_keeps_every_pixel_and_is_reproducible(tmp_path) -> None:
    arrays = toy_npz(tmp_path / "toy.npz")
    counts = [build_records(tmp_path / "toy.npz", tmp_path / name) for name in ("a", "b")]
    assert counts[0] == counts[1] and counts[0][1] > 0 and sum(counts[0]) == 60
    rows = {name.replace("-", " "): i for i, name in enumerate(arrays["names"].tolist())}
    for split in ("train", "heldout"):
        first, second = (tmp_path / name / f"{split}.parquet" for name in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()
        world = read_records(first)
        index = [rows[caption] for caption in world.captions]
        assert np.array_equal(world.flat, arrays["flat"][index])
        assert np.array_equal(world.line, arrays["mono"][index])
    assert not list(tmp_path.glob("*/.*"))


def test_missing_input_is_a_user_error(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file"):
        build_records(tmp_path / "none.npz", tmp_path)
    with pytest.raises(UserError, match="no emoji records"):
        read_records(tmp_path / "none.parquet")


def test_subset_rule_drops_lettering_and_persons() -> None:
    names = ["keycap-1", "man-singer", "woman-singer", "singer", "red-heart", "up-arrow", "busy", "calm"]
    line = np.full((8, 32, 32, 3), 255, dtype=np.uint8)
    line[6] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    assert [names[i] for i in select_concepts(names, line, 8)] == ["red-heart", "busy", "calm"]
    assert [names[i] for i in select_concepts(names, line, 2)] == ["red-heart", "calm"]


def test_clusters_join_pictures_alike_mirrored_or_captions_reordered() -> None:
    generator = np.random.default_rng(0)
    flat = generator.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    line = generator.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    line[1] = line[0][:, ::-1]  # 1 mirrors 0 in one style
    flat[2] = flat[1]  # 2 equals 1 in the other: 0, 1 and 2 are one cluster
    clusters = duplicate_clusters(["a b", "c d", "e f", "cat face", "face cat"], flat, line)
    assert len(set(clusters[:3].tolist())) == 1
    assert clusters[3] == clusters[4] != clusters[0]


def test_split_takes_whole_clusters_only() -> None:
    captions = [f"{c} {t}" for c in "abcd" for t in "wxyz"]
    clusters = np.arange(16)
    clusters[5] = clusters[0]
    for seed in range(10):
        heldout = split_heldout(captions, clusters, 5, seed)
        assert heldout[0] == heldout[5]
        assert 0 < heldout.sum() <= 5
