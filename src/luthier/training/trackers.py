"""The trackers that a recipe names (`track:`), each in a process of its own: none can break the run, or hold it up.

A tracker's package brings threads, servers, signal handlers, exit hooks, banners and questions of its own, and may wait
for a network for minutes. In another session (no terminal, no Ctrl-C), without standard streams and without the
training's memory it may: the run only puts into a pipe what has room there. What goes wrong is said in one line.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from luthier.folder import RunFolder, read_json
from luthier.history import place
from luthier.html import visible

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny", "swanlab": "swanlab", "tensorboard": "tensorboard"}
"""What to install for a tracker; it is imported by the tracker's own name."""
START = 90.0
"""Seconds until a tracker that has not started is given up. Nobody waits for it: what it is to log lies ready."""
END = 10.0
"""Seconds that all trackers together have at the end of a run; what is not done by then is ended."""
TAKEOVER = 20.0
"""Seconds that the tracker of a killed run has left when the run goes on. Only the new tracker waits for it."""
AHEAD = 32 * 2**20
"""Bytes that wait for a tracker at most: a step takes about 300, with eight GPUs 1,300."""
AT_ONCE = 2**20
"""Bytes that are written at most before the run has its turn again: a tracker may take them as fast as they come."""
SAFE = "its figures are in metrics.jsonl"

NAMES = {
    "epoch": "train/epoch",
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens": "train/tokens",
    "supervised": "train/supervised_tokens",
    "tokens_per_second": "train/tokens_per_second",
    "eval_loss": "eval/loss",
    "memory_gib": "memory_gib",
}
"""A key of metrics.jsonl → what trackers call it."""
CARD = ("memory_gib", "utilisation", "temperature", "power_w", "energy_wh")
"""What is logged of a GPU, as gpu/0/temperature; the number is the card's index."""

USERINFO = re.compile(r"://(?:[^\s/?#]*|[^\s/:?#@]*:(?!\d+[/?#])\S*)@")
"""What a URL has before its host, up to the last @; the second way is a password with a / in it, and no port."""
SECRET = ("KEY", "TOKEN", "PASSWORD")
"""How the name of an environment variable ends that is a secret: WANDB_API_KEY."""


def start_trackers(
    names: Sequence[str], folder: RunFolder, recipe: dict[str, Any], say: Callable[[str], None]
) -> Trackers:
    """Start those trackers, without waiting for them; `recipe` is what they call the run's configuration.

    A run that goes on goes on in the trackers' runs of before (trackers/NAME.json in its folder), where what they
    already have is not logged again, once a killed run's trackers, if they still work, have ended (trackers/NAME.lock).
    """
    return Trackers(names, folder, recipe, say)


class Trackers:
    """Those that work. No call but `end` waits for one; whatever one does is no error here, and off after one line.

    A call takes the time of writing 1 MiB into a pipe at most, or a second where a killed process does not go away.
    """

    def __init__(
        self, names: Sequence[str], folder: RunFolder, recipe: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        self.say, self.on = say, list[Tracker]()
        for name in names:
            if not _installed(name):
                self._off(name, f"not installed (pip install {PACKAGES[name]}, or all: pip install 'luthier[track]')")
                continue
            try:
                self.on.append(Tracker(name))
            except OSError as error:
                self._off(name, f"its process does not start ({error})")
        about = {"folder": str(folder.path), "shown": str(folder.shown), "run": folder.name, "recipe": recipe}
        self._send(start=about)

    def log(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl. One that a tracker already has (by its step) is not logged again."""
        self._send(**logged(line))

    def catch_up(self, step: int) -> None:
        """Have metrics.jsonl logged up to that step, whose line it has: each tracker reads in it what is new to it.

        Nothing of it goes through the run; the file may grow meanwhile.
        """
        self._send(catch_up=step)

    def samples(self, lines: Iterable[dict[str, Any]]) -> None:
        """New lines of samples.jsonl."""
        told = dict[int, list[tuple[str, str]]]()
        for line in lines:
            told.setdefault(line["step"], []).append((_text(line["prompt"]), line["reply"]))
        for step, rows in told.items():
            self._send(samples=rows, step=step, time=time.time())

    def end(self, state: str, figures: dict[str, Any]) -> None:
        """The run is done, stopped or failed, with its final figures. Waits END seconds at most; called once more, it
        does nothing."""
        self._send(end=state, figures=figures)
        deadline, left = time.monotonic() + END, self.on
        try:
            while self.on and time.monotonic() < deadline:
                time.sleep(0.02)
                self.listen()
            for tracker in self.on:
                self.say(f"track: {tracker.name} did not finish within {END:g} s and was ended; {SAFE}")
        finally:
            self.on = []
            for tracker in left:
                tracker.kill()

    def _send(self, **message: Any) -> None:
        line = json.dumps(message, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
        for tracker in self.on:
            tracker.waiting += line
        self.listen()

    def listen(self) -> None:
        """Pass on what waits, and hear what the trackers say."""
        for tracker in list(self.on):
            off = tracker.flush()
            for message in tracker.heard():
                if "told" in message:
                    self.say(f"track: {one_line(message['told'])[:400]}")
                off = message.get("off", off)
            if off is None and not tracker.ready and time.monotonic() - tracker.began > START:
                off = f"it did not start within {START:g} s"
            if off is None and not tracker.done:
                continue
            self.on = [other for other in self.on if other is not tracker]
            tracker.kill()
            if not tracker.done:
                self._off(tracker.name, off or "its process ended")

    def _off(self, name: str, why: str) -> None:
        self.say(f"track: {name} is off: {one_line(why)[:400]}; the run goes on; {SAFE}")


class Tracker:
    """The run's end of one tracker's process. ready: it has started; done: it has all and has finished."""

    def __init__(self, name: str) -> None:
        self.name, self.began, self.ready, self.done = name, time.monotonic(), False, False
        self.waiting, self.answer = bytearray(), bytearray()
        command = [sys.executable, "-P", "-m", "luthier.training.trackerprocess", name, str(os.getpid())]
        self.process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin and self.process.stdout
        self.into, self.out = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.into, False)
        os.set_blocking(self.out, False)

    def flush(self) -> str | None:
        """Write as much of what waits as the pipe takes; why there is no use in going on, if so."""
        with suppress(BlockingIOError, BrokenPipeError):  # a process that has ended says why, to `heard`
            for _ in range(0, min(len(self.waiting), AT_ONCE), 65536):
                del self.waiting[: os.write(self.into, self.waiting[:65536])]
        return None if len(self.waiting) <= AHEAD else "it hangs, or does not keep up with the run"

    def heard(self) -> Iterator[dict[str, Any]]:
        """What it has said since: told (a line for the user), ready, done, off (why it can do no more)."""
        with suppress(BlockingIOError):
            while part := os.read(self.out, 65536):
                self.answer += part
            if self.process.poll() is not None and not self.done:  # the end of its output, and no word of why
                yield {"off": f"its process ended (exit status {self.process.returncode})"}
        *lines, rest = self.answer.split(b"\n")
        self.answer = rest
        for line in lines:
            message = json.loads(line)
            self.ready, self.done = self.ready or "ready" in message, self.done or "done" in message
            yield message

    def kill(self) -> None:
        """End its process and its group, whatever they are at; W&B's service, in a group of its own, follows in 2 s.

        Where the system does not end it within a second (it waits for a network's disk), it is left to the system.
        """
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()


@contextmanager
def alone(path: Path, lonely: float) -> Iterator[None]:
    """In the block, in a tracker's process, no other one works for the run of that trackers/NAME.json.

    One that still does since its run was killed is killed, too, after TAKEOVER seconds, with what it has started
    (NAME.pid says who it is). On another machine it cannot be, but ends by itself `lonely` seconds after its run.
    Errors: RuntimeError when it has not.
    """
    lock, holder, me = FileLock(path.with_suffix(".lock")), path.with_suffix(".pid"), psutil.Process()
    try:
        lock.acquire(timeout=TAKEOVER)
    except Timeout:
        _end(read_json(holder) or {})
        try:
            lock.acquire(timeout=lonely)
        except Timeout:
            raise RuntimeError("the process that tracked the run before does not end") from None
    try:
        holder.write_text(json.dumps({"pid": me.pid, "born": me.create_time(), "place": place()}), "utf-8")
        yield
    finally:
        lock.release()


def _end(holder: dict[str, Any]) -> None:
    """Kill that process and its children, W&B's service among them, unless its number is another's by now."""
    if holder.get("place") != place():
        return
    with suppress(psutil.NoSuchProcess):
        old = psutil.Process(holder["pid"])
        if abs(old.create_time() - holder["born"]) < 2:
            for process in (old, *old.children(recursive=True)):
                process.kill()


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl as trackers take it: plain names, numbers alone, nothing for what is not known."""
    found = {name: line.get(key) for key, name in NAMES.items()}
    for card in line.get("gpu") or []:
        found |= {f"gpu/{card['index']}/{key}": card.get(key) for key in CARD}
    return {name: value for name, value in found.items() if value is not None}


def logged(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl as the message that a tracker's process takes."""
    return {"log": numbers(line), "step": line["step"], "time": line["time"]}


def read_logged(metrics: Path, step: int) -> Iterator[dict[str, Any]]:
    """The messages for the lines of metrics.jsonl up to `step`; what comes after may still be written."""
    with metrics.open("rb") as file:
        for line in map(json.loads, file):
            yield logged(line)
            if line["step"] >= step:
                return


def _installed(name: str) -> bool:
    """Looks without importing. A folder of that name, as W&B's own `wandb/`, is a package, too, but has no origin."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _text(prompt: str | list[dict[str, str]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def one_line(text: str) -> str:
    """What a package or a server says, fit for a line on the terminal, and without secrets.

    A URL loses its user and password; the value of an environment variable that is a secret by its name becomes ***
    (from 4 characters on: a shorter one is none, and would be found in any word).
    """
    text = USERINFO.sub("://", " ".join(text.split()))
    secrets = {" ".join(value.split()) for name, value in os.environ.items() if name.upper().endswith(SECRET)}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    return visible(text)
