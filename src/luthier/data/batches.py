"""Seeded order → the rows of each optimizer step.

The order is a pure function of (seed, step): nothing is drawn in sequence, so that a resumed run needs no state but
its step, and a prefetch cannot move anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from luthier.errors import DataError
from luthier.sections import TrainSection


class RowRange(NamedTuple):
    """One file's rows, start ≤ row < stop, of which an epoch draws round(weight × their number)."""

    start: int
    stop: int
    weight: float


@dataclass(frozen=True)
class Order:
    """Which rows an optimizer step takes.

    An epoch is one permutation of all draws, cut into steps of `batch` rows; its last step holds the remainder. A
    file of weight w is drawn floor(w) times whole, and the rest from a part that moves on from epoch to epoch, so
    that 0.1 has seen every row once after ten epochs.
    """

    sources: tuple[RowRange, ...]
    seed: int
    batch: int

    @property
    def draws(self) -> int:
        """Rows drawn in an epoch."""
        return sum(_draws(source) for source in self.sources)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.draws / self.batch)

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of optimizer step `step`, counted from 0: int64 [at most batch]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return _epoch(self.sources, self.seed, epoch)[place * self.batch : (place + 1) * self.batch]


def order_of(sources: Sequence[tuple[int, int, float]], seed: int, batch: int) -> Order:
    """An order over (start, stop, weight) ranges of rows. Errors: DataError where an epoch would draw nothing."""
    order = Order(tuple(RowRange(*source) for source in sources if source[0] < source[1]), seed, batch)
    if order.draws == 0:
        raise DataError("data.train: an epoch would draw no row; raise the files' weights or bring more rows")
    return order


def total_steps(section: TrainSection, order: Order) -> int:
    """Optimizer steps of the run: `steps`, or the epochs' (a part of an epoch is rounded up to a whole step)."""
    if section.steps is not None:
        return section.steps
    return math.ceil(exact(section.epochs or 1) * order.steps_per_epoch)


def exact(number: float) -> Fraction:
    """The number as it was written: 0.07 × 100 is 7, where floats make it 7.000000000000001 and its ceiling 8."""
    return Fraction(str(number))


def _draws(source: RowRange) -> int:
    return round(exact(source.weight) * (source.stop - source.start))


@lru_cache(maxsize=2)  # consecutive steps share an epoch; two, since a prefetch may be one epoch ahead
def _epoch(sources: tuple[RowRange, ...], seed: int, epoch: int) -> np.ndarray:
    parts = []
    for number, source in enumerate(sources):
        size = source.stop - source.start
        copies, part = divmod(_draws(source), size)
        mixed = _generator(seed, number, 1).permutation(size)  # the same in every epoch: `part` moves along it
        moved = (epoch * part + np.arange(part)) % size
        parts.append(source.start + np.concatenate([np.tile(np.arange(size), copies), mixed[moved]]))
    draws = np.concatenate(parts)
    order = draws[_generator(seed, epoch, 0).permutation(len(draws))]
    order.setflags(write=False)  # shared by every caller of this epoch
    return order


def _generator(seed: int, number: int, purpose: int) -> np.random.Generator:
    """Counter-based: its stream depends on these three alone."""
    key = np.array([seed % 2**64, number], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, purpose]))
