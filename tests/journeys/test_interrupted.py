"""Runs that end before their time, as a user meets it: Ctrl-C, a closed terminal, a process that the system kills."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from shell import ENVIRONMENT, LUTHIER, begin

TWO = "train.devices=[cpu, cpu]"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of many steps."""
    folder = tmp_path_factory.mktemp("interrupted")
    begin(folder, train={"steps": 4000, "save_every": 4000})
    return folder


def started(folder: Path, *arguments: str, **options: Any) -> Any:
    """A verb that runs, in a process group of its own as a shell starts it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "process_group": 0}
    return subprocess.Popen([LUTHIER, *arguments], cwd=folder, env=ENVIRONMENT, **pipes | options)


def until_step(process: Any, count: int = 1) -> None:
    steps = (line for line in process.stdout if line.startswith("step"))
    for _ in range(count):
        next(steps)


def workers_of(process: Any) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [0.1, 2, *(pytest.param(other, marks=pytest.mark.full) for other in (0, 0.5))])
def test_before_it_trains_a_signal_ends_all_in_silence(here: Path, moment: float, number: int) -> None:
    """Since there is a first worker, which imports for seconds."""
    process = started(here, "train", "town.yaml", TWO)
    while not workers_of(process):
        time.sleep(0.001)
    time.sleep(moment)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode in (128 + number, -number) and errors == ""


@pytest.mark.full
def test_sighup_stops_after_the_step(here: Path) -> None:
    process = started(here, "train", "town.yaml", "run=hung_up")
    until_step(process)
    process.send_signal(signal.SIGHUP)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (129, "")
    assert said.splitlines()[-1].endswith("; go on with: luthier train runs/hung_up --resume")


@pytest.mark.parametrize("devices", ["train.devices=cpu", pytest.param(TWO, marks=pytest.mark.full)])
def test_a_closed_terminal_stops_it_as_well(here: Path, devices: str) -> None:
    """Its lines cannot be written any more; the step is finished and saved all the same."""
    name = f"terminal{len(devices)}"
    ours, theirs = pty.openpty()
    pipes = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", LUTHIER, "train", "town.yaml", devices, f"run={name}"],
        cwd=here, env=ENVIRONMENT, **pipes,
    )  # fmt: skip
    os.close(theirs)
    metrics, said = here / "runs" / name / "metrics.jsonl", b""
    while not metrics.exists() or '"step": 2' not in metrics.read_text():
        said += os.read(ours, 1000)
    assert "│ eval loss" in said.decode(errors="replace")  # the panel was there
    os.close(ours)
    process.wait(timeout=60)
    status = json.loads((here / "runs" / name / "status.json").read_text())
    assert status["state"] == "stopped"
    assert (here / "runs" / name / "checkpoints" / f"step-{status['step']:06d}").is_dir()


@pytest.mark.full
def test_under_nohup_a_closed_terminal_stops_nothing(here: Path) -> None:
    process = started(here, "train", "town.yaml", "train.steps=40", "run=nohup",
                      preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # fmt: skip
    until_step(process)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.full
def test_a_process_that_the_system_kills(here: Path) -> None:
    """One line that says what there is, and the reason in status.json is not gloo's."""
    process = started(here, "train", "town.yaml", TWO, "run=killed", "train.save_every=3")
    until_step(process, 1)
    while not list((here / "runs" / "killed" / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    leader = json.loads((here / "runs" / "killed" / "status.json").read_text())["pid"]
    (other,) = [pid for pid in workers_of(process) if pid != leader]
    os.kill(other, signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    newest = max(path.name for path in (here / "runs" / "killed" / "checkpoints").glob("step-*"))
    assert process.returncode == 1 and errors == (
        "error: process 2 of 2 was killed by SIGKILL (as the system does when memory runs out); newest checkpoint: "
        f"step {int(newest[5:])}; go on with: luthier train runs/killed --resume\n"
    )
    status = json.loads((here / "runs" / "killed" / "status.json").read_text())
    assert errors == f"error: {status['message']}\n" and status["state"] == "failed"
