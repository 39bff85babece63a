"""The rows of one optimizer step → passes through the model under a token budget.

Which rows share a pass never changes a step's gradient: in a packed pass a token sees its own row only, and a padded
one has the same rows one below the other. What rows have in common at their beginning may stand in a pass once; so do
the virtual tokens that prompt tuning puts before all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from luthier.data.prefixes import Node, forest, in_passes

if TYPE_CHECKING:
    from luthier.data.examples import Examples

PAYS = 0.05
"""Of a step's tokens: what shared prefixes must save; below it the rows are packed by themselves, which is fuller."""


class Segment(NamedTuple):
    """Tokens start … stop of a packed pass. parent: the number of the segment that comes before them in their rows,
    -1 for none; a parent stands before its children."""

    start: int
    stop: int
    parent: int = -1


class Virtual(NamedTuple):
    """Tokens before the first of every row that no tokenizer knows. tokens: how many, 0 for none.

    columns: they stand in the pass as tokens do (prompt and P-tuning); else their keys and values come from elsewhere
    (prefix tuning), and of them a pass only knows that its rows' positions begin after them.
    """

    tokens: int = 0
    columns: bool = False


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model at once: packed end to end, or padded on the right.

    ids, positions: int64 [B, L], positions from 0 in each row; mask: bool [B, L], true on real tokens. segments: the
    rows of a packed pass, whose B is 1, or the parts that they are made of; none in a padded one. What is taught:
    places: int64 [S] in B · L, from which targets: int64 [S] are predicted, each counted as often as weights: float32
    [S] says (None: once). rows: the rows' numbers; length: their tokens, however many of them stand here.
    """

    ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    segments: tuple[Segment, ...]
    places: np.ndarray
    targets: np.ndarray
    weights: np.ndarray | None
    rows: tuple[int, ...]
    length: int


def passes(
    examples: Examples, rows: np.ndarray, tokens_per_pass: int, apart: int | None = None, shared: bool = False
) -> list[Pass]:
    """The rows of a step as packed passes of at most `tokens_per_pass` tokens; a longer row goes alone.

    `apart`: rows longer than this share no pass with shorter ones. `shared`: what rows have in common at their
    beginning stands once in a pass, where that saves enough.
    """
    lengths = examples.lengths[rows]
    if shared and len(rows) > 1:
        sides = _sides(lengths, apart)
        trees = [forest([examples[int(row)].ids for row in rows[side]]) for side in sides]
        parts = [
            (side, nodes) for side, tree in zip(sides, trees, strict=True) for nodes in in_passes(tree, tokens_per_pass)
        ]
        if sum(node.stop - node.start for _, nodes in parts for node in nodes) <= (1 - PAYS) * lengths.sum():
            return [_pack_nodes(examples, rows[side], nodes) for side, nodes in parts]
    return [pack(examples, rows[part]) for part in first_fit(lengths, tokens_per_pass, apart)]


def padded_passes(
    examples: Examples,
    rows: np.ndarray,
    tokens_per_pass: int,
    pad_id: int,
    apart: int | None = None,
    further: int = 0,
) -> list[Pass]:
    """The same as padded passes of at most `tokens_per_pass` places, padding counted: the plain twin.

    `further`: places that each row takes besides its tokens (virtual ones).
    """
    lengths = examples.lengths[rows]
    return [
        pad(examples, rows[side[part]], pad_id)
        for side in _sides(lengths, apart)
        for part in cut(lengths[side] + further, tokens_per_pass)
    ]


def _sides(lengths: np.ndarray, apart: int | None) -> list[np.ndarray]:
    """Places in `lengths` on either side of the border, the longer ones first."""
    if apart is None or len(np.unique(lengths > apart)) < 2:
        return [np.arange(len(lengths))]
    return [np.flatnonzero(lengths > apart), np.flatnonzero(lengths <= apart)]


def first_fit(lengths: np.ndarray, tokens_per_pass: int, apart: int | None = None) -> list[np.ndarray]:
    """Places in `lengths` that go together: first-fit decreasing, so too long a row shows at once.

    It fills at most 11/9 of the fewest passes possible, and one more (Johnson 1973).
    """
    if len(sides := _sides(lengths, apart)) == 2:
        return [side[part] for side in sides for part in first_fit(lengths[side], tokens_per_pass)]
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
    stops = np.array([len(example.ids) for example in chosen], np.int64).cumsum().tolist()
    segments = tuple(Segment(start, stop) for start, stop in zip([0, *stops], stops, strict=False))
    taught = [example.supervised[1:].nonzero()[0] for example in chosen]
    return Pass(
        ids=np.concatenate([example.ids for example in chosen]).astype(np.int64)[None],
        positions=np.concatenate([np.arange(len(example.ids)) for example in chosen])[None],
        mask=np.ones((1, stops[-1]), bool),
        segments=segments,
        places=np.concatenate([at + segment.start for at, segment in zip(taught, segments, strict=True)]),
        targets=np.concatenate([e.ids[at + 1] for at, e in zip(taught, chosen, strict=True)]).astype(np.int64),
        weights=None,
        rows=tuple(int(row) for row in rows),
        length=stops[-1],
    )


def _pack_nodes(examples: Examples, rows: np.ndarray, nodes: Sequence[Node]) -> Pass:
    """One packed pass of the rows that these nodes make up, in whole: a node's numbers are places in `rows`."""
    segments, firsts = list[Segment](), dict[int, list[Segment]]()  # of each row, in order
    ids, positions = [], []
    at = 0
    for node in nodes:
        segment = Segment(at, at + node.stop - node.start, node.parent)
        for number in node.rows:
            firsts.setdefault(number, []).append(segment)
        ids.append(examples[int(rows[node.rows[0]])].ids[node.start : node.stop])
        positions.append(np.arange(node.start, node.stop))
        segments.append(segment)
        at = segment.stop
    pairs = []
    for number, parts in firsts.items():
        example = examples[int(rows[number])]
        where = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        taught = example.supervised[1:].nonzero()[0]
        pairs.append(np.stack((where[taught], example.ids[taught + 1].astype(np.int64))))
    taught, counts = np.unique(np.concatenate(pairs, axis=1), axis=1, return_counts=True)
    chosen = rows[list(firsts)]
    return Pass(
        ids=np.concatenate(ids).astype(np.int64)[None],
        positions=np.concatenate(positions)[None],
        mask=np.ones((1, at), bool),
        segments=tuple(segments),
        places=taught[0],
        targets=taught[1],
        weights=None if (counts == 1).all() else counts.astype(np.float32),
        rows=tuple(int(row) for row in chosen),
        length=int(examples.lengths[chosen].sum()),
    )


def pad(examples: Examples, rows: Sequence[int] | np.ndarray, pad_id: int) -> Pass:
    """One padded pass of the given rows. The pad id is never a target and never attended to: any id will do."""
    chosen = [examples[int(row)] for row in rows]
    shape = (len(chosen), max(len(example.ids) for example in chosen))
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, bool)
    for place, example in enumerate(chosen):
        ids[place, : len(example.ids)] = example.ids
        mask[place, : len(example.ids)] = True
    taught = [example.supervised[1:].nonzero()[0] for example in chosen]
    return Pass(
        ids=ids,
        positions=np.broadcast_to(np.arange(shape[1]), shape).copy(),
        mask=mask,
        segments=(),
        places=np.concatenate([at + place * shape[1] for place, at in enumerate(taught)]),
        targets=np.concatenate([e.ids[at + 1] for at, e in zip(taught, chosen, strict=True)]).astype(np.int64),
        weights=None,
        rows=tuple(int(row) for row in rows),
        length=int(mask.sum()),
    )


def behind(pass_: Pass, virtual: Virtual) -> Pass:
    """The same pass behind virtual tokens, as its rows would be if these were their first.

    As columns their ids are -1, -2, …, which no tokenizer has: what is keyed by a row's tokens, as dropout is, knows
    them. In a packed pass they stand once, a parent of all that had none; in a padded one before each row.
    """
    count = virtual.tokens
    if not virtual.columns:
        return replace(pass_, positions=pass_.positions + count) if count else pass_
    rows, places = pass_.ids.shape
    before = np.broadcast_to(np.arange(count), (rows, count))
    segments = tuple(Segment(s.start + count, s.stop + count, s.parent + 1) for s in pass_.segments)
    return replace(
        pass_,
        ids=np.concatenate((-1 - before, pass_.ids), axis=1),
        positions=np.concatenate((before, pass_.positions + count), axis=1),
        mask=np.concatenate((np.ones((rows, count), bool), pass_.mask), axis=1),
        segments=(Segment(0, count), *segments) if segments else (),
        places=pass_.places + count * (1 + pass_.places // places),
    )
