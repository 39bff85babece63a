"""Rows → padded passes."""

from __future__ import annotations

import numpy as np

from luthier.data.pack import cut, pad, passes
from rows import Rows, random_rows


def test_a_pass_is_padded_on_the_right_and_targets_are_the_next_supervised_tokens():
    made = pad(Rows([([5, 6, 7, 8], 2), ([9, 4], 1)]), np.array([1, 0]), pad_id=1)
    assert made.ids.tolist() == [[9, 4, 1, 1], [5, 6, 7, 8]]
    assert made.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert made.targets.tolist() == [[4, -100, -100, -100], [-100, 7, 8, -100]]
    assert made.rows == (1, 0)
    assert (made.ids.dtype, made.targets.dtype) == (np.int64, np.int64)


def test_a_token_that_equals_the_pad_id_is_still_a_target():
    assert pad(Rows([([5, 1], 1), ([5, 6, 1], 1)]), np.array([0, 1]), pad_id=1).targets.tolist() == [
        [1, -100, -100],
        [6, 1, -100],
    ]


def test_every_row_goes_once_and_the_budget_holds_but_for_a_row_that_is_longer():
    rows = random_rows(50, longest=20)
    made = passes(rows, np.arange(50), tokens_per_pass=48, pad_id=0)
    assert sorted(row for one in made for row in one.rows) == list(range(50))
    assert all(one.ids.size <= 48 for one in made)
    assert sum(int((one.targets != -100).sum()) for one in made) == rows.supervised.sum()
    alone = passes(rows, np.arange(50), tokens_per_pass=10, pad_id=0)
    assert all(one.ids.size <= 10 or len(one.rows) == 1 for one in alone)


def test_the_longest_come_first_and_equal_lengths_keep_their_order():
    assert [part.tolist() for part in cut(np.array([3, 5, 3, 5, 9], np.int32), 10)] == [[4], [1, 3], [0, 2]]


def test_a_row_that_is_drawn_twice_in_a_step_counts_twice():
    assert [one.rows for one in passes(Rows([([5, 6], 1)]), np.array([0, 0]), 64, 0)] == [(0, 0)]
