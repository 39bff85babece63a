"""Near duplicates: what overlaps by 0.8 is found, what does not is not, and a shared template counts for nothing."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.data import duplicates
from luthier.data.duplicates import drawn, near_pairs


def random_rows(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 50_000, length).astype(np.int32) for _ in range(count)]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard of the two rows' token triples, by Python's sets."""
    one, other = ({tuple(row[i : i + 3].tolist()) for i in range(len(row) - 2)} for row in (a, b))
    return len(one & other) / len(one | other)


def test_every_pair_that_is_alike_is_found_and_no_other() -> None:
    rows = random_rows(400, 60)
    generator = np.random.default_rng(1)
    for i in range(0, 200, 2):  # from equal to half changed
        rows[i + 1] = rows[i].copy()
        changed = generator.choice(60, size=i // 20, replace=False)
        rows[i + 1][changed] = 50_000 + generator.integers(0, 50_000, len(changed))
    expected = {(i, i + 1) for i in range(0, 200, 2) if overlap(rows[i], rows[i + 1]) >= 0.8}
    found = near_pairs(rows)
    assert 20 < len(expected) < 100
    assert {(i, j) for i, j, _ in found} == expected
    for i, j, similarity in found:
        assert similarity == pytest.approx(overlap(rows[i], rows[j]), abs=1e-12)
    assert [pair[2] for pair in found] == sorted((pair[2] for pair in found), reverse=True)


def test_a_long_shared_system_prompt_makes_no_duplicates() -> None:
    system = np.arange(200, dtype=np.int32)
    rows = [np.concatenate([system, row]) for row in random_rows(50, 12)]
    assert overlap(rows[0], rows[1]) > 0.8
    assert near_pairs(rows) == []
    rows[7] = rows[3].copy()
    assert [(i, j) for i, j, _ in near_pairs(rows)] == [(3, 7)]


def test_a_few_rows_and_short_rows() -> None:
    assert near_pairs([]) == []
    assert near_pairs([np.array([1, 2], np.int32)] * 2) == []  # too short for a triple: only an exact copy tells
    assert near_pairs([np.array([1, 2, 3], np.int32)] * 2) == [(0, 1, 1.0)]


def test_many_alike_rows_stay_few_pairs() -> None:
    rows = [np.arange(30, dtype=np.int32)] * 300 + random_rows(300, 30)
    found = near_pairs(rows)
    assert {i for pair in found for i in pair[:2]} == set(range(300))
    assert len(found) < 600


def test_the_draw_is_seeded_and_keeps_to_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.full(1000, 100)
    assert drawn(2000, lengths, 0).tolist() == list(range(1000))
    once = drawn(50, lengths, 0)
    assert len(once) == 50
    assert once.tolist() == sorted(set(once.tolist())) == drawn(50, lengths, 0).tolist()
    assert once.tolist() != drawn(50, lengths, 1).tolist()
    monkeypatch.setattr(duplicates, "MOST_TOKENS", 3000)
    assert len(drawn(2000, lengths, 0)) == 30
    assert len(drawn(10, np.zeros(0), 0)) == 0
