"""Encoded sources, and the rows chosen from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from luthier.data.cache import Store
from luthier.data.encode import Example
from luthier.data.formats import Format

BARS = 24  # of a histogram, at most
LINEAR = 10  # times the shortest: below it a histogram of lengths has bars of one width
OK, CUT, TOO_LONG, BAD = range(4)  # a row's fate, as the cache holds it


@dataclass(frozen=True)
class Source:
    """One entry of data.train (or data.eval), encoded."""

    path: str
    files: list[Path]
    format: Format
    weight: float
    sha256: str
    store: Store

    def lines(self) -> np.ndarray:
        """One number a row of the files, int64 [rows of the store]: the examples of one conversation share it."""
        return np.asarray(self.store.column("line") + (self.store.column("file").astype(np.int64) << 40))

    def origin(self, row: int) -> str:
        """`file:line` of a row of the store."""
        return f"{self.files[self.store.value('file', row)].name}:{self.store.value('line', row)}"


class Examples:
    """Rows of training, read from the cache when they are asked for.

    lengths: int32 [n] tokens a row; supervised: int32 [n] targets a row.
    """

    def __init__(self, sources: Sequence[Source], chosen: np.ndarray) -> None:
        """`chosen`: int64 [n, 2], which source and which of its rows."""
        self.sources = sources
        self.chosen = chosen
        self.lengths = self.column(lambda source: source.store.lengths)
        self.supervised = self.column(lambda source: source.store.supervised)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Example:
        store, row = self._at(i)
        ids = store.ids(row)
        supervised = np.zeros(len(ids), dtype=bool)
        for start, stop in store.spans(row):
            supervised[start:stop] = True
        return Example(ids, supervised)

    def largest_id(self) -> int:
        """The largest token id in the sources of these rows: the model must have an embedding for it."""
        return max(source.store.largest_id() for source in self.sources)

    def spans(self, i: int) -> list[tuple[int, int]]:
        """The supervised token ranges [start, stop) of row i."""
        store, row = self._at(i)
        return store.spans(row)

    def origin(self, i: int) -> str:
        """`file:line` of row i."""
        number, row = self.chosen[i]
        return self.sources[int(number)].origin(int(row))

    def column(self, of: Callable[[Source], np.ndarray]) -> np.ndarray:
        """Something of every row of a source, for these rows: [n]."""
        columns = [of(source) for source in self.sources]
        parts = np.array([0, *(len(column) for column in columns)]).cumsum()
        whole = np.concatenate(columns) if columns else np.zeros(0, np.int64)
        return np.asarray(whole[parts[self.chosen[:, 0]] + self.chosen[:, 1]])

    def _at(self, i: int) -> tuple[Store, int]:
        number, row = self.chosen[i]
        return self.sources[int(number)].store, int(row)


def spread(lengths: np.ndarray) -> tuple[list[int], list[int]]:
    """A histogram of lengths: counts, and one edge more, the last above the longest.

    Bars are of one width where the longest is less than ten times the shortest; else they grow, as such lengths spread
    over magnitudes, and none is narrower than the one before: it would look like a dip.
    """
    low, high = int(lengths.min()), int(lengths.max())
    widths = np.full(BARS, -(-(high + 1 - low) // BARS))
    if high >= LINEAR * max(low, 1):
        grown = np.geomspace(max(low, 1), high + 1, BARS + 1).round().astype(int)
        widths = np.maximum.accumulate(np.diff(np.unique([low, *grown])))
    edges = low + np.array([0, *widths.cumsum()])
    edges = edges[: int(np.searchsorted(edges, high, side="right")) + 1]
    return np.histogram(lengths, edges)[0].tolist(), edges.tolist()
