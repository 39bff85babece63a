"""What the model will see, as facts: random rows, lengths, drops, duplicates, leaks, first and last tokens.

`luthier.view.lookpage` shows them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from luthier.data.duplicates import MOST_ROWS, drawn, near_pairs
from luthier.data.encode import Encoder, Example
from luthier.data.examples import Examples, spread
from luthier.data.pieces import Piece, pieces
from luthier.data.prepare import Data
from luthier.data.sources import Rejected
from luthier.sections import DataSection

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
NAMED = 4  # rows that a check names
T = TypeVar("T")


@dataclass(frozen=True)
class Lengths:
    """Tokens of a part of the rows. percentiles: at PERCENTILES.

    counts: rows in each bar of a histogram; bar i holds those of edges[i] ≤ tokens < edges[i + 1].
    """

    what: str
    percentiles: list[int]
    counts: list[int]
    edges: list[int]


@dataclass(frozen=True)
class Check:
    """Something counted that had better be none: `count` of `of`, the first few by name.

    weight: wrong, the model would learn what no recipe can mean; notice, for the user to judge.
    """

    what: str
    count: int
    of: int
    named: list[str]
    weight: Literal["wrong", "notice"] = "notice"


@dataclass(frozen=True)
class Shown:
    """A row as the model sees it."""

    origin: str
    ids: list[int]
    pieces: list[Piece]

    @property
    def supervised(self) -> int:
        """Tokens that are taught."""
        return sum(len(piece.ids) for piece in self.pieces if piece.supervised)


@dataclass(frozen=True)
class Look:
    """All that `luthier look` has to say.

    report: what data.json holds. first_token: BOS, where the tokenizer has the rule to put it before a text.
    """

    report: dict[str, Any]
    first_token: str | None
    end_tokens: list[str]
    supervised_share: float
    lengths: list[Lengths]
    checks: list[Check]
    rows: list[Shown]


def look(data: Data, encoder: Encoder, section: DataSection, rows: int, seed: int) -> Look:
    """Facts about encoded data, and `rows` of its training rows, drawn by `seed`."""
    edges = _edges(data.train)
    held = data.eval or Examples((), np.zeros((0, 2), np.int64))
    return Look(
        report=data.report,
        first_token=_tokenizer(encoder).id_to_token(encoder.identity["bos"][0]) if encoder.identity["bos"] else None,
        end_tokens=[_tokenizer(encoder).id_to_token(id) for id in encoder.end_ids],
        supervised_share=float(data.train.supervised.sum() / data.train.lengths.sum()),
        lengths=_lengths(data.train, edges, section),
        checks=[
            *_tokens(data.train, edges, encoder),
            *_fates(data),
            *_duplicates(data.train),
            *(_leaks(data.train, held) if len(held) else []),
            *_near(data.train, held, seed),
        ],
        rows=_shown(data.train, encoder, rows, seed),
    )


def _tokenizer(encoder: Encoder) -> Any:
    return encoder.tokenizer


def _shown(train: Examples, encoder: Encoder, rows: int, seed: int) -> list[Shown]:
    order = np.random.Generator(np.random.Philox(key=[seed, 2])).permutation(len(train))
    tokenizer = _tokenizer(encoder)
    special = {tokenizer.token_to_id(name) for name in encoder.marks.names}
    return [
        Shown(train.origin(i), train[i].ids.tolist(), pieces(train[i], tokenizer, special))
        for i in sorted(order[:rows].tolist())
    ]


# -- one pass over the rows ------------------------------------------------------------------------------------------


class Edge(NamedTuple):
    """Where a row begins to be taught, and the tokens at its ends."""

    prompt: int  # tokens before the first answer
    first: int
    second: int
    last: int  # the last supervised token


def _edges(examples: Examples) -> list[Edge]:
    edges = []
    for i in range(len(examples)):
        example = examples[i]
        ids, taught = example.ids, example.supervised.nonzero()[0]
        edges.append(Edge(int(taught[0]), int(ids[0]), int(ids[1]), int(ids[taught[-1]])))
    return edges


def _lengths(train: Examples, edges: Sequence[Edge], section: DataSection) -> list[Lengths]:
    whole = _spread("row", train.lengths)
    if section.supervise == "all":
        return [whole]
    prompts = np.array([edge.prompt for edge in edges])
    return [_spread("prompt", prompts), _spread("answer", train.supervised), whole]


def _spread(what: str, lengths: np.ndarray) -> Lengths:
    """Percentiles are lengths that occur (nearest rank)."""
    percentiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()
    return Lengths(what, percentiles, *spread(lengths))


# -- checks ----------------------------------------------------------------------------------------------------------


def _tokens(train: Examples, edges: Sequence[Edge], encoder: Encoder) -> list[Check]:
    """BOS first where the tokenizer has that rule, never twice; the last token that is taught ends an answer."""
    name = encoder.marks.bos
    bos = _tokenizer(encoder).token_to_id(name) if name else None
    without = [i for i, edge in enumerate(edges) if edge.first != bos] if encoder.identity["bos"] else []
    twice = [i for i, edge in enumerate(edges) if edge.first == edge.second == bos]
    endless = [i for i, edge in enumerate(edges) if edge.last not in encoder.end_ids and _endless(train[i], encoder)]
    found = {
        f"rows that do not begin with {name}": without,
        f"rows that begin with {name} twice": twice,
        "rows whose end is not taught": endless,
    }
    return [
        Check(what, len(rows), len(train), _few(rows, train.origin), "wrong")
        for what, rows in found.items()
        if name or "begin" not in what
    ]


def _endless(example: Example, encoder: Encoder) -> bool:
    """No end token is taught last, but for white space: where all is supervised, a line break may follow it."""
    taught = example.ids[example.supervised].tolist()
    last = max((place for place, id in enumerate(taught) if id in encoder.end_ids), default=None)
    return last is None or bool(_tokenizer(encoder).decode(taught[last + 1 :], skip_special_tokens=False).strip())


def _fates(data: Data) -> list[Check]:
    """What became of the rows on their way, over all that were read."""
    report = data.report
    read = sum(source["rows"] for source in report["sources"])
    bad = [row for row in data.rejected if row.row]
    long = [row for row in data.rejected if not row.row]
    answers = report["supervised_tokens"] + report["answer_tokens_lost"]
    return [
        Check("bad rows, left out", report["bad"], read, _few(bad, _why)),
        Check("rows dropped for length", report["dropped_for_length"], read, _few(long, _why)),
        Check("rows cut", report["cut"], read, []),
        Check("answer tokens lost to drops and cuts", report["answer_tokens_lost"], answers, []),
        Check("examples written one a turn", report["one_example_a_turn"], read, []),
        Check("borders encoded apart", report["borders_encoded_apart"], read, []),
    ]


def _digests(examples: Examples, of: str) -> np.ndarray:
    """uint64 [n]: of each `row`, or of each `prompt`."""
    return examples.column(lambda source: source.store.column(of).astype(np.uint64))


def _duplicates(train: Examples) -> list[Check]:
    """Rows that repeat an earlier one, and prompts that are answered in more than one way."""
    rows, prompts = _digests(train, "row"), _digests(train, "prompt")
    first, place = np.unique(rows, return_index=True, return_inverse=True)[1:]
    copies = np.flatnonzero(first[place] != np.arange(len(rows)))
    distinct, ways = np.unique(prompts[first], return_counts=True)
    several = np.flatnonzero(np.isin(prompts, distinct[ways > 1]))
    return [
        Check("exact copies", len(copies), len(train), _pairs(train, copies, train, first[place])),
        Check("rows whose prompt has another answer, too", len(several), len(train), _groups(train, several, prompts)),
    ]


def _leaks(train: Examples, held: Examples) -> list[Check]:
    """Rows of the eval part that stand in training: whole, or with another answer."""
    checks, known = [], np.zeros(len(held), dtype=bool)
    for of, what in (("row", "eval rows that stand in training"), ("prompt", "further eval prompts in training")):
        there, first = np.unique(_digests(train, of), return_index=True)
        digests = _digests(held, of)
        place = np.searchsorted(there, digests).clip(max=len(there) - 1)
        leaked = np.flatnonzero((there[place] == digests) & ~known)
        known[leaked] = True
        checks.append(Check(what, len(leaked), len(held), _pairs(held, leaked, train, first[place])))
    return checks


def _near(train: Examples, held: Examples, seed: int) -> list[Check]:
    """Rows that nearly repeat another, and eval rows that nearly stand in training; on a seeded draw of them."""
    distinct = np.sort(np.unique(_digests(train, "row"), return_index=True)[1])
    fresh = np.flatnonzero(~np.isin(_digests(held, "row"), _digests(train, "row")))
    ours = distinct[drawn(MOST_ROWS * 3 // 4, train.lengths[distinct], seed)].tolist()
    theirs = fresh[drawn(MOST_ROWS // 4, held.lengths[fresh], seed)].tolist()
    pairs = near_pairs([train[i].ids for i in ours] + [held[i].ids for i in theirs])

    def origin(place: int) -> str:
        return train.origin(ours[place]) if place < len(ours) else held.origin(theirs[place - len(ours)])

    def named(pair: tuple[int, int, float]) -> str:
        return f"{origin(pair[0])} ≈ {origin(pair[1])} ({pair[2]:.2f})"

    within = [pair for pair in pairs if pair[1] < len(ours)]
    across = [pair for pair in pairs if pair[0] < len(ours) <= pair[1]]
    alike = {place for pair in within for place in pair[:2]}
    leaked = {pair[1] for pair in across}
    drew = f", of {len(ours):,} rows drawn" if len(ours) < len(distinct) else ""
    checks = [Check(f"near copies{drew}", len(alike), len(ours), _few(within, named))]
    if len(held):
        checks.append(Check(f"eval rows nearly in training{drew}", len(leaked), len(theirs), _few(across, named)))
    return checks


def _few(things: Sequence[T], name: Callable[[T], str]) -> list[str]:
    """The first few by name."""
    return [name(thing) for thing in things[:NAMED]] + ["…"] * (len(things) > NAMED)


def _why(row: Rejected) -> str:
    return f"{row.file}:{row.line}: {row.reason}"


def _pairs(examples: Examples, rows: np.ndarray, twins: Examples, twin: np.ndarray) -> list[str]:
    """Each of `rows` with the row that it equals: row twin[i] of `twins`."""
    return _few(rows.tolist(), lambda i: f"{examples.origin(i)} = {twins.origin(int(twin[i]))}")


def _groups(examples: Examples, rows: np.ndarray, by: np.ndarray) -> list[str]:
    """The groups of `rows` that share a value of `by`."""
    groups = defaultdict[int, list[int]](list)
    for i in rows.tolist():
        groups[int(by[i])].append(i)
    return _few(list(groups.values()), lambda group: " / ".join(_few(group, examples.origin)))
