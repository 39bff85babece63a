"""What stops a run, with its exact words."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from luthier.errors import RunError
from luthier.training import guard
from luthier.training.guard import Movement, clear_when_full, fingerprint, not_finite, stoppable
from luthier.training.launch import STOPS
from luthier.training.optim import set_lr


def movement(steps, dtype=torch.float32, unused=False, warmup=0, lr=1e-3, size=2, resumed=0):
    """Train `used` (and not `unused`) up to step `steps` with the check on; what it says."""
    parameters = {"used": nn.Parameter(torch.ones(size, dtype=dtype))}
    if unused:
        parameters["unused"] = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr)
    said = []
    check = Movement(parameters, optimizer, resumed, warmup, said.append)
    for step in range(resumed + 1, steps + 1):
        set_lr(optimizer, lr * min(1, step / max(warmup, 1)))
        parameters["used"].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        check.check(step)
    return said


def test_tensors_that_move_pass_in_silence():
    assert movement(25) == []


def test_a_tensor_that_no_gradient_reaches_stops_the_run_after_three_steps():
    assert movement(2, unused=True) == []
    with pytest.raises(RunError) as error:
        movement(3, unused=True, warmup=1000)
    assert str(error.value) == (
        "after 3 steps 1 trainable tensor(s) have not moved; "
        "no gradient reaches unused: are they used in the forward pass?"
    )


def test_steps_that_rounding_swallows_stop_the_run():
    with pytest.raises(RunError) as error:
        movement(3, dtype=torch.bfloat16)
    assert str(error.value) == (
        "after 3 steps 1 trainable tensor(s) have not moved; "
        "the steps of used are lost in the rounding of bfloat16: raise train.lr or use fp32"
    )


def test_early_in_a_warm_up_they_are_expected_and_checked_again():
    said = movement(19, dtype=torch.bfloat16, warmup=10)
    assert said == [
        "not moved after 3 steps, since the warm-up's first steps are lost in rounding: used; "
        "checked again after step 20"
    ]
    with pytest.raises(RunError, match="^after 20 steps 1 trainable tensor"):
        movement(20, dtype=torch.bfloat16, warmup=10)


def test_a_long_warm_up_has_until_its_end():
    said = movement(99, warmup=100, lr=2.5e-8)  # at a weight of 1, fp32 rounds steps below 3e-8 away
    assert said == [
        "not moved after 3 steps, since the warm-up's first steps are lost in rounding: used; "
        "checked again after step 100"
    ]
    with pytest.raises(RunError) as error:
        movement(100, warmup=100, lr=2.5e-8)
    assert str(error.value) == (
        "after 100 steps 1 trainable tensor(s) have not moved; "
        "the steps of used are lost in the rounding of float32: raise train.lr or use fp32"
    )
    assert len(movement(120, warmup=100, lr=5e-7)) == 1


@pytest.mark.parametrize(("resumed", "warmup"), [(3, 0), (10, 10), (20, 0), (20, 1000), (297, 10)])
def test_what_is_behind_a_resumed_run_is_not_checked_again(resumed, warmup):
    assert movement(1001, resumed=resumed, warmup=warmup, lr=0) == []


@pytest.mark.parametrize(("resumed", "warmup", "checked"), [(2, 0, 3), (2, 1000, 1000), (9, 10, 20), (19, 1000, 1000)])
def test_what_is_ahead_of_a_resumed_run_is_checked(resumed, warmup, checked):
    movement(checked - 1, resumed=resumed, warmup=warmup, lr=0)
    with pytest.raises(RunError, match=f"^after {checked} steps 1 trainable tensor"):
        movement(checked, resumed=resumed, warmup=warmup, lr=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_sees_one_bit_and_any_swap(dtype):
    tensor = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    first = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == first
    assert fingerprint(tensor.T.contiguous().T) == first  # values count, not how they lie in memory
    changed = tensor.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2], torch.tensor(9.0, dtype=dtype))
    assert fingerprint(changed) != first
    assert fingerprint(tensor.flip(0)) != first
    assert fingerprint(torch.tensor([1.0, 2.0])) != fingerprint(torch.tensor([2.0, 1.0]))
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))


def test_rows_that_are_not_finite_are_named_and_the_last_checkpoint(tmp_path):
    (tmp_path / "step-000005").mkdir()
    (tmp_path / "step-000005" / "state.json").write_text("{}")
    error = not_finite("step 7: loss nan, gradient norm nan", range(20), lambda row: row < 8, "a:{}".format, tmp_path)
    assert str(error) == (
        "step 7: loss nan, gradient norm nan; this step has changed no weight; rows that give this by themselves: "
        f"a:8, a:9, a:10, a:11, a:12; last good checkpoint: {tmp_path}/step-000005; "
        "look at those rows, lower train.lr, or compute in fp32"
    )


def test_where_all_rows_are_so_it_is_not_theirs(tmp_path):
    error = not_finite("step 2: …", range(20), lambda row: row > 9, "a:{}".format, tmp_path)
    assert str(error) == (
        "step 2: …; this step has changed no weight; every row gives this by itself; last good checkpoint: none yet; "
        "it is the weights: lower train.lr, or compute in fp32"
    )
    error = not_finite("step 2: …", range(20), lambda row: row == 5 or row > 12, "a:{}".format, tmp_path)
    assert "themselves: a:0, a:1, a:2, a:3, a:4; last" in str(error)


def test_no_row_alone(tmp_path):
    error = not_finite("step 1: …", range(2), lambda row: True, "a:{}".format, tmp_path)
    assert "; no row gives this by itself; last good checkpoint: none yet; " in str(error)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, error):
    with pytest.raises(RunError) as caught, clear_when_full(tmp_path / "checkpoints"):
        raise error
    assert str(caught.value) == (
        f"{tmp_path}: no room left on the disk; last good checkpoint: none yet; free some space and resume"
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_full_device_is_one_line(tmp_path, error):
    with pytest.raises(RunError) as caught, clear_when_full(tmp_path):
        raise error
    assert str(caught.value) == (
        "out of memory on the device; lower train.tokens_per_pass or set train.activation_checkpointing: true "
        "(neither changes the result), or lower data.max_length"
    )


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(RuntimeError, match="^shapes$"), clear_when_full(tmp_path):
        raise RuntimeError("shapes")
    with pytest.raises(PermissionError), clear_when_full(tmp_path):
        raise PermissionError(errno.EACCES, "no")


@pytest.fixture
def acted():
    """What the handlers of before were called with."""
    seen = []
    before = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in STOPS}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPS)
def test_the_first_signal_asks_and_the_second_acts(monkeypatch, acted, number):
    monkeypatch.setattr(guard, "ECHO", 0.2)
    mine = signal.getsignal(number)
    with stoppable() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number and acted == []
        os.kill(os.getpid(), number)  # `timeout` signals its child, and then its child's group
        assert stop.signal == number and acted == []
        time.sleep(0.3)
        os.kill(os.getpid(), number)
        assert acted == [number]
    assert signal.getsignal(number) is mine


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_ignored_stays_ignored(acted, number):
    """A script's `&` has SIGINT ignored, nohup SIGHUP."""
    signal.signal(number, signal.SIG_IGN)
    with stoppable() as stop:
        os.kill(os.getpid(), number)
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM and signal.getsignal(number) is signal.SIG_IGN


def test_a_launched_process_always_finishes_its_step(monkeypatch, acted):
    """systemd and Slurm signal every process, and the launcher then passes its own signal on."""
    monkeypatch.setattr(guard, "ECHO", -1.0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with stoppable() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGTERM and acted == []


def test_another_thread_runs_without_signals():
    seen = []

    def work():
        with stoppable() as stop:
            seen.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
