"""The rows of one optimizer step → passes through the model under a token budget.

Which rows share a pass never changes a step's gradient: in a packed pass a token sees its own row only, and a padded
one has the same rows one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from luthier.data.examples import Examples

NO_TARGET = -100


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model at once: packed end to end, or padded on the right.

    ids, positions: int64 [B, L], positions from 0 in each row; targets: int64 [B, L], the id to be predicted FROM a
    place (the next token, where that is supervised), else -100; owners: int64 [B, L], the number of the row that a
    token belongs to; mask: bool [B, L], true on real tokens. segments: (start, stop) of each row of a packed pass,
    whose B is 1; none in a padded one. rows: the rows' numbers.
    """

    ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    mask: np.ndarray
    segments: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]


def passes(examples: Examples, rows: np.ndarray, tokens_per_pass: int, apart: int | None = None) -> list[Pass]:
    """The rows of a step as packed passes of at most `tokens_per_pass` tokens; a longer row goes alone.

    `apart`: rows longer than this share no pass with shorter ones.
    """
    return [pack(examples, rows[part]) for part in first_fit(examples.lengths[rows], tokens_per_pass, apart)]


def padded_passes(
    examples: Examples, rows: np.ndarray, tokens_per_pass: int, pad_id: int, apart: int | None = None
) -> list[Pass]:
    """The same as padded passes of at most `tokens_per_pass` places, padding counted: the plain twin."""
    lengths = examples.lengths[rows]
    groups = (
        [np.arange(len(rows))] if apart is None else [np.flatnonzero(lengths > apart), np.flatnonzero(lengths <= apart)]
    )
    return [
        pad(examples, rows[group[part]], pad_id) for group in groups for part in cut(lengths[group], tokens_per_pass)
    ]


def first_fit(lengths: np.ndarray, tokens_per_pass: int, apart: int | None = None) -> list[np.ndarray]:
    """Places in `lengths` that go together: first-fit decreasing, so too long a row shows at once.

    It fills at most 11/9 of the fewest passes possible, and one more (Johnson 1973).
    """
    if apart is not None and len(np.unique(lengths > apart)) == 2:
        groups = [np.flatnonzero(lengths > apart), np.flatnonzero(lengths <= apart)]
        return [group[part] for group in groups for part in first_fit(lengths[group], tokens_per_pass)]
    parts: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)  # left in each pass; as many passes as rows at most
    for place in np.argsort(-lengths.astype(np.int64), kind="stable"):
        fits = np.flatnonzero(room[: len(parts)] >= lengths[place])
        if len(fits):
            number = int(fits[0])
        else:
            number = len(parts)
            parts.append([])
            room[number] = tokens_per_pass
        parts[number].append(int(place))
        room[number] -= lengths[place]
    return [np.array(part, np.int64) for part in parts]


def cut(lengths: np.ndarray, tokens_per_pass: int) -> list[np.ndarray]:
    """Places in `lengths` that are padded together, longest first: little padding."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    parts = []
    start = 0
    while start < len(order):
        fit = max(1, tokens_per_pass // int(lengths[order[start]]))
        parts.append(order[start : start + fit])
        start += fit
    return parts


def pack(examples: Examples, rows: Sequence[int] | np.ndarray) -> Pass:
    """One packed pass of the given rows, in their order. No token predicts the next row's first."""
    chosen = [examples[int(row)] for row in rows]
    lengths = np.array([len(example.ids) for example in chosen], np.int64)
    stops = lengths.cumsum()
    ids = np.concatenate([example.ids for example in chosen]).astype(np.int64)
    supervised = np.concatenate([example.supervised for example in chosen])
    targets = np.full(len(ids), NO_TARGET, np.int64)
    targets[:-1] = np.where(supervised[1:], ids[1:], NO_TARGET)
    targets[stops - 1] = NO_TARGET
    return Pass(
        ids=ids[None],
        positions=np.concatenate([np.arange(length) for length in lengths])[None],
        targets=targets[None],
        owners=np.repeat(np.asarray(rows, np.int64), lengths)[None],
        mask=np.ones((1, len(ids)), bool),
        segments=tuple((int(stop - length), int(stop)) for stop, length in zip(stops, lengths, strict=True)),
        rows=tuple(int(row) for row in rows),
    )


def pad(examples: Examples, rows: Sequence[int] | np.ndarray, pad_id: int) -> Pass:
    """One padded pass of the given rows. The pad id is never a target and never attended to: any id will do."""
    chosen = [examples[int(row)] for row in rows]
    shape = (len(chosen), max(len(example.ids) for example in chosen))
    ids, mask, targets = np.full(shape, pad_id, np.int64), np.zeros(shape, bool), np.full(shape, NO_TARGET, np.int64)
    for place, example in enumerate(chosen):
        length = len(example.ids)
        ids[place, :length] = example.ids
        mask[place, :length] = True
        targets[place, : length - 1] = np.where(example.supervised[1:], example.ids[1:], NO_TARGET)
    return Pass(
        ids=ids,
        positions=np.broadcast_to(np.arange(shape[1]), shape).copy(),
        targets=targets,
        owners=np.repeat(np.asarray(rows, np.int64)[:, None], shape[1], axis=1),
        mask=mask,
        segments=(),
        rows=tuple(int(row) for row in rows),
    )
