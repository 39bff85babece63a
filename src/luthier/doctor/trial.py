"""Stages that are tried out in a process of their own (probe.py): a library that crashes or hangs is a line, no end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO

from luthier.doctor.finding import Finding, brief
from luthier.doctor.probe import failed, without_torch

PATIENCE = 120.0
"""Seconds for one stage: a first import of torch from a network disk takes a minute."""


def tried(stages: Sequence[str], patience: float = PATIENCE) -> Iterator[Finding]:
    """The findings of the stages as they are known; each has `patience` seconds from one line to the next.

    When a stage takes its process along, a fresh one goes on with the next. Without torch the others that need it
    are left out.
    """
    waiting = list(stages)
    while waiting:
        with tempfile.TemporaryFile() as errors:
            process = _start(waiting, errors)
            try:
                yield from _follow(process, waiting, patience, errors)
            finally:
                process.kill()
                process.wait()


def _start(stages: Sequence[str], errors: IO[bytes]) -> subprocess.Popen[str]:
    # -P: a folder `datasets` or a file `random.py` where the user stands is no library
    command = [sys.executable, "-P", "-W", "ignore", "-m", "luthier.doctor.probe", *stages]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=errors, env=environment, encoding="utf-8")


def _follow(
    process: subprocess.Popen[str], waiting: list[str], patience: float, errors: IO[bytes]
) -> Iterator[Finding]:
    """Read one process; what is done is taken off `waiting`, and so is the stage that ended it."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pour, args=(process, lines), daemon=True).start()
    bad = False
    while waiting:
        try:
            line = lines.get(timeout=patience)
        except queue.Empty:
            bad, line = True, None
            yield failed(waiting[0], f"does not come back (waited {patience:g} s)")
        else:
            if line is None:
                bad = True
                yield failed(waiting[0], _death(process.wait(), errors))
        told = json.loads(line) if line else {"done": waiting[0]}
        if "done" not in told:
            finding = Finding(**told)
            bad = bad or finding.mark == "✗"
            yield finding
            continue
        stage = waiting.pop(0)
        if bad and stage == "torch":
            waiting[:] = without_torch(waiting)
        if line is None or (bad and stage == "torch"):
            return


def _pour(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as out:
        for line in out:
            lines.put(line)
    lines.put(None)


def _death(status: int, errors: IO[bytes]) -> str:
    """How a process ended, with the last error that it wrote: OpenMP aborts with a line that says it all."""
    how = f"ends with {signal.Signals(-status).name}" if status < 0 else f"ends the process, status {status}"
    errors.seek(0)
    said = [line for line in errors.read().decode("utf-8", "replace").splitlines() if "rror" in line]
    return f"{how}: {brief(said[-1])}" if said else how
