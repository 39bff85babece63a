"""What rows have in common at their beginning, found and packed."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.pack import passes
from luthier.data.prefixes import Node, forest, in_passes
from rows import Rows


def family(seed: int = 0) -> list[list[int]]:
    """Twelve rows: a system prompt of 20 tokens over two documents of 30, five questions each; two rows apart."""
    generator = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return generator.integers(3, 60, count).tolist()

    system, documents = tokens(20), [[100, *tokens(29)], [101, *tokens(29)]]
    rows = [system + documents[i % 2] + [200 + i, *tokens(int(generator.integers(3, 12)))] for i in range(10)]
    return [*rows, [7, *tokens(15)], [8, *tokens(5)]]


def test_a_tree_of_system_prompt_documents_and_questions():
    rows = family()
    nodes = forest([np.array(row, np.int32) for row in rows]).nodes
    shared = [node for node in nodes if len(node.rows) > 1]
    assert [(node.start, node.stop, node.parent, len(node.rows)) for node in shared] == [
        (0, 20, -1, 10),
        (20, 50, nodes.index(shared[0]), 5),
        (20, 50, nodes.index(shared[0]), 5),
    ]
    assert sum(len(row) for row in rows) - forest([np.array(row) for row in rows]).tokens == 9 * 20 + 2 * 4 * 30


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("budget", [40, 90, 200, 100_000])
def test_every_row_is_its_nodes_end_to_end_and_the_budget_holds(seed, budget):
    generator = np.random.default_rng(seed)
    words = int(generator.integers(1, 4))  # few words: much in common, rows that are others' beginnings, equal rows
    rows = [np.array(generator.integers(0, words, generator.integers(1, 60)), np.int32) for _ in range(30)]
    rows += [rows[0], rows[1]]
    whole = forest(rows)
    seen = []
    for part in in_passes(whole, budget):
        chains: dict[int, list[Node]] = {}
        for number, node in enumerate(part):
            assert node.parent < number and node.start < node.stop
            for row in node.rows:
                chains.setdefault(row, []).append(node)
        assert sum(node.stop - node.start for node in part) <= max(budget, *(len(rows[row]) for row in chains))
        for row, chain in chains.items():
            assert chain[0].start == 0 and chain[-1].stop == len(rows[row])
            for before, after in zip(chain, chain[1:], strict=False):
                assert before.stop == after.start and part[after.parent] is before
            for node in chain:
                same = rows[node.rows[0]][node.start : node.stop]
                assert (same == rows[row][node.start : node.stop]).all()
        seen += chains
    assert sorted(seen) == list(range(32))


def test_short_beginnings_are_not_worth_a_stretch():
    head = [5, 6, 7]
    rows = [np.array([*head, 10 + i], np.int32) for i in range(8)]
    assert all(len(node.rows) == 1 for node in forest(rows).nodes)


def test_a_pass_holds_what_is_shared_once_and_teaches_what_each_row_does():
    rows = Rows([(row, 0 if i % 2 else len(row) - 3) for i, row in enumerate(family())])
    (made,) = passes(rows, np.arange(12), 10_000, shared=True)
    plain = passes(rows, np.arange(12), 10_000)
    assert sorted(made.rows) == list(range(12)) and made.length == rows.lengths.sum() == plain[0].ids.size
    assert made.ids.size == made.length - (9 * 20 + 2 * 4 * 30)

    def taught(part):
        """(row up to a place, its target), as often as it counts"""
        found = []
        weights = np.ones(len(part.places)) if part.weights is None else part.weights
        for place, target, weight in zip(part.places, part.targets, weights, strict=True):
            number = next(i for i, s in enumerate(part.segments) if s.start <= place < s.stop)
            before: list[int] = part.ids[0, part.segments[number].start : place + 1].tolist()
            while (number := part.segments[number].parent) >= 0:
                before = part.ids[0, part.segments[number].start : part.segments[number].stop].tolist() + before
            assert made.positions is part.positions and len(before) == part.positions[0, place] + 1 or part is not made
            found += [(tuple(before), int(target))] * int(weight)
        return sorted(found)

    assert taught(made) == taught(plain[0])
    assert made.weights is not None and made.weights.max() == 5  # half of the ten teach the system prompt too


def test_where_little_is_shared_rows_are_packed_by_themselves():
    generator = np.random.default_rng(0)
    rows = Rows([(generator.integers(3, 60, 50).tolist(), 10) for _ in range(20)])
    assert [part.rows for part in passes(rows, np.arange(20), 200, shared=True)] == [
        part.rows for part in passes(rows, np.arange(20), 200)
    ]


def test_rows_on_either_side_of_a_border_share_nothing():
    rows = Rows([([*range(3, 43), 60 + i, *range(i)], 5) for i in range(10)])
    made = passes(rows, np.arange(10), 10_000, apart=45, shared=True)
    assert [sorted(part.rows) for part in made] == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
    assert all(part.ids.size < part.length for part in made)
