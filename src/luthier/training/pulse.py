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

EVERY = 2.0
"""Seconds between two beats: a reader takes a run for dead that cannot be asked and has been silent for 60."""
AT_MOST = 5.0
"""Seconds to wait for the last one: a driver may hang that is asked for a card's state."""


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
        self.lock, self.over = threading.Lock(), threading.Event()
        self.thread: threading.Thread | None = None

    def start(self, **facts: Any) -> None:
        """The first beat, with what is known; from now on there is one every EVERY seconds until `end`."""
        self.tell(**facts)
        if self.writes and self.thread is None:
            self.gpu = self.gpus()
            self.beat()
            self.thread = threading.Thread(target=self._beat_on, name="pulse", daemon=True)
            self.thread.start()

    def tell(self, phase: Phase | None = None, **facts: Any) -> None:
        """What is new, for the next beat; it is a sign of progress as well."""
        self.facts |= facts
        self.phase = phase or self.phase
        self.progressed = time.time()

    def end(self, state: Literal["done", "stopped", "failed"], message: str) -> None:
        """The last word. Errors: OSError where the disk does not take it."""
        self.over.set()
        if self.thread is not None:
            self.thread.join(AT_MOST)
            self.thread = None
        self.phase = "ended"
        if self.writes and self.facts:
            write_json(self.path, self._status(state, message))

    def beat(self) -> None:
        """Renew the file. It is not flushed to the disk: after a power failure it tells nothing that matters.

        The temporary file has one name, so that a killed run leaves one at most (folder.TEMPORARY).
        """
        with self.lock:
            temporary = self.path.with_name(f".{self.path.name}.newstate")
            temporary.write_text(json.dumps(self._status("running", ""), ensure_ascii=False) + "\n", "utf-8")
            temporary.replace(self.path)

    def _beat_on(self) -> None:
        warned = 0.0
        while not self.over.wait(EVERY):
            self.gpu = self.gpus()
            if self.hung and warned != self.progressed:
                warned = self.progressed
                waited, usual = time.time() - warned, self.facts["usual"]
                self.say(
                    f"step {self.facts['step'] + 1} has shown no progress for {duration(waited)}, where a step usually "
                    f"takes {usual:.1f} s: does it hang?"
                )
            with suppress(OSError):  # the disk is full, say: what trains will meet that by itself
                self.beat()

    @property
    def hung(self) -> bool:
        """Has the step, or the evaluation, shown no progress for ten times the usual step?"""
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
