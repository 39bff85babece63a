"""What rows have in common at their beginning: a system prompt, a template's head, one document with several questions.

Rows → a forest whose nodes are stretches of tokens: a row is the nodes from a root down to one of them, end to end.
Nodes are made where they save something, at any depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

SHORTEST = 4
"""Tokens of a node that several rows share; each is one more stretch for attention to look at."""
SAVES = 32
"""Tokens, at least, that a shared node saves in the rows but one: fewer are not worth a stretch of their own."""


@dataclass(frozen=True)
class Node:
    """Tokens start … stop of each of `rows` (numbers of the rows that a forest was made of), equal in all of them.

    parent: the number of the node that holds the tokens before, -1 for none.
    """

    start: int
    stop: int
    parent: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Forest:
    """nodes: parents before their children, and the rows in an order in which those that share follow each other."""

    nodes: list[Node]

    @property
    def tokens(self) -> int:
        """Tokens when each node is there once."""
        return sum(node.stop - node.start for node in self.nodes)


def forest(rows: Sequence[np.ndarray]) -> Forest:
    """The shared beginnings of these rows. rows: int32 ids, [n] each."""
    order = sorted(range(len(rows)), key=lambda row: rows[row].tobytes())  # what begins alike stands together
    alike = [0, *(_alike(rows[one], rows[next_]) for one, next_ in zip(order, order[1:], strict=False))]
    nodes: list[Node] = []
    waiting = [(0, len(rows) - 1, 0, -1)]  # rows first … last of the order, of which so many tokens stand in the parent
    while waiting:
        first, last, depth, parent = waiting.pop()
        if first == last and depth < len(rows[order[first]]):
            nodes.append(Node(depth, len(rows[order[first]]), parent, (order[first],)))
        if first >= last:
            continue
        common = min(alike[first + 1 : last + 1])
        if common - depth >= SHORTEST and (common - depth) * (last - first) >= SAVES:
            nodes.append(Node(depth, common, parent, tuple(order[first : last + 1])))
            depth, parent = common, len(nodes) - 1
        begins = [first, *(row for row in range(first + 1, last + 1) if alike[row] == common)]
        ends = [*(begin - 1 for begin in begins[1:]), last]
        waiting += [(begin, end, depth, parent) for begin, end in zip(begins, ends, strict=True)][::-1]
    return Forest(nodes)


def in_passes(whole: Forest, tokens_per_pass: int) -> Iterator[list[Node]]:
    """The forest in parts of at most `tokens_per_pass` tokens, each with all that its rows need; rows stay in order.

    A row that has more goes alone.
    """
    chains = _chains(whole.nodes)
    chosen: dict[int, None] = {}  # in order
    rows: list[int] = []
    tokens = 0
    for row, chain in chains.items():
        new = [number for number in chain if number not in chosen]
        more = sum(_length(whole.nodes[number]) for number in new)
        if rows and tokens + more > tokens_per_pass:
            yield _part(whole.nodes, chosen, rows)
            new, chosen, rows, tokens = chain, {}, [], 0
            more = sum(_length(whole.nodes[number]) for number in new)
        chosen.update(dict.fromkeys(new))
        rows.append(row)
        tokens += more
    if rows:
        yield _part(whole.nodes, chosen, rows)


def _part(nodes: Sequence[Node], chosen: dict[int, None], rows: Sequence[int]) -> list[Node]:
    """Those nodes with those rows alone. Where one row is left in a node and its child, the two are one stretch."""
    there, part, place = set(rows), list[Node](), dict[int, int]()
    for number in chosen:
        node = nodes[number]
        kept = tuple(row for row in node.rows if row in there)
        above = place.get(node.parent, -1)
        if above >= 0 and part[above].rows == kept:
            part[above] = replace(part[above], stop=node.stop)
            place[number] = above
            continue
        place[number] = len(part)
        part.append(Node(node.start, node.stop, above, kept))
    return part


def _chains(nodes: Sequence[Node]) -> dict[int, list[int]]:
    """The numbers of the nodes of each row, from its beginning."""
    chains: dict[int, list[int]] = {}
    for number, node in enumerate(nodes):
        for row in node.rows:
            chains.setdefault(row, []).append(number)
    return chains


def _length(node: Node) -> int:
    return node.stop - node.start


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two rows have in common at their beginning."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
