"""Rows → packed and padded passes."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.pack import first_fit, pack, pad, padded_passes, passes
from rows import Rows, random_rows


def taught(made):
    return list(zip(made.places.tolist(), made.targets.tolist(), strict=True))


THREE = Rows([([5, 6, 7, 8], 2), ([9, 4], 1), ([3, 3, 3], 3)])


def test_a_packed_pass_holds_its_rows_end_to_end():
    made = pack(THREE, [1, 0, 2])
    assert made.ids.tolist() == [[9, 4, 5, 6, 7, 8, 3, 3, 3]]
    assert made.positions.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 2]]
    assert taught(made) == [(0, 4), (3, 7), (4, 8)] and made.weights is None
    assert made.mask.tolist() == [[True] * 9]
    assert made.segments == ((0, 2, -1), (2, 6, -1), (6, 9, -1)) and made.rows == (1, 0, 2) and made.length == 9
    assert {part.dtype for part in (made.ids, made.positions, made.places, made.targets)} == {np.dtype(np.int64)}


def test_no_token_predicts_the_first_of_the_next_row():
    """A row that is supervised from its first token on, behind another: nothing comes before it."""
    made = pack(Rows([([5, 6], 0), ([7, 8], 0)]), [0, 1])
    assert taught(made) == [(0, 6), (2, 8)]


def test_a_padded_pass_has_rows_below_each_other_padded_on_the_right():
    made = pad(THREE, np.array([1, 0]), pad_id=1)
    assert made.ids.tolist() == [[9, 4, 1, 1], [5, 6, 7, 8]]
    assert made.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert taught(made) == [(0, 4), (5, 7), (6, 8)]
    assert made.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert made.segments == () and made.rows == (1, 0) and made.length == 6


def test_a_token_that_equals_the_pad_id_is_still_a_target():
    made = pad(Rows([([5, 1], 1), ([5, 6, 1], 1)]), np.array([0, 1]), pad_id=1)
    assert taught(made) == [(0, 1), (3, 6), (4, 1)]


@pytest.mark.parametrize("packed", [True, False])
def test_every_row_goes_once_and_the_budget_holds_but_for_a_row_that_is_longer(packed):
    rows = random_rows(50, longest=20)

    def cut(budget):
        return passes(rows, np.arange(50), budget) if packed else padded_passes(rows, np.arange(50), budget, 0)

    made = cut(48)
    assert sorted(row for one in made for row in one.rows) == list(range(50))
    assert all(one.ids.size <= 48 for one in made)
    assert sum(len(one.targets) for one in made) == rows.supervised.sum()
    assert all(one.ids.size <= 10 or len(one.rows) == 1 for one in cut(10))
    assert [len(one.rows) for one in cut(1)] == [1] * 50


def test_first_fit_decreasing():
    lengths = np.array([3, 5, 3, 5, 9, 1], np.int32)
    assert [part.tolist() for part in first_fit(lengths, 10)] == [[4, 5], [1, 3], [0, 2]]
    assert [part.tolist() for part in first_fit(lengths, 9)] == [[4], [1, 0, 5], [3, 2]]


def test_packs_are_nearly_full():
    lengths = np.random.default_rng(0).integers(20, 700, 3000)
    made = first_fit(lengths, 4096)
    assert len(made) <= -(-lengths.sum() // 4096) + 1
    assert all(lengths[part].sum() <= 4096 for part in made)


def test_rows_on_either_side_of_a_border_are_kept_apart():
    lengths = np.array([3, 5, 3, 5, 9, 1])
    assert [part.tolist() for part in first_fit(lengths, 100, apart=4)] == [[4, 1, 3], [0, 2, 5]]
    assert [part.tolist() for part in first_fit(lengths, 100, apart=20)] == [[4, 1, 3, 0, 2, 5]]
    made = passes(random_rows(20, longest=20), np.arange(20), 1000, apart=10)
    assert [{end - start > 10 for start, end, _ in one.segments} for one in made] == [{True}, {False}]


def test_a_row_that_is_drawn_twice_in_a_step_counts_twice():
    assert [one.rows for one in passes(Rows([([5, 6], 1)]), np.array([0, 0]), 64)] == [(0, 0)]
