"""status.json: the heartbeat, and the step that hangs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from luthier.folder import RunFolder
from luthier.history import place, read_history
from luthier.sections import TrainSection
from luthier.training import pulse as module
from luthier.training.monitor import Facts, Monitor

KEYS = ["state", "phase", "step", "steps", "steps_per_epoch", "usual", "seconds", "left", "memory_gib", "time"]
KEYS += ["progress", "hung", "stopping", "pid", "born", "place", "gpu", "message"]
CARD = [{"name": "a card", "index": 0, "memory_gib": 14.5, "temperature": 79}]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.02)


def facts(seconds: float) -> Facts:
    return Facts(
        loss=2.0, lr=1e-4, grad_norm=1.0, tokens=100, computed=100, supervised=50, rows=4, passes=1, seconds=seconds
    )


def status(folder: RunFolder) -> dict:
    return json.loads(folder.status.read_text())


def until(what, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begun(tmp_path: Path, **options) -> tuple[RunFolder, Monitor, list[str]]:
    folder, said = RunFolder(tmp_path), []
    monitor = Monitor(folder, TrainSection(), said.append, **options)
    monitor.begin(0, 9, 3)
    return folder, monitor, said


def test_it_says_at_once_who_runs_and_goes_on_by_itself(tmp_path, quick):
    folder, monitor, _ = begun(tmp_path, gpus=lambda: CARD)
    first = status(folder)
    assert list(first) == KEYS
    assert (first["state"], first["phase"], first["step"], first["steps"]) == ("running", "starting", 0, 9)
    assert (first["pid"], first["place"], first["gpu"]) == (os.getpid(), place(), CARD)
    assert first["born"] == psutil.Process().create_time() and 0.01 < first["memory_gib"] < 100
    until(lambda: status(folder)["time"] > first["time"] + 0.1)
    assert status(folder)["progress"] == first["progress"]  # it beats, and nothing is done
    until(lambda: status(folder)["gpu"] == CARD)
    monitor.enter("evaluating")
    until(lambda: status(folder)["phase"] == "evaluating")
    monitor.show_step(1, facts(0.5))
    monitor.record(facts(0.5), None)
    until(lambda: (status(folder)["step"], status(folder)["phase"]) == (1, "training"))
    assert json.loads(folder.metrics.read_text())["gpu"] == CARD
    monitor.end("done", "last")
    ended = status(folder)
    assert (ended["state"], ended["phase"], ended["message"]) == ("done", "ended", "last")
    time.sleep(0.1)
    assert status(folder) == ended and list(tmp_path.glob(".*")) == []  # nothing beats any more


def test_a_step_that_hangs_is_marked_and_said_once(tmp_path, quick, monkeypatch):
    monkeypatch.setattr("luthier.history.AT_LEAST", 0.2)
    folder, monitor, said = begun(tmp_path, shown=False)
    for step in range(1, 5):
        monitor.show_step(step, facts(0.05))
    assert read_history(folder).hung is None
    until(lambda: status(folder)["hung"])
    history = read_history(folder)
    assert history.state == "running" and history.hung is not None and 0.5 <= history.hung < 20
    until(lambda: said)
    time.sleep(0.1)
    (line,) = said
    assert line.startswith("step 5 has shown no progress for ")
    assert line.endswith("where a step usually takes 0.1 s: does it hang?")
    monitor.beat()  # a pass is done
    until(lambda: not status(folder)["hung"])
    monitor.enter("saving")  # a disk may be slow
    time.sleep(0.8)
    assert not status(folder)["hung"] and len(said) == 1
    monitor.end("stopped", "x")


def test_a_full_disk_does_not_end_the_heart(tmp_path, quick):
    folder, monitor, _ = begun(tmp_path / "gone" if (tmp_path / "gone").mkdir() else tmp_path / "gone")
    folder.status.unlink()
    (tmp_path / "gone").rename(tmp_path / "away")  # nothing can be written
    time.sleep(0.1)
    (tmp_path / "away").rename(tmp_path / "gone")
    until(folder.status.exists)
    monitor.end("done", "last")
    assert status(folder)["state"] == "done"


def test_a_beat_that_cannot_be_written_leaves_nothing_half_written(tmp_path, quick):
    folder, monitor, _ = begun(tmp_path)
    folder.status.unlink()
    folder.status.mkdir()  # no file can take its place
    time.sleep(0.1)
    with pytest.raises(OSError, match=r"status\.json"):
        monitor.pulse.beat()
    with monitor.pulse.lock:
        assert [path.name for path in tmp_path.iterdir() if "newstate" in path.name] == []
    folder.status.rmdir()
    monitor.end("done", "last")


def test_another_process_than_the_first_writes_nothing(tmp_path, quick):
    folder, monitor, _ = begun(tmp_path, writes=False)
    monitor.show_step(1, facts(1.0))
    monitor.end("done", "last")
    assert list(tmp_path.iterdir()) == []


def test_what_the_folder_tells_of_a_process_that_is_gone(tmp_path, quick):
    folder, monitor, _ = begun(tmp_path)
    monitor.end("done", "last")
    here = status(folder) | {"state": "running"}

    def state(**changes) -> str:
        folder.status.write_text(json.dumps(here | changes))
        return read_history(folder).state

    assert state() == "running"
    assert state(born=here["born"] - 100) == "dead"  # the number has gone to another process
    assert state(pid=2**22 + 1) == "dead"
    assert state(place="elsewhere", pid=2**22 + 1) == "running"  # its heartbeat has to do
    assert state(place="elsewhere", time=here["time"] - 61) == "dead"
    silent = read_history(folder, now=here["time"] + 61)
    folder.status.write_text(json.dumps(here))
    silent = read_history(folder, now=here["time"] + 61)
    assert silent.state == "running" and silent.hung == pytest.approx(here["time"] + 61 - here["progress"])
    folder.status.unlink()
    assert read_history(folder).state == "dead"
