"""The processes of a run on several devices: started, listened to and ended from here, without torch.

torchrun may start them instead (`launched` is true under it as well). It is not what Luthier itself starts them with:
its agent answers a signal with a traceback and status 1, a worker's failure with a banner of thirty lines and status 1,
and kills after 30 s whoever is still finishing a step (measured with torch 2.13).
"""

from __future__ import annotations

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
from multiprocessing.connection import Connection, Pipe, wait
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from luthier.errors import LuthierError, RunError

Result = TypeVar("Result")
Say = Callable[[str], None]

LINE = "LUTHIER_LAUNCHER"
"""The environment variable with the file descriptor over which a worker talks with its launcher."""
GRACE = 10.0
"""Seconds that the others have to end by themselves once one has failed. gloo tells them, NCCL may wait for ever."""
ECHO = 1.0
"""Seconds within which a second signal is the first one again: `timeout` signals its child, then its child's group."""


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


class Worker(NamedTuple):
    """One of the processes, from the launcher's side; `line` is the pipe to it."""

    rank: int
    process: subprocess.Popen[bytes]
    line: Connection


def launch(call: Callable[..., Result], arguments: tuple[Any, ...], count: int, say: Say) -> Result:
    """Run `call(*arguments, say=…)` in `count` new processes; gives back what it gives back in the first of them.

    Only the first one's lines come to `say`. All of it goes through pickle: `call` by its module and name. SIGINT and
    SIGTERM are passed on to all, once, and waited for without limit; a second one ends everything. When one process
    fails the others are ended, and when this one dies they die. Errors: the LuthierError or OSError that the first
    process to fail ended with; RunError where one was killed.
    """
    port = _free_port()
    workers = [_start(number, count, port) for number in range(count)]
    try:
        with _passing_on(workers) as signals:
            for worker in workers:
                with suppress(ConnectionError):  # it ended while it started: _listen tells how
                    worker.line.send((call, arguments))
            results, failures = _listen(workers, signals, say)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            worker.line.close()
    if failures:
        raise next((one for one in failures if not isinstance(one, LostError)), failures[0])
    if not results:
        signal.raise_signal(signals[0])  # they ended of it before any could be stopped well: so does this process
        raise RunError(f"ended by {signal.Signals(signals[0]).name}")
    result: Result = results[0]
    return result


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
def _passing_on(workers: list[Worker]) -> Iterator[list[int]]:
    """In the block the first SIGINT or SIGTERM goes to every worker, and into the list that is given."""
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle signals
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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


def _listen(workers: list[Worker], signals: list[int], say: Say) -> tuple[list[Any], list[Exception]]:
    """Until all have ended: what the first gave back (if it did), and the failures in the order in which they came."""
    results: list[Any] = []
    failures: list[Exception] = []
    there = {worker.line: worker for worker in workers}
    deadline = math.inf
    while there:
        for line in wait(list(there), None if deadline == math.inf else max(0.0, deadline - time.monotonic())):
            assert isinstance(line, Connection)
            try:
                kind, value = line.recv()
            except (EOFError, ConnectionError):
                kind, value = "ended", there[line].process.wait()
            if kind == "said":
                say(value)
            elif kind == "done":
                results.append(value)
            elif kind == "failed":
                failures.append(value)
            else:
                worker = there.pop(line)
                if value and -value not in signals and time.monotonic() < deadline:
                    failures.append(_untold(worker, value, len(workers)))
        if failures and deadline == math.inf:
            deadline = time.monotonic() + GRACE
        if time.monotonic() >= deadline:
            for worker in there.values():
                worker.process.kill()
    return results, failures


def _untold(worker: Worker, status: int, count: int) -> RunError:
    """The failure of a worker that could not tell it itself."""
    who = f"process {worker.rank + 1} of {count}"
    if status > 0:
        return RunError(f"{who} failed; its last words are above")
    why = " (as the system does when memory runs out)" if -status == signal.SIGKILL else ""
    return RunError(
        f"{who} was killed by {signal.Signals(-status).name}{why}; the newest checkpoint is whole: --resume"
    )


def work() -> None:
    """The whole life of a worker that `launch` started."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before training there is nothing to save: end without a traceback
    line = Connection(int(os.environ.pop(LINE)))
    os.set_inheritable(line.fileno(), False)
    call, arguments = line.recv()
    threading.Thread(target=_die_with, args=(line,), daemon=True).start()
    first = rank() == 0
    try:
        result = call(*arguments, say=lambda text: line.send(("said", text)) if first else None)
    except (LuthierError, OSError) as error:
        line.send(("failed", _portable(error)))  # and status 0: another one means that nothing could be told
    else:
        if first:
            line.send(("done", result))


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
