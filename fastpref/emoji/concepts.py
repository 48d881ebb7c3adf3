"""Which emoji are in the bundled world, and which of them are held out.

Subset rule, in this order:

1. Names are dropped that show lettering or differ only by a small sign: keycaps, buttons, arrows, clock faces,
   prohibitions, banknotes, "sign" and "disk" names, zodiac signs (``LETTERING``).
2. Persons are dropped: every "man/woman/person ..." and the role they share ("artist" beside "man artist"). At 32 px
   the three are one picture.
3. Of the rest, names of several words that each occur in at least three names stay, since they make new combinations
   possible; then the least busy line-art pictures until there are ``size``. Busy means a high mean absolute gradient
   after halving the picture: hatching, which stands for colour in the line-art set, averages out and does not count.

Split rule: a held-out caption is a new combination of words, each of which is in at least two training captions, and
the cluster of near-identical pictures it belongs to is held out as a whole or not at all. Two concepts are
near-identical when in either style the root-mean-square difference of their pictures (mirrored or not, values in
[0, 1]) is below ``DUPLICATE_RMS``, or when their captions hold the same words in another order; clusters are the
transitive closure.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

PERSON_WORDS = frozenset({"man", "woman", "person", "mans", "womans", "mens", "womens"})
LETTERING = re.compile(
    r"(^|-)(button|keycap|input|oclock|thirty|banknote|arrow|arrows|sign|signs|disk|dvd|zzz|restroom|toilet|closet"
    r"|copyright|registered|trade|no|circled|hundred|information|exchange|customs|control|baggage|luggage|joker|cancer"
    r"|aries|taurus|gemini|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus)(-|$)"
)
DUPLICATE_RMS = 0.06
MIN_TRAINING_USES = 2


def caption_of(name: str) -> str:
    """The caption of an emoji name: hyphens become spaces."""
    return name.replace("-", " ")


def busyness(images: np.ndarray) -> np.ndarray:
    """Mean absolute gradient of half-size pictures: (N, H, W, 3) uint8 in, (N,) in [0, 1] out."""
    n, height, width, _ = images.shape
    half = images.reshape(n, height // 2, 2, width // 2, 2, 3).mean((2, 4)) / 255.0
    return np.abs(np.diff(half, axis=1)).mean((1, 2, 3)) + np.abs(np.diff(half, axis=2)).mean((1, 2, 3))


def select_concepts(names: list[str], line: np.ndarray, size: int) -> np.ndarray:
    """Indices, ascending, of the concepts that stay under the subset rule; ``line`` is (N, H, W, 3) uint8."""
    persons = [n for n in names if PERSON_WORDS & set(n.split("-"))]
    roles = {n.split("-", 1)[1] for n in persons if "-" in n}
    legible = [
        i for i, n in enumerate(names) if not (PERSON_WORDS & set(n.split("-")) or n in roles or LETTERING.search(n))
    ]
    uses = Counter(word for i in legible for word in set(names[i].split("-")))
    rank = busyness(line[legible])
    for row, i in enumerate(legible):
        words = names[i].split("-")
        if len(words) > 1 and min(uses[word] for word in words) > MIN_TRAINING_USES:
            rank[row] -= 1.0
    return np.sort(np.asarray(legible)[np.argsort(rank, kind="stable")[:size]])


def rms_distances(images: np.ndarray) -> np.ndarray:
    """(N, N) root-mean-square differences of (N, H, W, 3) uint8 pictures, the smaller of plain and mirrored."""

    def pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * a @ b.T
        return np.sqrt(np.maximum(square, 0.0) / a.shape[1])

    flat = images.reshape(len(images), -1) / 255.0
    mirrored = images[:, :, ::-1].reshape(len(images), -1) / 255.0
    return np.minimum(pairwise(flat, flat), pairwise(flat, mirrored))


def duplicate_clusters(captions: list[str], flat: np.ndarray, line: np.ndarray) -> np.ndarray:
    """(N,) cluster numbers: union-find over near-identical pictures and captions equal up to word order."""
    parent = list(range(len(captions)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    close = np.minimum(rms_distances(flat), rms_distances(line)) < DUPLICATE_RMS
    links = [(int(i), int(j)) for i, j in np.argwhere(np.triu(close, 1))]
    first_with_words: dict[tuple[str, ...], int] = {}
    for i, caption in enumerate(captions):
        links.append((first_with_words.setdefault(tuple(sorted(caption.split())), i), i))
    for i, j in links:
        parent[find(j)] = find(i)
    return np.array([find(i) for i in range(len(captions))])


def split_heldout(captions: list[str], clusters: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(N,) bool, True for held-out captions: at most ``count`` (whole clusters), drawn in a seeded order."""
    uses = Counter(word for caption in captions for word in set(caption.split()))
    members: dict[int, list[int]] = {}
    for i, cluster in enumerate(clusters.tolist()):
        members.setdefault(cluster, []).append(i)
    heldout = np.zeros(len(captions), dtype=bool)
    for cluster in np.random.default_rng(seed).permutation(sorted(members)):
        group = members[int(cluster)]
        if heldout.sum() + len(group) > count or any(" " not in captions[i] for i in group):
            continue
        left = uses - Counter(word for i in group for word in set(captions[i].split()))
        if all(left[word] >= MIN_TRAINING_USES for i in group for word in captions[i].split()):
            heldout[group], uses = True, left
    # A word a later group used up would break the rule for an earlier one; put such groups back.
    return _restore(captions, clusters, heldout)


def _restore(captions: list[str], clusters: np.ndarray, heldout: np.ndarray) -> np.ndarray:
    while True:
        uses = Counter(w for c, out in zip(captions, heldout, strict=True) if not out for w in set(c.split()))
        bad = [i for i in np.flatnonzero(heldout) if any(uses[w] < MIN_TRAINING_USES for w in captions[i].split())]
        if not bad:
            return heldout
        heldout = heldout & (clusters != clusters[bad[0]])
