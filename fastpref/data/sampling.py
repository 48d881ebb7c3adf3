"""Which pairs form step k's batch: a pure function of the seed and k, without replaying the steps before.

Positions of an epoch are mapped to pairs by a Feistel network whose round function is Philox (`derive_keys`), walked
until it lands inside the range: a permutation of N that needs memory for √N numbers, its tabulated rounds. Black and
Rogaway, Ciphers with arbitrary finite domains (CT-RSA 2002).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import torch

from fastpref.errors import UserError
from fastpref_kernels import derive_keys

_ROUNDS = 8
_BATCH_ORDER = 1 << 12  # stream of the order of batches, beside one stream a bucket
_GROUP_ORDER = 1 << 13
_ROUND_DRAW, _PIVOT_DRAW = 0, 1
_BLOCK = 4096  # positions permuted at once
_ROWS_AT_ONCE = 16384


class Embeddings(Protocol):
    """(N, E) rows by index: an array, or a lazily gathered one."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class BatchPlan:
    """A global batch, the ``slot``-th of its epoch. ``groups[i]`` is the contrast group, numbered within the epoch, of
    the pair ``indices[i]``."""

    epoch: int
    indices: np.ndarray  # (B,) int64 into the store
    groups: np.ndarray  # (B,) int64
    slot: int = 0


def permute(positions: np.ndarray, size: int, *, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """A keyed permutation of ``range(size)``, evaluated at ``positions`` (n,) int64; no other position is computed.

    ``stream`` tells permutations of one (seed, epoch) apart.
    """
    half = max(2, ((size - 1).bit_length() + 1) // 2)
    rounds = _rounds(seed, epoch, stream, half)

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & ((1 << half) - 1)
        for table in rounds:
            left, right = right, left ^ table[right]
        return (left << half) | right

    out = encrypt(np.asarray(positions, dtype=np.int64))
    while (outside := out >= size).any():
        out[outside] = encrypt(out[outside])
    return out


@lru_cache(maxsize=32)
def _rounds(seed: int, epoch: int, stream: int, half: int) -> np.ndarray:
    """(rounds, 2^half) int64: each round function of each half block, in ``[0, 2^half)``."""
    values = torch.arange(1 << half, dtype=torch.int64)
    ids = torch.cat([values + (stream << 40) + (number << 32) for number in range(_ROUNDS)])
    keys = derive_keys(seed, epoch, ids, _ROUND_DRAW, "permutation").numpy()
    return (keys & ((1 << half) - 1)).reshape(_ROUNDS, -1)


class Sampler:
    """Batches of one bucket each, every pair at most once an epoch.

    A bucket's remainder below a batch sits an epoch out; the permutation decides whose turn it is.

    Args:
        bucket_ids: (N,) bucket of each pair.
        batch_size: pairs in a global batch.
        group_size: pairs in a contrast group; divides ``batch_size``.
        seed: key of the order.
        sampling: 'random', or 'related': groups of pairs with near embeddings.
        embeddings: (N, E) rows, for 'related'.
        draws: epochs that differ; later ones repeat them in turn. None: all differ.

    Raises:
        UserError: no bucket has a whole batch, or 'related' without embeddings.
    """

    def __init__(
        self,
        bucket_ids: np.ndarray,
        *,
        batch_size: int,
        group_size: int,
        seed: int,
        sampling: Literal["random", "related"] = "random",
        embeddings: Embeddings | None = None,
        draws: int | None = None,
    ) -> None:
        if batch_size % group_size:
            raise UserError(f"group_size is {group_size}, must divide batch_size {batch_size}", "group_size")
        if sampling == "related" and embeddings is None:
            raise UserError("sampling is related but the store has no CLIP embeddings", "sampling", "prepare with clip")
        self._batch_size, self._group_size, self._seed = batch_size, group_size, seed
        self._draws = draws
        self._embeddings = embeddings if sampling == "related" else None
        self._members = _members(np.asarray(bucket_ids))
        batches = np.asarray([len(pairs) // batch_size for pairs in self._members])
        if not batches.sum():
            most = max((len(pairs) for pairs in self._members), default=0)
            todo = f"use batch_size <= {most}, or more records"
            raise UserError(f"no bucket of the store has a batch of {batch_size} pairs", "batch_size", todo)
        self.batches_per_epoch = int(batches.sum())
        self._ends = np.cumsum(batches)
        self._cached: tuple[tuple[int, int, int], np.ndarray] = ((-1, -1, -1), np.empty(0, np.int64))
        self._related: tuple[int, dict[int, np.ndarray]] = (-1, {})

    def batch(self, step: int) -> BatchPlan:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, slot = divmod(step, self.batches_per_epoch)
        epoch = epoch if self._draws is None else epoch % self._draws
        drawn = slot
        if len(self._members) > 1:
            order = np.asarray([slot], dtype=np.int64)
            drawn = int(permute(order, self.batches_per_epoch, seed=self._seed, epoch=epoch, stream=_BATCH_ORDER)[0])
        bucket = int(np.searchsorted(self._ends, drawn, side="right"))
        number = drawn - (int(self._ends[bucket - 1]) if bucket else 0)
        pairs = self._batch_of(epoch, bucket, number)
        groups = slot * self._batch_size + np.arange(self._batch_size, dtype=np.int64)
        return BatchPlan(epoch, pairs, groups // self._group_size, slot)

    def _batch_of(self, epoch: int, bucket: int, number: int) -> np.ndarray:
        size = self._batch_size
        if self._embeddings is not None:
            return self._related_order(epoch, bucket)[number * size : (number + 1) * size]
        per_block = max(1, _BLOCK // size)
        key = (epoch, bucket, number // per_block)
        if self._cached[0] != key:
            start = key[2] * per_block * size
            stop = min(start + per_block * size, len(self._members[bucket]) // size * size)
            self._cached = (key, self._permuted(epoch, bucket, np.arange(start, stop)))
        at = number % per_block * size
        return self._cached[1][at : at + size]

    def _permuted(self, epoch: int, bucket: int, positions: np.ndarray) -> np.ndarray:
        members = self._members[bucket]
        chosen = permute(positions, len(members), seed=self._seed, epoch=epoch, stream=bucket)
        return np.asarray(members[chosen], dtype=np.int64)

    def _related_order(self, epoch: int, bucket: int) -> np.ndarray:
        """The epoch's pairs of a bucket, related ones adjacent, groups in a keyed order. Costs O(N log N) an epoch."""
        if self._related[0] != epoch:
            self._related = (epoch, {})
        orders = self._related[1]
        if bucket not in orders:
            assert self._embeddings is not None
            kept = len(self._members[bucket]) // self._batch_size * self._batch_size
            pairs = self._permuted(epoch, bucket, np.arange(kept))
            pairs = bisect(pairs, self._embeddings, self._group_size, seed=self._seed, epoch=epoch, stream=bucket)
            groups = pairs.reshape(-1, self._group_size)
            stream = _GROUP_ORDER + bucket
            order = permute(np.arange(len(groups)), len(groups), seed=self._seed, epoch=epoch, stream=stream)
            orders[bucket] = groups[order].reshape(-1)
        return orders[bucket]


def bisect(
    pairs: np.ndarray, embeddings: Embeddings, group_size: int, *, seed: int, epoch: int, stream: int
) -> np.ndarray:
    """Reorder ``pairs`` so that consecutive groups of ``group_size`` are related.

    Every node of pairs is halved (in whole groups) at the median of their projections on the difference of two of its
    members, drawn by key: a random projection tree (Dasgupta and Freund, STOC 2008). ``len(pairs)`` is a multiple of
    ``group_size``.
    """
    order = np.array(pairs, dtype=np.int64)
    counts = np.asarray([len(order) // group_size], dtype=np.int64)  # groups in each node
    level = 0
    while counts.max() > 1:
        sizes = counts * group_size
        starts = np.cumsum(sizes) - sizes
        node = np.repeat(np.arange(len(counts)), sizes)
        normals = _normals(order, embeddings, starts, sizes, seed, epoch, stream, level)
        projected = np.empty(len(order), dtype=np.float32)
        for at in range(0, len(order), _ROWS_AT_ONCE):
            part = slice(at, at + _ROWS_AT_ONCE)
            rows = embeddings[order[part]].astype(np.float64)
            projected[part] = np.einsum("ne,ne->n", rows, normals[node[part]])
        order = order[np.lexsort((projected, node))]
        left = np.maximum(counts // 2, 1)
        counts = np.stack([left, counts - left], axis=1).reshape(-1)
        counts = counts[counts > 0]
        level += 1
    return order


def _normals(
    order: np.ndarray,
    embeddings: Embeddings,
    starts: np.ndarray,
    sizes: np.ndarray,
    seed: int,
    epoch: int,
    stream: int,
    level: int,
) -> np.ndarray:
    """The difference (nodes, E) fp64 of two members of every node."""
    nodes = torch.arange(len(starts), dtype=torch.int64) + (stream << 40)
    ends = []
    for draw in (_PIVOT_DRAW + 2 * level, _PIVOT_DRAW + 2 * level + 1):
        keys = derive_keys(seed, epoch, nodes, draw, "permutation").numpy() & 0x7FFFFFFF
        ends.append(embeddings[order[starts + keys % sizes]].astype(np.float64))
    return ends[0] - ends[1]


class _All:
    """``range(size)`` as an array that needs no memory."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        return positions


def _members(bucket_ids: np.ndarray) -> list[np.ndarray | _All]:
    buckets = np.unique(bucket_ids)
    if len(buckets) == 1:
        return [_All(len(bucket_ids))]
    return [np.flatnonzero(bucket_ids == bucket) for bucket in buckets]
