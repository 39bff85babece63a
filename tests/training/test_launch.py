"""Processes that are started, listened to and ended: without torch, so that each takes a tenth of a second to start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import crew
from luthier.errors import DataError, RecipeError, RunError
from luthier.training import launch as launching
from luthier.training.launch import LostError, launch, launched, rank, speaks

CREW = Path(crew.__file__)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(launching, "GRACE", 0.2)


def failure(*how):
    with pytest.raises((RecipeError, RunError, OSError)) as error:
        launch(crew.fail, how, 2, crew.say_nothing)
    return error.value


# What comes back


def test_every_worker_knows_its_place_and_only_the_first_is_heard(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said = []
    result = launch(crew.introduce, (tmp_path,), 3, said.append)
    seen = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3)]
    assert said == ["I am 0"] and result == seen[0]
    assert [one["RANK"] for one in seen] == [one["LOCAL_RANK"] for one in seen] == ["0", "1", "2"]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    for one in seen:
        assert one["WORLD_SIZE"] == "3" and one["MASTER_ADDR"] == "127.0.0.1" and one["OMP_NUM_THREADS"] == threads
        assert one["group"], "a worker in the terminal's process group would get every Ctrl-C twice"


def test_the_users_number_of_threads_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch(crew.introduce, (tmp_path,), 2, crew.say_nothing)["OMP_NUM_THREADS"] == "7"


def test_a_worker_knows_that_it_was_launched(monkeypatch):
    assert not launched() and rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert not launched() and rank() == 0  # some schedulers set it alone
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched() and rank() == 3


# Failures: one error, that of the process that failed first


def test_a_mistake_that_all_find_is_raised_once(capfd):
    error = failure("both")
    assert type(error) is RecipeError and str(error) == "recipe.yaml:3: train.lr: wrong in every process"
    assert "in fail\n" in error.__notes__[0]  # for --debug
    assert capfd.readouterr() == ("", "")


def test_what_befalls_one_process_ends_the_others(soon, capfd):
    began = time.monotonic()
    error = failure("run")
    assert type(error) is RunError and str(error) == "only here"
    assert time.monotonic() - began < 5
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "name", "message"), [("missing", "rows", "[Errno 2] No such file: 'rows'"), ("file", None, "odd x")]
)
def test_operating_system_errors_come_back_as_such(soon, how, name, message):
    error = failure(how)
    assert isinstance(error, OSError) and error.filename == name and str(error) == message


KILLED = "process 2 of 2 was killed by SIGKILL (as the system does when memory runs out)"


def test_a_killed_process_is_named(soon, capfd):
    assert str(failure("killed")) == KILLED
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("there", "status", "said"),
    [
        ([], None, "no checkpoint yet"),
        (["step-000002", "step-1000000", ".step-1000002.abc"], "running", "newest checkpoint: step 1000000"),
        (["step-000002"], "done", "it is trained to its end"),
    ],
)
def test_it_is_said_where_a_killed_run_stands(soon, tmp_path, monkeypatch, there, status, said):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "town"
    for name in there:
        (run / "checkpoints" / name).mkdir(parents=True)
    if status is not None:
        (run / "status.json").write_text(json.dumps({"state": status}))
    assert str(failure("killed", run)) == f"{KILLED}; {said}; go on with: luthier train runs/town --resume"


def test_where_one_does_not_start_the_others_end(monkeypatch):
    start, started = launching._start, []

    def only_one(number, count, port):
        if number:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(start(number, count, port))
        return started[0]

    monkeypatch.setattr(launching, "_start", only_one)
    with pytest.raises(BlockingIOError):
        launch(crew.load, (), 2, crew.say_nothing)
    assert started[0].process.returncode == -signal.SIGKILL


def test_a_bug_shows_its_traceback(soon, capfd):
    assert str(failure("bug")) == "process 2 of 2 failed; its last words are above"
    assert capfd.readouterr().err.endswith("ZeroDivisionError: a bug\n")


def test_under_torchrun_the_first_process_says_what_all_have_found(soon, monkeypatch):
    errors = [DataError("rows"), RunError("memory"), LostError("another has ended")]
    assert [speaks(error) for error in errors] == [True, True, True]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [speaks(error) for error in errors] == [False, True, False]


# Signals: to a launcher in a process of its own


class Launcher:
    """A launcher in a process group of its own, as a shell starts it; up to the first line of its first worker."""

    def __init__(self, function, *arguments, ignoring=None):
        """`ignoring`: a signal, as nohup has it ignored."""
        self.process = subprocess.Popen(
            [sys.executable, CREW, "launch", function, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            preexec_fn=ignoring and (lambda: signal.signal(ignoring, signal.SIG_IGN)),
        )
        self.ready = self.process.stdout.readline()
        self.workers = workers_of(self.process.pid)
        assert self.ready.startswith("ready") and len(self.workers) == 2, self.process.communicate()

    def end(self, seconds=10):
        """(exit status, what it said since, standard error)"""
        said, errors = self.process.communicate(timeout=seconds)
        deadline = time.monotonic() + 5
        while any(is_there(worker) for worker in self.workers):
            assert time.monotonic() < deadline, "a worker outlives its launcher"
            time.sleep(0.02)
        return self.process.returncode, said, errors


def workers_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid):
    """Not a zombie either: those wait for a parent that may be init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_alone_is_waited_for(number):
    launcher = Launcher("finish_the_step")
    launcher.process.send_signal(number)
    assert launcher.end() == (128 + number, f"saved after {number.name}, signals: 1\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_ignored_stays_ignored(number):
    """A script's `&` and nohup: neither the launcher nor a worker, signalled by itself, heeds it."""
    launcher = Launcher("finish_the_step", ignoring=number)
    for pid in (launcher.process.pid, *launcher.workers):
        os.kill(pid, number)
    time.sleep(0.3)
    launcher.process.terminate()
    assert launcher.end() == (143, "saved after SIGTERM, signals: 1\n", "")


def test_who_misses_those_that_a_signal_ended_is_no_failure():
    """Ctrl-C right after the last step: one process is still in it, and the other not any more."""
    launcher = Launcher("part")
    launcher.process.terminate()
    assert launcher.end() == (-signal.SIGTERM, "", "")


def test_ctrl_c_reaches_each_worker_once():
    launcher = Launcher("finish_the_step")
    os.killpg(launcher.process.pid, signal.SIGINT)  # as a terminal does
    assert launcher.end() == (130, "saved after SIGINT, signals: 1\n", "")


def test_the_echo_of_a_signal_is_the_same_signal():
    launcher = Launcher("finish_the_step")
    for _ in range(2):  # as `timeout` does
        launcher.process.terminate()
        time.sleep(0.1)
    assert launcher.end() == (143, "saved after SIGTERM, signals: 1\n", "")


def test_a_second_signal_ends_at_once():
    launcher = Launcher("load")
    for worker in launcher.workers:
        os.kill(worker, signal.SIGSTOP)  # a worker that does not end by the first
    launcher.process.terminate()
    time.sleep(launching.ECHO + 0.2)
    launcher.process.terminate()
    assert launcher.end() == (-signal.SIGTERM, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_training_a_signal_ends_it_as_it_ends_any_process(number):
    launcher = Launcher("load")
    os.killpg(launcher.process.pid, number)
    status, said, errors = launcher.end()
    assert (status, said) == (-number, "")
    assert errors.count("Traceback") == (number == signal.SIGINT)  # Python's own, of the launcher's KeyboardInterrupt


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(other, marks=pytest.mark.full) for other in (signal.SIGTERM, signal.SIGHUP))],
)
def test_a_signal_while_the_workers_start_ends_it_just_so(number):
    """At any moment since there is a first one: Python shows a traceback where Ctrl-C meets its imports."""
    for moment in range(10):
        process = subprocess.Popen(
            [sys.executable, CREW, "launch", "load"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        )  # fmt: skip
        while not workers_of(process.pid):
            time.sleep(0.001)
        time.sleep(moment * 0.02)
        os.killpg(process.pid, number)
        errors = process.communicate(timeout=10)[1]
        assert process.returncode == -number
        assert errors.count("Traceback") == (number == signal.SIGINT) and "work()" not in errors, (moment, errors)


def test_workers_do_not_outlive_a_killed_launcher():
    launcher = Launcher("load")
    launcher.process.kill()
    assert launcher.end() == (-signal.SIGKILL, "", "")
