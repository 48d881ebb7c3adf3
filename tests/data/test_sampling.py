"""Batches are a keyed function of the step; every pair at most once an epoch; related groups are related."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data.sampling import Sampler, bisect, permute
from fastpref.errors import UserError


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**32 - 1))
def test_permute_is_a_bijection_whose_values_do_not_depend_on_what_else_is_asked(size, seed, epoch):
    whole = permute(np.arange(size), size, seed=seed, epoch=epoch)
    assert np.array_equal(np.sort(whole), np.arange(size))
    some = np.arange(0, size, 7)
    assert np.array_equal(permute(some, size, seed=seed, epoch=epoch), whole[some])


def test_permutations_differ_by_epoch_seed_and_stream_like_random_ones():
    base = permute(np.arange(2000), 2000, seed=1, epoch=0)
    others = [(1, 1, 0), (2, 0, 0), (1, 0, 1)]
    for seed, epoch, stream in others:
        other = permute(np.arange(2000), 2000, seed=seed, epoch=epoch, stream=stream)
        assert (base == other).sum() < 10  # one expected
    assert abs(np.corrcoef(np.arange(2000), base)[0, 1]) < 0.1


def test_every_place_is_equally_likely():
    size, epochs = 11, 440
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permute(np.arange(size), size, seed=5, epoch=epoch)] += 1
    chi2 = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert chi2 < 160  # 100 degrees of freedom: 160 is beyond the 99.98th percentile


@pytest.mark.parametrize("sampling", ["random", "related"])
@pytest.mark.parametrize("buckets", [1, 3])
def test_an_epoch_uses_every_pair_at_most_once_in_batches_of_one_bucket(sampling, buckets):
    rng = np.random.default_rng(0)
    bucket_ids = rng.integers(0, buckets, 101)
    embeddings = rng.normal(size=(101, 5)).astype(np.float32)
    sampler = Sampler(bucket_ids, batch_size=8, group_size=4, seed=3, sampling=sampling, embeddings=embeddings)
    assert sampler.batches_per_epoch == sum((bucket_ids == b).sum() // 8 for b in range(buckets))
    epochs = []
    for epoch in range(3):
        plans = [sampler.batch(epoch * sampler.batches_per_epoch + i) for i in range(sampler.batches_per_epoch)]
        assert all(plan.epoch == epoch and len(set(bucket_ids[plan.indices])) == 1 for plan in plans)
        indices = np.concatenate([plan.indices for plan in plans])
        assert len(np.unique(indices)) == len(indices) == 8 * sampler.batches_per_epoch
        groups = np.concatenate([plan.groups for plan in plans])
        assert np.array_equal(groups, np.arange(len(groups)) // 4)
        epochs.append(indices)
    assert (epochs[0] == epochs[1]).mean() < 0.2
    assert set(epochs[0]) != set(epochs[1]) or set(epochs[1]) != set(epochs[2])  # the remainder takes turns


@pytest.mark.parametrize("sampling", ["random", "related"])
def test_a_step_needs_no_step_before_it(sampling):
    embeddings = np.random.default_rng(1).normal(size=(50, 6)).astype(np.float32)
    settings = {"batch_size": 6, "group_size": 3, "seed": 9, "sampling": sampling, "embeddings": embeddings}
    walked = Sampler(np.arange(50) % 2, **settings)
    plans = [walked.batch(step) for step in range(30)]
    for step in (29, 3, 17, 0):
        fresh = Sampler(np.arange(50) % 2, **settings).batch(step)
        assert np.array_equal(fresh.indices, plans[step].indices)
        assert np.array_equal(fresh.groups, plans[step].groups)


def test_batch_size_leaves_the_order_of_pairs_alone():
    small, large = (Sampler(np.zeros(64), batch_size=n, group_size=4, seed=2) for n in (8, 16))
    pairs = np.concatenate([small.batch(0).indices, small.batch(1).indices])
    assert np.array_equal(pairs, large.batch(0).indices)


def test_related_groups_are_more_related_than_random_ones():
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(32, 16))
    embeddings = topics[np.arange(512) % 32] + 0.3 * rng.normal(size=(512, 16))
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)

    def similarity(sampling: str) -> float:
        sampler = Sampler(np.zeros(512), batch_size=32, group_size=8, seed=0, sampling=sampling, embeddings=embeddings)
        values = []
        for step in range(sampler.batches_per_epoch):
            for group in sampler.batch(step).indices.reshape(-1, 8):
                cosines = embeddings[group] @ embeddings[group].T
                values.append((cosines.sum() - 8) / 56)
        return float(np.mean(values))

    assert similarity("random") < 0.1
    assert similarity("related") > 0.5


def test_bisection_of_points_on_a_line_gives_its_segments():
    points = np.arange(64, dtype=np.float32)[:, None]
    shuffled = np.random.default_rng(0).permutation(64)
    groups = bisect(shuffled, points, 8, seed=0, epoch=0, stream=0).reshape(8, 8)
    assert sorted(sorted(group.tolist()) for group in groups) == [list(range(i, i + 8)) for i in range(0, 64, 8)]


def test_bisection_keeps_equal_rows_and_odd_numbers_of_groups():
    pairs = np.arange(5 * 7)
    order = bisect(pairs, np.ones((35, 3), np.float32), 7, seed=0, epoch=0, stream=0)
    assert np.array_equal(np.sort(order), pairs)


def test_impossible_batches_are_refused():
    with pytest.raises(UserError, match=r"batch of 8 pairs.*batch_size <= 5"):
        Sampler(np.asarray([0] * 5 + [1] * 4), batch_size=8, group_size=4, seed=0)
    with pytest.raises(UserError, match="must divide"):
        Sampler(np.zeros(9), batch_size=8, group_size=3, seed=0)
    with pytest.raises(UserError, match="no CLIP"):
        Sampler(np.zeros(9), batch_size=8, group_size=4, seed=0, sampling="related")
