"""The rows of one optimizer step → a hand of them for each process."""

from __future__ import annotations

import numpy as np


def deal(lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Places in `lengths` for each of `ranks` processes, so that all have nearly as many tokens.

    The longest row first, each to the process that has the fewest tokens so far: nothing is drawn. A hand is int64 and
    ascending; where there are fewer rows than processes, some are empty.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for place in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        lightest = sums.index(min(sums))
        hands[lightest].append(place)
        sums[lightest] += int(lengths[place])
    return [np.array(sorted(hand), dtype=np.int64) for hand in hands]
