"""Two processes under gloo, started by Luthier and by torchrun: what they tell each other, and their gradients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from test_launch import CREW, KILLED, Launcher

import crew
from luthier.errors import RecipeError, RunError
from luthier.training.distributed import World, join
from luthier.training.launch import launch

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["launch", pytest.param("torchrun", marks=pytest.mark.full)])
def told(request, tmp_path_factory):
    """What `crew.exchange` gives, by rank: one start of two processes for all of these tests."""
    if request.param == "launch":
        return json.loads(json.dumps(launch(crew.exchange, (), 2, crew.say_nothing)))
    out = tmp_path_factory.mktemp("torchrun") / "told.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, CREW, out], check=True)
    return json.loads(out.read_text())


def test_the_first_of_two_leads(told):
    assert [one["leads"] for one in told] == [True, False]
    assert [one["size"] for one in told] == [2, 2]


def test_totals_are_exact_and_equal_in_both(told):
    assert [one["total"] for one in told] == [[3.0, 2 * 10**15 + 1, -1.0]] * 2


def test_a_step_is_agreed_on_at_once(told):
    nobody, both = [21, 41, 3, None], [0, 2, 1, max(signal.SIGINT, signal.SIGTERM)]
    assert [one["agree"] for one in told] == [[nobody, both]] * 2


def test_anything_is_gathered_and_shared(told):
    assert [one["gather"] for one in told] == [[{"rank": 0}, {"rank": 1}]] * 2
    assert [one["share"] for one in told] == ["from 0"] * 2


@pytest.mark.parametrize("case", [0, 1], ids=["unequal rows and passes", "a rank with no rows"])
def test_the_gradient_is_that_of_one_process(told, case):
    """With summed losses over the total of supervised tokens; the mean of the ranks' means is off by tenths."""
    net, x, targets = crew.toy()
    rows = list(range(crew.ROWS))
    for step in range(2):
        loss = crew.summed(net, x, targets, rows) / (targets >= 0).sum()
        wanted = torch.autograd.grad(loss, [value for value in net.parameters() if value.requires_grad])
        for one in told:
            for value, other in zip(wanted, one["gradients"][case][step], strict=True):
                torch.testing.assert_close(torch.tensor(other, dtype=torch.float64), value, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for value, gradient in zip((v for v in net.parameters() if v.requires_grad), wanted, strict=True):
                value -= gradient


# Endings


def test_a_signal_to_one_worker_stops_all_in_the_same_step():
    launcher = Launcher("train", "stopped")
    os.kill(json.loads(launcher.ready.removeprefix("ready "))[1], signal.SIGTERM)
    status, said, errors = launcher.end()
    assert (status, errors) == (143, "") and said.startswith("saved at step ") and said.endswith(" after SIGTERM\n")


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("failed", "no room on this device"),
        ("killed", KILLED),
        ("killed in backward", KILLED),
    ],
)
def test_when_one_ends_the_other_does_not_wait_and_one_error_is_told(ending, message, capfd):
    ready = []
    with pytest.raises(RunError) as error:
        launch(crew.train, (ending,), 2, lambda line: ready.append(time.monotonic()))
    assert str(error.value) == message
    assert time.monotonic() - ready[0] < 60  # TIMEOUT is two hours
    assert capfd.readouterr() == ("", "")


# One process


def test_alone_nothing_is_sent_and_torch_distributed_is_not_started():
    world = World.alone(CPU)
    net = torch.nn.Linear(2, 2)
    assert world.leads and world.total([1, 2.5]) == [1.0, 2.5] and world.agree(7, 9, 2, None) == (7, 9, 2, None)
    assert world.agree(7, 9, 2, signal.SIGINT) == (7, 9, 2, signal.SIGINT)
    assert world.gather("me") == ["me"] and world.share("me") == "me" and world.wrap(net) is net
    world.wait()
    with world.not_yet(net, True), join("cpu") as joined:
        assert joined == world
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("size", "devices", "message"),
    [
        ("2", "cpu", "cpu is for 1 process, and 2 are here; start them with --nproc-per-node 1, or name 2 devices"),
        (
            "3",
            ["cpu", "cpu"],
            "[cpu, cpu] is for 2 processes, and 3 are here; start them with --nproc-per-node 2, or name 3 devices",
        ),
    ],
)
def test_as_many_processes_as_devices(size, devices, message, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(RecipeError) as error, join(devices):
        pass
    assert str(error.value) == f"train.devices: {message}"


def test_a_port_that_was_taken_meanwhile_is_no_lost_process(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RunError) as error, join(["cpu", "cpu"]):
            pass
    assert str(error.value) == f"port {port}, where the processes meet, is in use by another program; start again"


def test_one_process_under_torchrun_is_a_world_of_one(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join(["cpu"]) as world:
        assert world == World.alone(CPU)
    assert not torch.distributed.is_initialized()
