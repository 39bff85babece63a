"""Rows dealt to processes: each once, nearly the same number of tokens, nothing drawn."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.deal import deal


def hands(lengths, ranks):
    return [hand.tolist() for hand in deal(np.array(lengths), ranks)]


def test_the_longest_first_each_to_the_lightest():
    assert hands([3, 10, 4, 4, 9], 2) == [[1, 3], [0, 2, 4]]  # 10 + 4 · 9 + 4 + 3
    assert hands([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]


def test_one_process_has_all_rows_in_their_order():
    assert hands([3, 10, 4], 1) == [[0, 1, 2]]


def test_fewer_rows_than_processes_leave_some_empty():
    dealt = deal(np.array([7, 9]), 4)
    assert [hand.tolist() for hand in dealt] == [[1], [0], [], []]
    assert {hand.dtype for hand in dealt} == {np.dtype(np.int64)}


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])  # unsigned lengths must not wrap where they are negated
def test_every_row_once_and_sums_that_differ_by_one_row_at_most(dtype):
    for seed in range(50):
        generator = np.random.default_rng(seed)
        lengths = generator.integers(1, 2000, generator.integers(1, 60)).astype(dtype)
        dealt = deal(lengths, ranks := int(generator.integers(1, 9)))
        assert len(dealt) == ranks
        assert sorted(np.concatenate(dealt).tolist()) == list(range(len(lengths)))
        sums = [int(lengths[hand].sum()) for hand in dealt]
        assert max(sums) - min(sums) <= lengths.max()
        again = deal(lengths, ranks)
        assert all((one == other).all() for one, other in zip(dealt, again, strict=True))
