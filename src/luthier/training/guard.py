"""What stops a run: a tensor that does not move, a loss that is not finite, a full disk or device, a signal."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from luthier.engine.memory import is_full
from luthier.errors import RunError
from luthier.folder import FULL
from luthier.training.checkpoint import latest
from luthier.training.launch import ECHO, heeded, launched
from luthier.training.optim import has_gradient

CHECKED = 3
"""Steps after which every trainable tensor must have moved: LoRA's A moves from the second step on, when B is not 0."""
CHECKED_AGAIN = 20
"""Where rounding swallows the first steps of a warm-up: then, or at the end of a longer warm-up."""
NAMED = 5
"""Rows or tensors that a message names at most."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Movement:
    """Every trainable tensor must leave its initial value: the adapter that trains without effect is found here.

    One exception: early in a warm-up a step may be smaller than the spacing of fp32 at a weight of 1 (6e-8), though
    gradients do arrive. It is said, and checked again when the rate has been at its peak. (A key's bias without rotary
    positions, which softmax does not see, is none: the rounding of its gradient moves it, measured with OPT.) The
    values are remembered as one number a tensor, so that full fine-tuning costs no second copy of the model.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        step: int,
        warmup: int,
        say: Callable[[str], None],
    ) -> None:
        """A run that resumes at `step` is checked only for what is still due: a schedule's last rates move little."""
        self.parameters, self.optimizer, self.warmup, self.say = parameters, optimizer, warmup, say
        self.again = max(CHECKED_AGAIN, warmup)
        due = step < max(CHECKED, min(warmup, CHECKED_AGAIN))
        self.before = {name: fingerprint(parameter) for name, parameter in parameters.items()} if due else {}

    def check(self, step: int) -> None:
        """Call after each step, from 1. Errors: RunError naming the tensors that have not moved and should have."""
        if step not in (CHECKED, self.again):
            return
        still = [name for name, value in self.before.items() if fingerprint(self.parameters[name]) == value]
        expected = [
            name for name in still if step < self.warmup and has_gradient(self.optimizer, self.parameters[name])
        ]
        if len(still) > len(expected):
            raise RunError(self._message(step, [name for name in still if name not in expected]))
        if expected:
            self.say(
                f"not moved after {step} steps, since the warm-up's first steps are lost in rounding: "
                f"{_some(expected)}; checked again after step {self.again}"
            )
        self.before = {name: self.before[name] for name in expected}

    def _message(self, step: int, names: list[str]) -> str:
        lost = [name for name in names if has_gradient(self.optimizer, self.parameters[name])]
        dead = [name for name in names if name not in lost]
        reasons = [f"no gradient reaches {_some(dead)}: are they used in the forward pass?"] if dead else []
        if lost:
            dtype = str(self.parameters[lost[0]].dtype).removeprefix("torch.")
            reasons += [f"the steps of {_some(lost)} are lost in the rounding of {dtype}: raise train.lr or use fp32"]
        return f"after {step} steps {len(names)} trainable tensor(s) have not moved; " + "; ".join(reasons)


def fingerprint(tensor: torch.Tensor) -> int:
    """A number that changes when a value does: the bits of each row, summed and weighted at random."""
    bits = tensor.detach().view(_INTEGERS[tensor.element_size()])
    rows = bits.reshape(-1, bits.shape[-1]) if bits.ndim > 1 else bits.reshape(-1, 1)
    weights = torch.randint(2**62, (len(rows),), generator=torch.Generator().manual_seed(0))
    return int((rows.sum(-1, dtype=torch.int64) * weights.to(tensor.device)).sum())


def not_finite(
    where: str,
    rows: Iterable[int],
    finite_alone: Callable[[int], bool],
    origin: Callable[[int], str],
    checkpoints: Path,
) -> RunError:
    """The error for a loss or gradient that is not finite, naming at most five rows that are so by themselves.

    Where the first six rows all are, it is not theirs.
    """
    bad: list[str] = []
    tried = 0
    for tried, row in enumerate(rows, start=1):
        if not finite_alone(row):
            bad.append(origin(row))
        if len(bad) == (NAMED + 1 if tried == len(bad) else NAMED):
            break
    if tried == len(bad) > 2:
        named, remedy = "every row gives this by itself", "it is the weights: lower train.lr, or compute in fp32"
    else:
        named = f"rows that give this by themselves: {_some(bad)}" if bad else "no row gives this by itself"
        remedy = "look at those rows, " * bool(bad) + "lower train.lr, or compute in fp32"
    last = latest(checkpoints) or "none yet"
    return RunError(f"{where}; this step has changed no weight; {named}; last good checkpoint: {last}; {remedy}")


@dataclass
class Stop:
    """The signal that asked the run to stop, once there was one."""

    signal: int | None = None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """A signal of launch.STOPS only sets `Stop.signal`: the step in hand is finished. A second acts as it always does.

    An echo of the first does not (launch.ECHO); nor does any other in a process that Luthier or torchrun launched: the
    system may signal all of them, and then the launcher passes its own on. That one ends all where it has to be.
    """
    stop, came = Stop(), 0.0
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield stop
        return
    before = {number: signal.getsignal(number) for number in heeded()}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if stop.signal is None:
            stop.signal, came = number, time.monotonic()
        elif not launched() and time.monotonic() - came > ECHO:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()


@contextmanager
def clear_when_full(checkpoints: Path, remedy: str = "free some space and resume") -> Iterator[None]:
    """One line instead of a traceback when the disk or the device's memory has no room. Errors: RunError."""
    try:
        yield
    except Exception as error:  # tokenizers has no narrower one
        if is_full(error):
            raise RunError(
                "out of memory on the device; lower train.tokens_per_pass or set train.activation_checkpointing: true "
                "(neither changes the result), or lower data.max_length"
            ) from error
        if _errno(error) not in FULL:
            raise
        last = latest(checkpoints) or "none yet"
        raise RunError(
            f"{checkpoints.parent}: no room left on the disk; last good checkpoint: {last}; {remedy}"
        ) from error


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and tokenizers, in Rust, tell it only so
    return int(number[1]) if number else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
