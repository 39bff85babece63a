"""The processes of a run on several devices: started, listened to and ended from here, without torch.

torchrun may start them instead (`launched` is true under it as well). It is not what Luthier itself starts them with:
its agent answers a signal with a traceback and status 1, a worker's failure with a banner of thirty lines and status 1,
and kills after 30 s whoever is still finishing a step (measured with torch 2.13).
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from luthier.errors import LuthierError, RunError

Result = TypeVar("Result")
Say = Callable[[str], None]

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a run to stop: Ctrl-C, the system or a scheduler, the closing of its terminal."""
LINE = "LUTHIER_LAUNCHER"
"""The environment variable with the file descriptor over which a worker talks with its launcher."""
GRACE = 10.0
"""Seconds that the others have to end by themselves once one has failed. gloo tells them, NCCL may wait for ever."""
TICK = 0.5
"""Seconds until a signal is seen at the latest: Python does not see one that comes just as it begins to wait."""
ECHO = 1.0
"""Seconds within which a second signal is the first one again: `timeout` signals its child, then its child's group."""

_lines: list[Connection] = []
"""The one to the launcher, in a worker that `launch` started."""
_turn = threading.Lock()
"""Who may speak on it: a run's pulse has a thread of its own."""


class LostError(RunError):
    """The other processes of the run are out of reach: one of them has ended, and says why itself."""


def launched() -> bool:
    """Whether this process is one of a run's workers, started by `launch` or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """The number of this process among the run's, from 0; 0 where it is the only one."""
    return int(os.environ["RANK"]) if launched() else 0


def speaks(error: LuthierError) -> bool:
    """Whether the command line says this error here, or another process does. It matters under torchrun only.

    The user's mistakes (exit status 2) are the same in all processes: the first says them. What befalls a run
    (status 1) may be one process's own.
    """
    if rank() == 0 or (error.exit_status == 1 and not isinstance(error, LostError)):
        return True
    time.sleep(GRACE)  # torchrun ends all when one ends: the first must have the time to say it
    return False


def heeded() -> list[signal.Signals]:
    """STOPS without those that whoever started this process has it ignore: `nohup` SIGHUP, a script's `&` SIGINT."""
    return [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]


class Worker(NamedTuple):
    """One of the processes, from the launcher's side; `line` is the pipe to it."""

    rank: int
    process: subprocess.Popen[bytes]
    line: Connection


@dataclass
class Heard:
    """What the workers told. results: what the first gave back, if it did; failures: in the order they came."""

    results: list[Any] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    run: Path | None = None

    def note(self, failure: str) -> None:
        """Put why the run failed into its status.json, whose process knew only that another one had ended."""
        from luthier.folder import RunFolder, read_json, write_json

        if self.run is None:
            return
        path = RunFolder(self.run).status
        status = read_json(path)
        if status and status["state"] in ("running", "failed"):
            with suppress(OSError):
                write_json(path, status | {"state": "failed", "message": failure})

    def standing(self) -> str:
        """The end of a message: where the run stands, if there is one yet."""
        from luthier.folder import RunFolder

        return f"; {RunFolder(self.run).standing()}" if self.run else ""


def launch(
    call: Callable[..., Result],
    arguments: tuple[Any, ...],
    count: int,
    say: Say,
    watch: Callable[[Path], None] | None = None,
) -> Result:
    """Run `call(*arguments, say=…)` in `count` new processes; gives back what it gives back in the first of them.

    Only the first one's lines come to `say`, and the folder of its run to `watch`. All of it goes through pickle:
    `call` by its module and name. A signal of STOPS is passed on to all, once, and waited for without limit; a second
    one ends everything. When one process fails the others are ended, and when this one dies they die. Errors: the
    LuthierError or OSError that the first process to fail ended with; RunError where one was killed.
    """
    port, workers, heard = _free_port(), list[Worker](), Heard()
    try:
        with _passing_on(workers) as signals:
            with _held_back():
                for number in range(count):
                    workers.append(_start(number, count, port))
            for worker in workers:
                with suppress(ConnectionError):  # it ended while it started: _listen tells how
                    worker.line.send((call, arguments))
            _listen(workers, signals, say, watch, heard)
    except KeyboardInterrupt:  # the second one
        _say_interrupted(heard, say)
        raise
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            worker.line.close()
    result: Result = _result(heard, signals, say)
    return result


def _result(heard: Heard, signals: list[int], say: Say) -> Any:
    """What `launch` gives back or raises; where nothing came of the run but a signal, this process ends of it too."""
    failures = heard.failures
    if signals:  # who was still at work then misses those who ended of it
        failures = [one for one in failures if not isinstance(one, LostError)]
    if failures:
        failure = next((one for one in failures if not isinstance(one, LostError)), failures[0])
        heard.note(str(failure))
        raise failure
    if not heard.results:
        _say_interrupted(heard, say)
        signal.raise_signal(signals[0])
        raise RunError(f"ended by {signal.Signals(signals[0]).name}")
    return heard.results[0]


def _say_interrupted(heard: Heard, say: Say) -> None:
    if heard.run is not None:
        say(f"interrupted{heard.standing()}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _start(number: int, count: int, port: int) -> Worker:
    """A worker, in a process group of its own: Ctrl-C reaches the launcher alone, and through it every worker once."""
    ours, theirs = Pipe()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    unset = {
        "OMP_NUM_THREADS": str(max(1, cores // count)),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",  # not the host's name, looked up wherever
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    environment = unset | os.environ
    environment |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    environment |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {LINE: str(theirs.fileno()), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from luthier.training.launch import work; work()"],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        process_group=0,
    )
    theirs.close()
    return Worker(number, process, ours)


@contextmanager
def _held_back() -> Iterator[None]:
    """What comes of STOPS waits until the block ends; the processes started in it have it wait until they are ready.

    Python shows a traceback where Ctrl-C meets its imports, and a worker started after it came would never see it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _passing_on(workers: list[Worker]) -> Iterator[list[int]]:
    """In the block the first signal of STOPS goes to every worker, and into the list that is given."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield signals
        return
    before = {number: signal.getsignal(number) for number in heeded()}
    came = 0.0

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if not signals:
            came = time.monotonic()
            signals.append(number)
            for worker in workers:
                worker.process.send_signal(number)
        elif time.monotonic() - came > ECHO:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield signals
    finally:
        restore()


def _listen(
    workers: list[Worker], signals: list[int], say: Say, watch: Callable[[Path], None] | None, heard: Heard
) -> None:
    """Until all have ended: what they tell is said, or kept in `heard`."""
    there = {worker.line: worker for worker in workers}
    deadline = math.inf
    while there:
        for line in wait(list(there), min(TICK, max(0.0, deadline - time.monotonic()))):
            assert isinstance(line, Connection)
            try:
                kind, value = line.recv()
            except (EOFError, ConnectionError):
                kind, value = "ended", there[line].process.wait()
            if kind == "said":
                say(value)
            elif kind == "run":
                heard.run = value
                if watch is not None:
                    watch(value)
            elif kind == "done":
                heard.results.append(value)
            elif kind == "failed":
                heard.failures.append(value)
            else:
                worker = there.pop(line)
                if value and -value not in signals and time.monotonic() < deadline:
                    heard.failures.append(_untold(worker, value, len(workers), heard))
        if heard.failures and deadline == math.inf:
            deadline = time.monotonic() + GRACE
        if time.monotonic() >= deadline:
            for worker in there.values():
                worker.process.kill()


def _untold(worker: Worker, status: int, count: int, heard: Heard) -> RunError:
    """The failure of a worker that could not tell it itself."""
    who = f"process {worker.rank + 1} of {count}"
    if status > 0:
        return RunError(f"{who} failed; its last words are above")
    why = " (as the system does when memory runs out)" if -status == signal.SIGKILL else ""
    return RunError(f"{who} was killed by {signal.Signals(-status).name}{why}{heard.standing()}")


def work() -> None:
    """The whole life of a worker that `launch` started."""
    for number in heeded():
        signal.signal(number, signal.SIG_DFL)  # before training there is nothing to save: end without a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    atexit.register(gc.freeze)  # as in cli.main
    line = Connection(int(os.environ.pop(LINE)))
    os.set_inheritable(line.fileno(), False)
    call, arguments = line.recv()
    _lines.append(line)
    threading.Thread(target=_die_with, args=(line,), daemon=True).start()
    first = rank() == 0
    try:
        result = call(*arguments, say=lambda text: _tell("said", text) if first else None)
    except (LuthierError, OSError) as error:
        _tell("failed", _portable(error))  # and status 0: another one means that nothing could be told
    else:
        if first:
            _tell("done", result)


def _tell(kind: str, value: Any) -> None:
    """To the launcher, where there is one; from any thread."""
    with _turn:
        for line in _lines:
            line.send((kind, value))


def watched(path: Path) -> None:
    """What a worker does with the folder of a run that is shown from its launcher, which knows it by `tell_run`."""


def tell_run(path: Path) -> None:
    """Tell the launcher, where there is one, which folder the run now has: it names it if this process cannot."""
    _tell("run", path)


def _die_with(line: Connection) -> None:
    """The launcher sends nothing after the call: what comes is the end of it, be it killed."""
    with suppress(EOFError, ConnectionError):
        line.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def _portable(error: LuthierError | OSError) -> Exception:
    """The error as it can be pickled, with its traceback as a note, which `--debug` shows."""
    plain: Exception = error
    if isinstance(error, OSError):  # libraries derive from it with arguments that pickle does not know of
        plain = OSError(error.errno, error.strerror, error.filename) if error.errno else OSError(str(error))
    plain.add_note("".join(traceback.format_exception(error)))
    return plain
