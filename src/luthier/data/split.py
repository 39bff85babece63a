"""Which rows are trained on and which are held out: seeded choices on top of the cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luthier.data.examples import CUT, OK, Examples, Source
from luthier.errors import DataError
from luthier.sections import DataSection


def usable(sources: Sequence[Source]) -> np.ndarray:
    """int64 [n, 2]: (source, row) of every row that can be trained on, in the order of the files."""
    parts = []
    for number, source in enumerate(sources):
        status = source.store.column("status")
        rows = np.flatnonzero((status == OK) | (status == CUT))
        parts.append(np.stack([np.full(len(rows), number), rows], axis=1))
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


def sampled(examples: Examples, section: DataSection) -> np.ndarray:
    """A seeded draw of data.sample rows; the examples of one row stay together."""
    lines = examples.column(Source.lines)
    rows = np.unique(np.stack([examples.chosen[:, 0], lines], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    there, wanted = int(rows.max()) + 1, section.sample or 0
    if wanted > there:
        raise DataError(f"data.sample: {wanted:,} rows are asked for, and {there:,} can be used")
    drawn = np.random.Generator(np.random.Philox(key=[section.seed, 1])).permutation(there)[:wanted]
    return examples.chosen[np.isin(rows, drawn)]


def eval_part(examples: Examples, section: DataSection) -> np.ndarray:
    """bool [n]: which rows are held out. Rows of one prompt have one hash and fall on one side together."""
    if section.eval is None or len(examples) == 0:
        return np.zeros(len(examples), dtype=bool)
    prompts = examples.column(lambda source: source.store.column("prompt").astype(np.uint64))
    hashes = _mixed(prompts, section.seed)
    if isinstance(section.eval, float):
        return np.asarray(hashes < np.uint64(section.eval * 2**64))
    assert isinstance(section.eval, int)
    distinct, counts = np.unique(hashes, return_counts=True)
    enough = int(np.searchsorted(np.cumsum(counts), section.eval))
    if enough >= len(distinct):
        raise DataError(f"data.eval: {section.eval:,} rows are to be held out, and there are {len(examples):,}")
    return np.asarray(hashes <= distinct[enough])


def _mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of each value and the seed: uniform over 64 bits (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15) * np.uint64(seed % 2**32 + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def ranges(examples: Examples, sources: Sequence[Source]) -> list[tuple[int, int, float]]:
    """(start, stop, weight) of each source's rows in `examples`, in the order of the sources."""
    ends = np.searchsorted(examples.chosen[:, 0], np.arange(len(sources) + 1)).tolist()
    return [(ends[i], ends[i + 1], source.weight) for i, source in enumerate(sources)]
