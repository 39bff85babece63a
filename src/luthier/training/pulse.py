"""status.json: what a run is doing just now, renewed by a thread of its own, which also sees that a step hangs."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from luthier.folder import write_json
from luthier.history import hangs, place
from luthier.words import duration

Phase = Literal["starting", "preflight", "training", "evaluating", "sampling", "saving", "ended"]

EVERY = 0.9
"""Seconds between two beats, less than launch.ECHO: `luthier runs stop` does not send a second signal to a run that it
sees stopping. A reader takes a run for dead that cannot be asked and has been silent for 60."""
ASLEEP = 5.0
"""Seconds more than EVERY without a beat: then the whole process did not run."""


class Pulse:
    """Tells how the run stands, for whoever reads status.json. Where it does not `write`, it only keeps the time.

    `gpus` reads the cards' state (None where there are none) without waiting for their work; `say` is told once of a
    step that hangs.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None], gpus: Callable[[], list[dict[str, Any]] | None], *, writes: bool
    ) -> None:
        self.path, self.say, self.gpus, self.writes = path, say, gpus, writes
        self.me = psutil.Process()
        self.facts: dict[str, Any] = {}
        self.phase: Phase = "starting"
        self.stop: Callable[[], int | None] = lambda: None
        """The signal, if any, that has asked the run to stop after its step: a second one would end it at once."""
        self.progressed = time.time()
        self.gpu: list[dict[str, Any]] | None = None
        self.lock, self.over, self.beating = threading.Lock(), threading.Event(), False

    def start(self, **facts: Any) -> None:
        """The first beat, with what is known; from now on there is one every EVERY seconds until `end`."""
        self.tell(**facts)
        if self.writes and not self.beating:
            self.gpu = self.gpus()
            self.beat()
            self.beating = True
            threading.Thread(target=self._beat_on, name="pulse", daemon=True).start()

    def tell(self, phase: Phase | None = None, **facts: Any) -> None:
        """What is new, for the next beat; it is a sign of progress as well."""
        self.facts |= facts
        self.phase = phase or self.phase
        self.progressed = time.time()

    def end(self, state: Literal["done", "stopped", "failed"], message: str) -> None:
        """The last word; nothing is written from here on. Errors: OSError where the disk does not take it."""
        self.over.set()
        with self.lock:
            self.phase = "ended"
            if self.writes and self.facts:
                write_json(self.path, self._status(state, message))

    def beat(self) -> None:
        """Renew the file. It is not flushed to the disk: after a power failure it tells nothing that matters.

        The temporary file has one name, so that a killed run leaves one at most (folder.TEMPORARY).
        """
        with self.lock:
            if self.over.is_set():
                return
            temporary = self.path.with_name(f".{self.path.name}.newstate")
            try:
                temporary.write_text(json.dumps(self._status("running", ""), ensure_ascii=False) + "\n", "utf-8")
                temporary.replace(self.path)
            except OSError:  # a full disk takes the beginning of a file as well
                temporary.unlink(missing_ok=True)
                raise

    def _beat_on(self) -> None:
        warned, last = 0.0, time.time()
        while not self.over.wait(EVERY):
            now = time.time()
            if now - last > EVERY + ASLEEP:  # so was the whole process, as when a laptop is closed
                self.progressed = now
            last = now
            self.gpu = self.gpus()
            with suppress(OSError):  # the disk is full, say: what trains will meet that by itself
                self.beat()
            if self.hung and warned != self.progressed:
                warned = self.progressed
                with suppress(OSError):  # nobody listens any more
                    self.say(self._hangs(now - warned))

    def _hangs(self, waited: float) -> str:
        what = f"step {self.facts['step'] + 1}" if self.phase == "training" else "the evaluation"
        return (
            f"{what} has shown no progress for {duration(waited)}, where a step usually takes "
            f"{self.facts['usual']:.1f} s: does it hang?"
        )

    @property
    def hung(self) -> bool:
        """Has the step, or the evaluation, done no pass for ten times the usual step's time, and 5 s at least?"""
        busy = self.phase in ("training", "evaluating")
        return busy and hangs(time.time() - self.progressed, self.facts.get("usual"))

    def _status(self, state: str, message: str) -> dict[str, Any]:
        return {
            "state": state,
            "phase": self.phase,
            **self.facts,
            "time": round(time.time(), 3),
            "progress": round(self.progressed, 3),
            "hung": state == "running" and self.hung,
            "stopping": state == "running" and self.stop() is not None,
            "pid": os.getpid(),
            "born": self.me.create_time(),
            "place": place(),
            "gpu": self.gpu,
            "message": message,
        }
