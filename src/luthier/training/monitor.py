"""One stream of facts → metrics.jsonl, status.json (pulse.py), a plain line for the screen, and trackers."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from luthier.engine.memory import give_back
from luthier.folder import RunFolder, read_json, write_atomic
from luthier.history import RECENT, read_lines, usual_step
from luthier.sections import TrainSection
from luthier.training.pulse import Phase, Pulse
from luthier.training.trackers import Trackers
from luthier.words import eval_line, step_line

GIB = 1024**3


@dataclass(frozen=True)
class Facts:
    """One optimizer step. loss: mean over its supervised tokens; tokens: of its rows, without padding; computed: those
    that went through the model, fewer where rows share beginnings, more with padding; seconds: the step alone."""

    loss: float
    lr: float
    grad_norm: float
    tokens: int
    computed: int
    supervised: int
    rows: int
    passes: int
    seconds: float


class Monitor:
    """Reports a run. `time` is seconds since 1970; `memory_gib` the peak so far, on the GPU where there is one.

    A line of metrics.jsonl has every key, null where a step has no such fact; step 0 has an eval loss only.
    Of several processes that train together one alone `writes`. Where a panel shows the folder, steps are not `shown`.
    """

    def __init__(
        self,
        folder: RunFolder,
        section: TrainSection,
        say: Callable[[str], None],
        *,
        writes: bool = True,
        shown: bool = True,
        gpus: Callable[[], list[dict[str, Any]] | None] = lambda: None,
        trackers: Trackers | None = None,
    ) -> None:
        self.folder, self.log_every, self.say, self.writes, self.shown = folder, section.log_every, say, writes, shown
        self.pulse = Pulse(folder.status, say, gpus, writes=writes)
        self.trackers = trackers or Trackers([], folder, {}, say)
        self.first = self.since = self.step = self.steps = 0
        self.steps_per_epoch = 1
        self.spent, self.started, self.began = 0.0, time.monotonic(), 0.0
        self.begun = False
        self.took: deque[float] = deque(maxlen=RECENT)

    def begin(self, step: int, steps: int, steps_per_epoch: int, spent: float = 0.0) -> list[dict[str, Any]]:
        """Start at `step` of `steps`, after `spent` seconds; metrics.jsonl and samples.jsonl are cut back to it.

        Gives back the lines of metrics.jsonl that it keeps.
        """
        self.first, self.step, self.steps, self.steps_per_epoch = step, step, steps, steps_per_epoch
        known = read_json(self.folder.status) or {}
        if step == steps == known.get("step"):  # it is done: no time is spent on it any more
            spent = known.get("seconds", spent)
        self.since, self.began, self.spent = step, time.monotonic(), spent
        self.started = self.began
        lines = [line for line in read_lines(self.folder.metrics) if step > 0 and line["step"] <= step]
        if not self.writes:
            return lines
        write_atomic(self.folder.metrics, "".join(_json_line(line) for line in lines))
        if self.folder.samples.exists():
            samples = [line for line in read_lines(self.folder.samples) if step > 0 and line["step"] <= step]
            write_atomic(self.folder.samples, "".join(map(_json_line, samples)))
        if lines:  # each reads the file by itself, for what is new to it
            self.trackers.catch_up(lines[-1]["step"])
        self.begun = True
        self.pulse.start(**self._standing())
        return lines

    def enter(self, phase: Phase) -> None:
        """What the run does from now on."""
        self.pulse.tell(phase)

    def show_step(self, step: int, facts: Facts) -> None:
        """The plain line of a step, every `log_every` steps; consecutive lines stack as columns."""
        self.step = step
        if step == self.first + 1:  # it warms caches and kernels up, and would tell a time far too long
            self.since, self.began = step, time.monotonic()
        else:
            self.took.append(facts.seconds)
        self.pulse.tell("training", **self._standing())
        if self.shown and (step in (self.first + 1, self.steps) or step % self.log_every == 0):
            speed = facts.tokens / facts.seconds
            self.say(step_line(self._place(), facts.loss, facts.lr, facts.grad_norm, speed, self._left()))

    def show_eval(self, loss: float, remark: str) -> None:
        """The plain line of an evaluation."""
        self.say(eval_line(self._place(), loss, remark))

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
            "computed": facts and facts.computed,
            "supervised": facts and facts.supervised,
            "rows": facts and facts.rows,
            "passes": facts and facts.passes,
            "tokens_per_second": facts and round(facts.tokens / facts.seconds, 1),
            "memory_gib": round(_peak_memory() / GIB, 3),
            "gpu": self.pulse.gpu,
        }
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(_json_line(line))
        self.trackers.log(line)
        self.beat()

    def record_samples(self, lines: list[dict[str, Any]]) -> None:
        """Replies of the model at this step, into samples.jsonl."""
        with self.folder.samples.open("a", encoding="utf-8") as file:
            file.write("".join(map(_json_line, lines)))
        self.trackers.samples(lines)

    def beat(self) -> None:
        """A sign of progress: a pass is done, say."""
        self.pulse.tell()
        self.trackers.listen()

    def end(self, state: Literal["done", "stopped", "failed"], message: str) -> None:
        """The last word in status.json, and to the trackers, which may take a while to finish.

        Where it did not even begin, as with a damaged checkpoint, the figures of before stay.
        """
        self.pulse.tell("ended", **(self._standing() if self.begun else self._before()))
        try:
            self.trackers.end(state, {"step": self.step, "message": message})
        finally:
            self.pulse.end(state, message)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Whatever breaks off the block is written in status.json as the reason, where the disk still takes it."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):
                if isinstance(error, KeyboardInterrupt):
                    self.end("stopped", "nothing new: interrupted")
                else:
                    self.end("failed", str(error) or type(error).__name__)
            raise

    def _before(self) -> dict[str, Any]:
        """What status.json had of the run's course before this process."""
        known = read_json(self.folder.status) or {}
        return {key: known[key] for key in self._standing() if key in known} or self._standing()

    def _standing(self) -> dict[str, Any]:
        """What status.json has of the run's course."""
        seconds = self.spent + time.monotonic() - self.started
        return {
            "step": self.step,
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "usual": usual_step(list(self.took)),
            "seconds": round(seconds, 3),
            "left": self._left(),
            "memory_gib": round(_memory() / GIB, 3),
        }

    def _place(self) -> tuple[int, int, int]:
        return self.step, self.steps, self.steps_per_epoch

    def _left(self) -> float | None:
        """Seconds until the last step, at the pace since the first; None before there is one."""
        if self.step == self.steps:
            return 0.0
        if self.step == self.since:
            return None
        return round((time.monotonic() - self.began) / (self.step - self.since) * (self.steps - self.step), 1)


def _json_line(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _memory() -> int:
    """Bytes in use just now: what torch holds on this process's GPU, else what the process has."""
    return torch.cuda.memory_allocated() or int(psutil.Process().memory_info().rss)


def forget_peak() -> bool:
    """From here on the peak is that of what comes. False where the system's cannot be set back (as on macOS)."""
    give_back()
    if torch.cuda.max_memory_allocated():  # 0 where CUDA is not in use
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_memory() -> int:
    """Bytes: what torch has held on the GPU at most, else what this process has."""
    if on_gpu := torch.cuda.max_memory_allocated():  # 0 where CUDA is not in use
        return on_gpu
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
