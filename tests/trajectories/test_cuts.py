"""However a step is cut into passes, recomputed or dealt to processes, a run is that of plain transformers and PEFT.

Every test says in its docstring what can be broken in the engine so that it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from cases import CASES, CUTS, FULL, ROWS, SECTION, Trajectory, model_of, of_two_processes, trajectory
from reference import reference

from luthier.data.batches import order_of
from luthier.data.deal import deal
from luthier.data.pack import passes
from luthier.training import budget
from luthier.training.launch import launch

Runs = Callable[[str, str], Trajectory]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """(case, way) -> its trajectory, computed once."""

    @cache
    def by_two_processes() -> dict[str, Trajectory]:
        return launch(of_two_processes, (tmp_path_factory.mktemp("two"),), 2, print)

    @cache
    def of(case: str, way: str) -> Trajectory:
        if way == "two processes":
            return by_two_processes()[case]
        if way == "padded reference":
            return reference(model_of(case), ROWS, SECTION, dropout=case not in FULL)
        return trajectory(tmp_path_factory.mktemp("run"), case, **CUTS[way])

    return of


@pytest.mark.parametrize("way", [*CUTS, "two processes", "padded reference"][1:])
@pytest.mark.parametrize("case", CASES)
def test_every_way_through_a_step_gives_the_same_losses_and_gradient_norms(run: Runs, case: str, way: str) -> None:
    """Sabotage, each by itself: the mask dropped (attention across segments); position ids not restarted in a segment
    (OPT's are learned; elsewhere it is the dropout that changes); the mean of the passes' means; dropout drawn in
    sequence; a process's pass too many that counts."""
    expected, found = run(case, "one pass"), run(case, way)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    assert found.rows == expected.rows == [8, 8, 7, 8, 8, 7]


@pytest.mark.parametrize("case", CASES)
def test_the_ways_differ_in_their_passes(run: Runs, case: str) -> None:
    """Sabotage: tokens_per_pass not heeded."""
    assert run(case, "one pass").passes == [1] * 6
    assert run(case, "one row a pass").passes == [8, 8, 7, 8, 8, 7]
    order = order_of([(0, len(ROWS), 1.0)], seed=7, batch=8)
    cuts = [passes(ROWS, order.rows(step), 51) for step in range(6)]
    assert min(len(part.segments) for parts in cuts for part in parts) == 2
    for way in ("three passes", "activation checkpointing"):
        assert run(case, way).passes == [len(parts) for parts in cuts] == [3] * 6


def test_two_processes_differ_in_their_passes(run: Runs) -> None:
    """Both run as many as the one that has more, or one would wait for ever."""
    order = order_of([(0, len(ROWS), 1.0)], seed=7, batch=8)
    numbers = [
        [len(passes(ROWS, rows[places], 51)) for places in deal(ROWS.lengths[rows], 2)]
        for rows in map(order.rows, range(6))
    ]
    assert [2, 1] in numbers
    assert run("llama", "two processes").passes == [max(pair) for pair in numbers]


@pytest.mark.parametrize("case", CASES)
def test_the_runs_are_worth_comparing(run: Runs, tmp_path: Path, case: str) -> None:
    """The loss falls from the first epoch to the second; dropout and its seed decide every step's loss."""
    losses = run(case, "one pass").losses
    assert sum(losses[3:]) < sum(losses[:3]) - 0.3
    if case in FULL:
        return
    without = trajectory(tmp_path / "without", case, model_of(case, dropout=0.0))
    another = trajectory(tmp_path / "another", case, seed=43)
    for others in (without, another):
        assert min(abs(one - other) for one, other in zip(losses, others.losses, strict=True)) > 1e-3


def test_a_resumed_run_keeps_the_measured_tokens_per_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured again, with other memory free, it would cut otherwise, and round otherwise: not bit for bit the same.

    Sabotage: tokens_per_pass not restored from the checkpoint.
    """
    given = {"tokens_per_pass": "auto", "save_every": 2}
    monkeypatch.setitem(budget.TOKENS_PER_PASS, "cpu", 51)
    straight = trajectory(tmp_path / "run", "llama", **given)
    assert straight.passes == [3] * 6
    monkeypatch.undo()
    resumed = trajectory(tmp_path / "run", "llama", resume=tmp_path / "run" / "checkpoints" / "step-000002", **given)
    assert resumed == straight
