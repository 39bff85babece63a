"""Rows that are nearly the same: MinHash finds candidates (Broder 1997), the true overlap of their tokens decides.

A row is its set of shingles, three tokens in sequence. What nine rows in ten share is the template and the system
prompt, and counts for nothing: under a long system prompt all short rows would be alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

SHINGLE = 3  # tokens
ALIKE = 0.8  # Jaccard: shared shingles over all shingles of the two
BANDS, PER_BAND = 16, 5  # two rows at 0.8 share a band with probability 1 - (1 - 0.8^5)^16 = 0.998; at 0.5 with 0.4
MOST_ROWS, MOST_TOKENS = 20_000, 4_000_000  # about three seconds
SHARED, FEW = 0.9, 20  # share of rows that makes a shingle the template's, given at least so many rows


def drawn(count: int, lengths: np.ndarray, seed: int) -> np.ndarray:
    """Which rows are compared, [≤ count] in order: all of them, or a seeded draw that keeps to the bounds."""
    tokens = max(float(lengths.mean()), 1.0) if len(lengths) else 1.0
    wanted = min(len(lengths), count, int(MOST_TOKENS / tokens))
    order = np.random.Generator(np.random.Philox(key=[seed, 3])).permutation(len(lengths))
    return np.sort(order[:wanted])


def near_pairs(rows: Sequence[np.ndarray]) -> list[tuple[int, int, float]]:
    """Pairs i < j of rows (int32 [t] each) that overlap by 0.8 or more, with their Jaccard similarity, likest first."""
    sets = _own([_shingles(ids) for ids in rows])
    filled = [i for i, shingles in enumerate(sets) if len(shingles)]
    if not filled:
        return []
    signatures = _signatures([sets[i] for i in filled])
    pairs = []
    for a, b in _candidates(signatures):
        if np.mean(signatures[a] == signatures[b]) >= ALIKE - 0.2:  # its error is 0.045: cheaper than the sets
            overlap = _jaccard(sets[filled[a]], sets[filled[b]])
            if overlap >= ALIKE:
                pairs.append((filled[a], filled[b], overlap))
    return sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))


def _shingles(ids: np.ndarray) -> np.ndarray:
    """uint64, distinct and sorted: a mixed number for each three tokens in sequence (a shorter row has none)."""
    if len(ids) < SHINGLE:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), SHINGLE)
    mixed = np.zeros(len(windows), np.uint64)
    for place in range(SHINGLE):
        mixed = _mix(mixed ^ windows[:, place])
    return np.unique(mixed)


def _own(sets: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The sets without what nearly all of them have."""
    if len(sets) < FEW:
        return list(sets)
    values, counts = np.unique(np.concatenate(sets), return_counts=True)
    common = values[counts > SHARED * len(sets)]
    return [np.setdiff1d(one, common, assume_unique=True) for one in sets]


def _signatures(sets: Sequence[np.ndarray]) -> np.ndarray:
    """uint64 [n, 80]: the smallest element of each (non-empty) set under each of 80 orders."""
    values = np.concatenate(sets)
    starts = np.cumsum([0, *(len(one) for one in sets)])[:-1]
    salts = np.random.Generator(np.random.Philox(key=1)).integers(0, 2**64, BANDS * PER_BAND, np.uint64)
    return np.stack([np.minimum.reduceat(_mix(values ^ salt), starts) for salt in salts], axis=1)


def _candidates(signatures: np.ndarray) -> list[tuple[int, int]]:
    """Pairs that share a band. In a bucket of many, each row is paired with the first and with its neighbour."""
    found = set[tuple[int, int]]()
    for band in range(BANDS):
        keys = np.zeros(len(signatures), np.uint64)
        for column in range(band * PER_BAND, (band + 1) * PER_BAND):
            keys = _mix(keys ^ signatures[:, column])
        _, place, counts = np.unique(keys, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[place] > 1)
        order = shared[np.argsort(place[shared], kind="stable")]
        for bucket in np.split(order, np.flatnonzero(np.diff(place[order])) + 1):
            found.update((int(bucket[0]), row) for row in bucket[1:].tolist())
            found.update(pairwise(bucket.tolist()))
    return sorted(found)


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def _mix(values: np.ndarray) -> np.ndarray:
    """The finisher of splitmix64: any change of its input changes half of its output (Steele, Lea, Flood 2014)."""
    z = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
