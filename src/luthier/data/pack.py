"""The rows of one optimizer step → passes through the model under a token budget.

Here a pass is plainly padded. Which rows share a pass never changes a step's gradient but for rounding (and, where
there is dropout, its draw).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from luthier.data.examples import Examples

NO_TARGET = -100


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model at once, padded on the right.

    ids: int64 [rows, longest]; mask: bool, true on real tokens; targets: int64, the id to be predicted FROM a position
    (the next token, where that is supervised), else -100; rows: the rows' numbers.
    """

    ids: np.ndarray
    mask: np.ndarray
    targets: np.ndarray
    rows: tuple[int, ...]


def passes(examples: Examples, rows: np.ndarray, tokens_per_pass: int, pad_id: int) -> list[Pass]:
    """The rows of a step as passes of at most `tokens_per_pass` places, padding counted; a longer row goes alone."""
    return [pad(examples, rows[part], pad_id) for part in cut(examples.lengths[rows], tokens_per_pass)]


def cut(lengths: np.ndarray, tokens_per_pass: int) -> list[np.ndarray]:
    """Places in `lengths` that go together, longest first: little padding, and too long a row shows at once."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    parts = []
    start = 0
    while start < len(order):
        fit = max(1, tokens_per_pass // int(lengths[order[start]]))
        parts.append(order[start : start + fit])
        start += fit
    return parts


def pad(examples: Examples, rows: np.ndarray, pad_id: int) -> Pass:
    """One pass of the given rows. The pad id is never a target and never attended to: any id will do."""
    chosen = [examples[int(row)] for row in rows]
    shape = (len(chosen), max(len(example.ids) for example in chosen))
    ids, mask, targets = np.full(shape, pad_id, np.int64), np.zeros(shape, bool), np.full(shape, NO_TARGET, np.int64)
    for place, example in enumerate(chosen):
        length = len(example.ids)
        ids[place, :length] = example.ids
        mask[place, :length] = True
        targets[place, : length - 1] = np.where(example.supervised[1:], example.ids[1:], NO_TARGET)
    return Pass(ids, mask, targets, tuple(int(row) for row in rows))
