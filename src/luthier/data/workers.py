"""A source's rows encoded on all cores: this process and helpers of it, in the order of the rows whoever did what.

A helper is `python -m luthier.data.workers`, told what to do on its standard input, and gone when that ends: it needs
nothing of the main program, which may be a notebook, a pipe or a script without a guard, and cannot outlive it. A
batch's records depend on its rows alone. One that a helper did not bring back is encoded here: the error is then the
one that a single process would have had, and comes where it would have come.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

import pyarrow as pa

from luthier.data.cache import SCHEMA
from luthier.data.record import Recorder
from luthier.data.sources import Rejected, Row, open_source

ROWS_AT_ONCE = 1024
AHEAD = 8
"""Batches read ahead. Helpers are called when there are so many: to start costs one about as long as they take."""
MOST = 8
"""Processes: beyond, reading and writing here is what takes the time."""

Rows = list[tuple[int, Row | Rejected]]
"""Rows, each with the number of its file."""


class _Batch:
    def __init__(self, rows: Rows) -> None:
        self.rows, self.count = rows, len(rows)
        self.records: pa.RecordBatch | None = None
        self.done = threading.Event()
        self._free = threading.Lock()

    def claim(self) -> bool:
        """True for the first who asks: it is theirs to encode."""
        return self._free.acquire(blocking=False)


def encoded_batches(files: Sequence[Path], recorder: Recorder) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The records of every ROWS_AT_ONCE rows of the files, in order, and how many rows they are of.

    Errors: what reading or encoding raises, behind the batches before it.
    """
    rows = ((number, row) for number, file in enumerate(files) for row in open_source(file))
    waiting, broken, more = deque[_Batch](), list[Exception](), True
    jobs: SimpleQueue[_Batch | None] = SimpleQueue()
    helpers: list[_Helper] = []
    try:
        while True:
            while more and len(waiting) < max(AHEAD, 2 * len(helpers)):
                try:
                    with _uncollected():
                        read = list(islice(rows, ROWS_AT_ONCE))
                except Exception as error:
                    broken.append(error)
                    read = []
                more = bool(read)
                if more:
                    waiting.append(_Batch(read))
                    jobs.put(waiting[-1])
            if more and not helpers:
                helpers += [_Helper(recorder, jobs) for _ in range(_cores() - 1)]
            if not waiting:
                break
            first = waiting[0]
            own = None if first.done.is_set() else next((batch for batch in waiting if batch.claim()), None)
            if own is not None:
                with _uncollected():
                    own.records = recorder.batch(own.rows) if own is first else _quietly(recorder, own.rows)
                own.done.set()
                continue
            first.done.wait()
            yield first.records or recorder.batch(first.rows), first.count
            waiting.popleft()
    finally:
        for helper in helpers:
            helper.stop()
    if broken:
        raise broken[0]


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for cycles of garbage: rows make none, and with torch in memory it took half of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _quietly(recorder: Recorder, rows: Rows) -> pa.RecordBatch | None:
    """A batch out of its turn: if it fails, it is to fail when it is its turn."""
    with suppress(Exception):
        return recorder.batch(rows)
    return None


def _cores() -> int:
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return min(len(mine), MOST) if sys.executable else 1


class _Helper:
    """One process, and the thread that talks with it."""

    def __init__(self, recorder: Recorder, jobs: SimpleQueue[_Batch | None]) -> None:
        self._recorder, self._jobs, self._stopped = recorder, jobs, False
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "luthier.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def _talk(self) -> None:
        told, said = self._process.stdin, self._process.stdout
        assert told is not None and said is not None
        batch = None
        try:
            pickle.dump(self._recorder, told)
            told.flush()
            pickle.load(said)  # it is ready
            while not self._stopped and (batch := self._jobs.get()) is not None:
                if batch.claim():
                    pickle.dump(batch.rows, told)
                    told.flush()
                    batch.records = pa.ipc.read_record_batch(pa.py_buffer(pickle.load(said)), SCHEMA)
                    batch.done.set()
        except Exception:  # it has died, or a row cannot be sent: the batch is encoded in its turn
            if batch is not None:
                batch.done.set()

    def stop(self) -> None:
        self._stopped = True
        self._process.kill()
        self._jobs.put(None)
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was still to be written has no reader
                assert pipe is not None
                pipe.close()
        self._process.wait()


def _work() -> None:
    """What a helper does: a Recorder first, then rows → records, until there is no more to read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent decides
    gc.disable()  # see _uncollected
    told, said = sys.stdin.buffer, sys.stdout.buffer
    with suppress(EOFError, BrokenPipeError):
        recorder: Recorder = pickle.load(told)
        pickle.dump("ready", said)
        said.flush()
        while True:
            pickle.dump(recorder.batch(pickle.load(told)).serialize().to_pybytes(), said)
            said.flush()


if __name__ == "__main__":
    _work()
