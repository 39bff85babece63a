"""metrics.jsonl, status.json and the plain lines."""

from __future__ import annotations

import json
import time

import pytest

from luthier.folder import RunFolder
from luthier.sections import TrainSection
from luthier.training import monitor as module
from luthier.training.monitor import Facts, Monitor
from luthier.words import duration

FACTS = Facts(
    loss=2.34561, lr=9.6e-5, grad_norm=1.234, tokens=2468, computed=1900, supervised=700, rows=16, passes=2, seconds=2.0
)
KEYS = ["step", "epoch", "time", "loss", "eval_loss", "lr", "grad_norm", "tokens", "computed"]
KEYS += ["supervised", "rows", "passes"]
KEYS += ["tokens_per_second", "memory_gib", "gpu"]


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def lines(folder):
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def status(folder):
    return json.loads(folder.status.read_text())


def test_a_line_has_every_key_and_null_where_there_is_nothing(folder):
    monitor = Monitor(folder, TrainSection(), print)
    assert monitor.begin(0, 6, 3) == []
    monitor.record(None, 3.5)
    monitor.show_step(1, FACTS)
    monitor.record(FACTS, None)
    first, second = lines(folder)
    assert list(first) == list(second) == KEYS
    assert (first["step"], first["eval_loss"], first["loss"], first["tokens"]) == (0, 3.5, None, None)
    expected = {"step": 1, "epoch": 0.333333, "loss": 2.34561, "eval_loss": None, "lr": 9.6e-5, "grad_norm": 1.234}
    expected |= {
        "tokens": 2468,
        "computed": 1900,
        "supervised": 700,
        "rows": 16,
        "passes": 2,
        "tokens_per_second": 1234.0,
        "gpu": None,
    }
    assert {key: second[key] for key in expected} == expected
    assert abs(second["time"] - time.time()) < 60
    assert 0.01 < second["memory_gib"] < 100


def test_lines_stack_as_columns(folder, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    said = []
    monitor = Monitor(folder, TrainSection(), said.append)
    monitor.begin(0, 282, 94)
    monitor.show_eval(2.5, "before training")
    now[0] += 11.11
    monitor.show_step(12, FACTS)
    monitor.show_step(120, Facts(12.3, 1.0e-4, 1234.5, 1_234_567, 9, 9, 9, 1, 1.0))
    monitor.show_eval(2.1234, "best so far")
    assert said == [
        "eval    0/282  epoch 0.00  loss  2.5000  before training",
        "step   12/282  epoch 0.13  loss  2.3456  lr 9.6e-05  grad     1.23      1,234 tok/s  left 4 min 10 s",
        "step  120/282  epoch 1.28  loss 12.3000  lr 1.0e-04  grad 1.23e+03  1,234,567 tok/s  left 15 s",
        "eval  120/282  epoch 1.28  loss  2.1234  best so far",
    ]


def test_the_first_step_tells_no_time_and_is_not_counted(folder, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    said = []
    monitor = Monitor(folder, TrainSection(), said.append)
    monitor.begin(0, 12, 12)
    for step, took in ((1, 100.0), (2, 5.0), (12, 50.0)):
        now[0] += took
        monitor.show_step(step, FACTS)
    assert [line.rpartition("left ")[2] for line in said] == ["–", "50 s", "0 s"]


def test_log_every_also_shows_the_first_and_the_last(folder):
    said = []
    monitor = Monitor(folder, TrainSection(log_every=4), said.append)
    monitor.begin(0, 10, 10)
    for step in range(1, 11):
        monitor.show_step(step, FACTS)
        monitor.record(FACTS, None)
    assert [int(line.split()[1].split("/")[0]) for line in said] == [1, 4, 8, 10]
    assert len(lines(folder)) == 10  # the file has every step


def test_metrics_are_cut_back_to_the_step_of_the_checkpoint(folder):
    monitor = Monitor(folder, TrainSection(), lambda line: None)
    monitor.begin(0, 10, 10)
    monitor.record(None, 3.0)
    for step in range(1, 8):
        monitor.show_step(step, FACTS)
        monitor.record(FACTS, None)
    with folder.metrics.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while it wrote
    kept = Monitor(folder, TrainSection(), lambda line: None).begin(5, 10, 10)
    assert [line["step"] for line in kept] == [0, 1, 2, 3, 4, 5]
    assert lines(folder) == kept
    assert Monitor(folder, TrainSection(), print).begin(0, 10, 10) == []  # a new run starts a new file
    assert folder.metrics.read_text() == ""


def test_samples_are_cut_back_as_well(folder):
    monitor = Monitor(folder, TrainSection(), lambda line: None)
    monitor.begin(0, 10, 10)
    assert not folder.samples.exists()
    for step in (0, 4, 8):
        monitor.record_samples([{"step": step, "prompt": "你好", "reply": str(step), "stopped": True}])
    assert "你好" in folder.samples.read_text("utf-8")
    Monitor(folder, TrainSection(), lambda line: None).begin(5, 10, 10)
    assert [json.loads(line)["reply"] for line in folder.samples.read_text("utf-8").splitlines()] == ["0", "4"]
    Monitor(folder, TrainSection(), lambda line: None).begin(0, 10, 10)
    assert folder.samples.read_text() == ""


def test_what_breaks_off_the_run_is_its_status(folder):
    monitor = Monitor(folder, TrainSection(), lambda line: None)
    monitor.begin(0, 9, 3)
    with pytest.raises(ValueError, match="what went wrong"), monitor.told():
        raise ValueError("what went wrong")
    assert (status(folder)["state"], status(folder)["message"]) == ("failed", "what went wrong")
    with pytest.raises(KeyboardInterrupt), monitor.told():
        raise KeyboardInterrupt
    assert (status(folder)["state"], status(folder)["message"]) == ("stopped", "nothing new: interrupted")


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 250, 3599, 7500)] == [
        "0 s",
        "1 min 00 s",
        "4 min 10 s",
        "59 min 59 s",
        "2 h 05 min",
    ]
