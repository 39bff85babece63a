"""One stream of facts → metrics.jsonl, status.json and a plain line for the screen."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

from luthier.folder import RunFolder, write_atomic, write_json
from luthier.sections import TrainSection
from luthier.words import duration

GIB = 1024**3


@dataclass(frozen=True)
class Facts:
    """One optimizer step. loss: mean over its supervised tokens; tokens: without padding; seconds: the step alone."""

    loss: float
    lr: float
    grad_norm: float
    tokens: int
    supervised: int
    rows: int
    passes: int
    seconds: float


class Monitor:
    """Reports a run. `time` is seconds since 1970; `memory_gib` the peak so far, on the GPU where there is one.

    A line of metrics.jsonl has every key, null where a step has no such fact; step 0 has an eval loss only.
    Of several processes that train together one alone `writes`.
    """

    def __init__(
        self, folder: RunFolder, section: TrainSection, say: Callable[[str], None], *, writes: bool = True
    ) -> None:
        self.folder, self.log_every, self.say, self.writes = folder, section.log_every, say, writes
        self.first = self.since = self.step = self.steps = 0
        self.steps_per_epoch = 1
        self.began = self.beaten = 0.0

    def begin(self, step: int, steps: int, steps_per_epoch: int) -> list[dict[str, Any]]:
        """Start at `step` of `steps`; metrics.jsonl is cut back to it. Gives back the lines that it keeps."""
        self.first, self.step, self.steps, self.steps_per_epoch = step, step, steps, steps_per_epoch
        self.since, self.began = step, time.monotonic()
        lines = [line for line in self._lines() if step > 0 and line["step"] <= step]
        if not self.writes:
            return lines
        write_atomic(self.folder.metrics, "".join(_json_line(line) for line in lines))
        self._status("running")
        return lines

    def show_step(self, step: int, facts: Facts) -> None:
        """The plain line of a step, every `log_every` steps; consecutive lines stack as columns."""
        self.step = step
        if step == self.first + 1:  # it warms caches and kernels up, and would tell a time far too long
            self.since, self.began = step, time.monotonic()
        if step in (self.first + 1, self.steps) or step % self.log_every == 0:
            self.say(
                f"{self._head('step')}  loss {facts.loss:7.4f}  lr {facts.lr:.1e}  grad {facts.grad_norm:8.3g}"
                f"  {facts.tokens / facts.seconds:>9,.0f} tok/s  left {self._left()}"
            )

    def show_eval(self, loss: float, remark: str) -> None:
        """The plain line of an evaluation."""
        self.say(f"{self._head('eval')}  loss {loss:7.4f}  {remark}".rstrip())

    def record(self, facts: Facts | None, eval_loss: float | None) -> None:
        """The line of metrics.jsonl for the step that was shown last."""
        if not self.writes:
            return
        line = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 6),
            "time": round(time.time(), 3),
            "loss": facts and facts.loss,
            "eval_loss": eval_loss,
            "lr": facts and facts.lr,
            "grad_norm": facts and facts.grad_norm,
            "tokens": facts and facts.tokens,
            "supervised": facts and facts.supervised,
            "rows": facts and facts.rows,
            "passes": facts and facts.passes,
            "tokens_per_second": facts and round(facts.tokens / facts.seconds, 1),
            "memory_gib": round(_peak_memory() / GIB, 3),
            "gpu": None,  # its load: filled in with NVML
        }
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(_json_line(line))
        self.beat()

    def beat(self) -> None:
        """Renew status.json, at most once a second."""
        if time.monotonic() - self.beaten >= 1:
            self._status("running")

    def end(self, state: Literal["done", "stopped", "failed"], message: str) -> None:
        """The last word in status.json."""
        self._status(state, message)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Whatever breaks off the block is written in status.json as the reason, where the disk still takes it."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):
                self.end("failed", str(error) or type(error).__name__)
            raise

    def _status(self, state: str, message: str = "") -> None:
        self.beaten = time.monotonic()
        if not self.writes:
            return
        now = round(time.time(), 3)
        status = {"state": state, "step": self.step, "steps": self.steps, "time": now, "pid": os.getpid()}
        write_json(self.folder.status, {**status, "message": message})

    def _lines(self) -> Iterator[dict[str, Any]]:
        """metrics.jsonl up to the line, if any, that a killed run left half written."""
        if self.folder.metrics.exists():
            for line in self.folder.metrics.read_text("utf-8").splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    return

    def _head(self, kind: str) -> str:
        epoch, last = self.step / self.steps_per_epoch, f"{self.steps / self.steps_per_epoch:.2f}"
        return f"{kind}  {self.step:>{len(str(self.steps))}}/{self.steps}  epoch {epoch:{len(last)}.2f}"

    def _left(self) -> str:
        if self.step == self.steps:
            return "0 s"
        if self.step == self.since:
            return "–"
        pace = (time.monotonic() - self.began) / (self.step - self.since)
        return duration(pace * (self.steps - self.step))


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _peak_memory() -> int:
    """Bytes: what torch has held on the GPU at most, else what this process has."""
    if on_gpu := torch.cuda.max_memory_allocated():  # 0 where CUDA is not in use
        return on_gpu
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
