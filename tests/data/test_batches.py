"""The order of the data: which rows each step takes."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data.batches import order_of, total_steps
from luthier.errors import DataError
from luthier.sections import TrainSection


def epoch(order, number):
    first = number * order.steps_per_epoch
    return [order.rows(step).tolist() for step in range(first, first + order.steps_per_epoch)]


def test_an_epoch_takes_every_row_once_and_its_last_step_holds_the_remainder():
    order = order_of([(0, 3729, 1.0)], seed=42, batch=40)
    assert order.steps_per_epoch == 94
    steps = epoch(order, 0)
    assert [len(rows) for rows in steps] == [40] * 93 + [9]
    assert sorted(sum(steps, [])) == list(range(3729))


def test_the_order_is_a_function_of_seed_and_step_alone():
    order = order_of([(0, 10, 1.0)], seed=42, batch=4)
    forwards = [order.rows(step).tolist() for step in range(6)]
    assert [order.rows(step).tolist() for step in reversed(range(6))] == forwards[::-1]
    assert forwards[:3] != forwards[3:]  # the second epoch is another permutation
    assert order_of([(0, 10, 1.0)], seed=43, batch=4).rows(0).tolist() != forwards[0]
    assert forwards[:3] == [
        [2, 4, 5, 0],
        [9, 8, 1, 7],
        [3, 6],
    ]  # written down: another numpy must not change a run that is resumed


def test_a_negative_seed_and_a_batch_larger_than_the_data():
    order = order_of([(0, 3, 1.0)], seed=-1, batch=100)
    assert sorted(order.rows(0)) == [0, 1, 2]
    assert order.steps_per_epoch == 1


def test_weights_draw_whole_copies_and_a_part():
    order = order_of([(0, 10, 2.5), (10, 30, 0.1), (30, 34, 1.0)], seed=1, batch=8)
    assert order.draws == 25 + 2 + 4
    counts = np.bincount(np.concatenate(epoch(order, 0)), minlength=34)
    assert sorted(counts[:10]) == [2] * 5 + [3] * 5
    assert counts[10:30].sum() == 2
    assert counts[30:].tolist() == [1] * 4


def test_a_part_moves_on_so_that_ten_tenths_are_the_whole():
    order = order_of([(0, 20, 0.1), (20, 25, 1.0)], seed=1, batch=7)
    counts = np.bincount(np.concatenate([np.concatenate(epoch(order, number)) for number in range(10)]))
    assert counts[:20].tolist() == [1] * 20


def test_an_empty_range_is_passed_over_and_nothing_at_all_is_refused():
    assert sorted(order_of([(0, 0, 1.0), (0, 2, 1.0)], seed=0, batch=2).rows(0)) == [0, 1]
    with pytest.raises(DataError) as error:
        order_of([(0, 3, 0.1)], seed=0, batch=2)
    assert str(error.value) == "data.train: an epoch would draw no row; raise the files' weights or bring more rows"


@pytest.mark.parametrize(
    ("section", "steps"),
    [({}, 10), ({"epochs": 3}, 30), ({"epochs": 0.25}, 3), ({"epochs": 0.7}, 7), ({"steps": 4}, 4)],
)
def test_total_steps(section, steps):
    assert total_steps(TrainSection(**section), order_of([(0, 40, 1.0)], seed=0, batch=4)) == steps
