"""What a run's folder tells about the run, read while it trains or long after: without torch, and never half a line.

Everything that shows a run (the live panel, `luthier runs`, the report, a notebook) reads it here.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from luthier.folder import RunFolder, read_json

State = Literal["running", "done", "stopped", "failed", "dead"]

SILENT = 60.0
"""Seconds without a heartbeat after which a run is taken for dead, where its process cannot be asked for."""
HUNG = 10.0
"""Times the usual step: so long without a pass done is a step that hangs."""
AT_LEAST = 5.0
"""Seconds, at least, for a step to hang: ten times a step of 20 ms is a hiccup."""
NEWEST = 20
"""Steps that a running run's speed is the median of."""
RECENT = 50
"""Steps that the usual one is the median of."""


@dataclass
class Growing:
    """A file of JSON lines that another process appends to: what is new is read, and all of it when it was replaced."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    inode: int = 0

    def refresh(self) -> bool:
        """Read what is complete and new; whether anything has changed. The last line may be half written: it waits."""
        try:
            with self.path.open("rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != self.inode or about.st_size < self.read:
                    self.inode, self.read, self.lines = about.st_ino, 0, []
                elif about.st_size == self.read:
                    return False
                file.seek(self.read)
                fresh = file.read()
        except FileNotFoundError:
            return False
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.splitlines():
            try:
                self.lines.append(json.loads(line))
            except json.JSONDecodeError:  # a killed run's last words, before it went on
                continue
        return True


@dataclass(frozen=True)
class History:
    """A run as its folder tells it at one moment. Times are seconds since 1970."""

    folder: RunFolder
    status: dict[str, Any]
    """status.json; empty where there is none yet."""
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    samples: list[dict[str, Any]]
    """The lines of samples.jsonl."""
    now: float

    @cached_property
    def state(self) -> State:
        """running, done, stopped (it can go on), failed (it says why), dead (it could not say why)."""
        told = self.status.get("state", "dead")
        if told != "running":
            return told  # type: ignore[no-any-return]
        return "running" if is_alive(self.status, self.now) else "dead"

    @cached_property
    def hung(self) -> float | None:
        """Seconds since the last sign of progress of a running run whose step hangs, or which gives no heartbeat."""
        if self.state != "running":
            return None
        if self.now - self.status["time"] > SILENT:
            return float(self.now - self.status["progress"])
        return float(self.now - self.status["progress"]) if self.status.get("hung") else None

    @property
    def step(self) -> int:
        """Optimizer steps taken: the newest line tells it, which status.json lags behind."""
        written = self.metrics[-1]["step"] if self.metrics else 0
        return max(int(self.status.get("step", 0)), int(written))

    @property
    def steps(self) -> int | None:
        """Those that the whole run takes."""
        return self.status.get("steps")

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """(step, mean loss over the step's supervised tokens)."""
        return self.series("loss")

    @cached_property
    def eval_losses(self) -> list[tuple[int, float]]:
        """(step, mean loss over the eval rows), step 0 first."""
        return self.series("eval_loss")

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every line that has a value for it."""
        return [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest line of a training step."""
        return next((line for line in reversed(self.metrics) if line["loss"] is not None), None)

    @property
    def best_eval(self) -> tuple[int, float] | None:
        """The lowest eval loss after step 0, with its step."""
        after = [pair for pair in self.eval_losses if pair[0]]
        return min(after, key=lambda pair: pair[1]) if after else None

    @cached_property
    def supervised_share(self) -> float | None:
        """Of the tokens trained on so far."""
        tokens = sum(line["tokens"] for line in self.metrics if line["tokens"])
        return sum(line["supervised"] for line in self.metrics if line["tokens"]) / tokens if tokens else None

    @cached_property
    def speed(self) -> float | None:
        """Tokens a second: of a running run the median of its newest steps, later its tokens by its steps' time."""
        steps = [line for line in self.metrics if line["tokens_per_second"]]
        if not steps:
            return None
        if self.state == "running":
            return float(statistics.median(line["tokens_per_second"] for line in steps[-NEWEST:]))
        tokens = sum(line["tokens"] for line in steps)
        return float(tokens / sum(line["tokens"] / line["tokens_per_second"] for line in steps))

    @property
    def seconds(self) -> float | None:
        """Spent on training so far, resumed parts included; it goes on counting while the run does."""
        if "seconds" not in self.status:
            return None
        ticking = self.now - self.status["time"] if self.state == "running" else 0.0
        return float(self.status["seconds"] + max(0.0, ticking))

    @property
    def left(self) -> float | None:
        """Seconds until the last step of a running run, at its pace so far; None where that is not known."""
        told = self.status.get("left")
        if told is None or self.state != "running":
            return None
        return max(0.0, float(told - (self.now - self.status["time"])))


FROM_METRICS = ("losses", "eval_losses", "supervised_share")
"""What of a History holds as long as there are no new lines: 20,000 of them are not added up every second."""


class Follower:
    """Reads one run again and again, each time only what is new."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.metrics, self.samples = Growing(folder.metrics), Growing(folder.samples)
        self.reckoned: dict[str, Any] = {}

    def look(self, now: float | None = None) -> History:
        """The run as it stands now."""
        fresh = self.metrics.refresh()
        self.samples.refresh()
        status = read_json(self.folder.status) or {}
        moment = time.time() if now is None else now
        history = History(self.folder, status, list(self.metrics.lines), list(self.samples.lines), moment)
        if not fresh:
            vars(history).update({name: value for name, value in self.reckoned.items() if name in FROM_METRICS})
        self.reckoned = vars(history)
        return history


def read_history(folder: RunFolder, now: float | None = None) -> History:
    """A run as it stands now."""
    return Follower(folder).look(now)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines, up to the one, if any, that a killed run left half written; none where it is not there."""
    file = Growing(path)
    file.refresh()
    return file.lines


def is_alive(status: dict[str, Any], now: float) -> bool:
    """Is the process that wrote this status still there? On another machine, its heartbeat has to do."""
    if status["place"] != place():
        return bool(now - status["time"] <= SILENT)
    import psutil

    try:
        process = psutil.Process(status["pid"])
        return abs(process.create_time() - status["born"]) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def place() -> str:
    """Where a process's number means something: this machine since it was started, and in it this container."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [boot.read_text("ascii").strip()] if boot.is_file() else []
    known += [str(space.readlink())] if space.is_symlink() else []
    return " ".join([socket.gethostname(), *known])


def hangs(waited: float, usual: float | None) -> bool:
    """Has a step hung that has shown no sign of progress for so long? usual: the median step; both seconds."""
    return usual is not None and waited > max(HUNG * usual, AT_LEAST)


def usual_step(seconds: list[float]) -> float | None:
    """The median of the newest steps' seconds; None before there are three."""
    return statistics.median(seconds[-RECENT:]) if len(seconds) > 2 else None
