"""Processes that train a tiny model and die at a chosen line, as kill -9 makes them die: nothing of theirs runs then.

`python dying.py` imports everything once, then forks a process for each job that it reads. A moment is a number of
lines: of the code that trains and writes (WATCHED), those that the process begins before it dies. Equal jobs run
through equal lines, so that a moment is the same place in each of them; what the clock decides is not counted.
"""

from __future__ import annotations

import json
import linecache
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import luthier
from luthier.folder import RunFolder
from luthier.models.adapters import save_adapter
from luthier.quiet import quiet
from luthier.resume import resume_from
from luthier.sections import TrainSection
from luthier.training.monitor import Monitor
from rows import fit, lora, random_rows, tiny
from tiny import tiny_tokenizer

PACKAGE = Path(luthier.__file__).parent
OURS = ("training/", "folder.py", "resume.py", "models/adapters.py")
WATCHED = (*(str(PACKAGE / name) for name in OURS), shutil.__file__)  # shutil: a folder may be half removed, too
ROWS = random_rows(23)  # batch 6: 4 steps an epoch, the last with 5 rows
HELD_OUT = random_rows(5, seed=1)
SECTION: dict[str, Any] = {
    "batch": 6,
    "steps": 8,
    "save_every": 3,
    "eval_every": 4,
    "keep": 1,
    "lr": 3e-3,
    "warmup": 2,
    "tokens_per_pass": 50,
}
"""Three checkpoints, of which the newest stays; an epoch ends between the first and the second of them."""


@dataclass(frozen=True)
class Job:
    """One process: it begins the run in `path`, or goes on from its newest checkpoint as the real verb does.

    moment: it dies before it executes that many lines. torn: instead of dying there, it dies in the middle of the
    next write that makes a file longer than this. places: where to write what its lines are. watch: at every line it
    checks that whatever can be seen is whole.
    """

    path: str
    method: str = "lora"
    section: dict[str, Any] = field(default_factory=dict)
    moment: int | None = None
    torn: int | None = None
    places: str | None = None
    watch: bool = False


class Processes:
    """Starts the process that forks, once for many jobs."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, job: Job) -> int:
        """Run a job. 0: it ended well; -9: killed; 1: it failed, and its traceback is on the error stream."""
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(asdict(job)) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def close(self) -> None:
        self.server.communicate()


def build(method: str) -> Any:
    """The model before its first step, the same at every call."""
    return lora(tiny("qwen2"), lora_dropout=0.1) if method == "lora" else tiny("llama").train()


def work(job: Job) -> None:
    """Train to the end, then leave ended.json in the run folder."""
    folder = RunFolder(Path(job.path))
    model, tokenizer = build(job.method), tiny_tokenizer()
    section = TrainSection(**SECTION | job.section)
    folder.path.mkdir(exist_ok=True)
    with lines_of(job), folder.locked():
        checkpoint = resume_from(folder, lambda line: None)
        seed_all(0 if checkpoint is None else os.getpid())  # another process has other generators
        outcome = fit(
            folder.path,
            model,
            ROWS,
            section,
            eval_rows=HELD_OUT,
            kind=job.method,
            say=draw_at_each_step,
            resume=checkpoint,
            write=lambda target: save_adapter(model, target, tokenizer),
        )
    ended = asdict(outcome) | {"seconds": None, "draws": [random.random(), np.random.rand(), torch.rand(1).item()]}
    (folder.path / "ended.json").write_text(json.dumps(ended))


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw_at_each_step(line: str) -> None:
    """Somebody else's code draws from the global generators: a resumed run must go on with their states."""
    if line.startswith("step"):
        random.random(), np.random.rand(), torch.rand(1)


@contextmanager
def lines_of(job: Job) -> Iterator[None]:
    """Count the lines of WATCHED in the block, and do at each what the job says."""
    places: list[str] = []
    seen: dict[Path, tuple[Any, ...]] = {}
    count = 0

    def line(frame: FrameType) -> None:
        nonlocal count
        count += 1
        if count == job.moment and job.torn is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if count == job.moment and job.torn is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job.torn, job.torn))
        if job.places is not None:
            places.append(place_of(frame))
        if job.watch:
            check_whole(Path(job.path), seen)

    if job.moment is None and job.places is None and not job.watch:
        yield
        return
    with tracing(line):
        yield
    if job.places is not None:
        Path(job.places).write_text(json.dumps(places))


@contextmanager
def tracing(line: Callable[[FrameType], None]) -> Iterator[None]:
    """`line` is called before each line of WATCHED but what `Monitor.beat` does, at most once a second."""
    resting: list[CodeType] = []
    watched: dict[CodeType, bool] = {}  # asked at every call of every library: 0.4 s a run without it

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in watched:
            watched[code] = code.co_filename.startswith(WATCHED)
        if code is Monitor.beat.__code__:
            resting.append(code)
            return leave
        return step if watched[code] else None

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not resting:
            line(frame)
        return step

    def leave(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "return":
            resting.pop()
        return leave

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(None)


def place_of(frame: FrameType) -> str:
    """As "train/save_checkpoint/save/write_json: write_atomic(path, …": the way there through WATCHED, and the line."""
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    names: list[str] = []
    above: FrameType | None = frame
    while above is not None:
        if above.f_code.co_filename.startswith(WATCHED):
            names.append(above.f_code.co_name)
        above = above.f_back
    return f"{'/'.join(reversed(names))}: {text}"


def visible(run: Path) -> list[Path]:
    """The folders of a run that a reader may take for whole: checkpoints, adapter, model."""
    found = [*run.glob("checkpoints/step-*"), run / "adapter", run / "model"]
    return [path for path in found if path.is_dir()]


def check_whole(run: Path, seen: dict[Path, tuple[Any, ...]]) -> None:
    """Every file of every visible folder is there and can be read. `seen` holds what was checked before."""
    for folder in visible(run):
        files = sorted(folder.iterdir())
        marks = tuple((file.name, file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        if seen.get(folder) == marks:
            continue
        seen[folder] = marks
        names = {file.name for file in files}
        wanted = {"state.json", "state.safetensors"} if folder.name.startswith("step-") else set()
        weights = {"adapter_config.json", "adapter_model.safetensors"} if "adapter_config.json" in names else set()
        missing = (wanted | (weights or {"config.json", "model.safetensors"}) | {"tokenizer.json"}) - names
        assert not missing, f"{folder} lacks {missing}"
        for file in files:
            if file.suffix == ".json":
                json.loads(file.read_text())
            if file.suffix == ".safetensors":
                assert load_file(file)


def serve() -> None:
    """A job a line on standard input → the exit status of its process, a line each."""
    warm = Path(tempfile.mkdtemp())
    for method in ("lora", "full"):  # what is imported, compiled and cached at the first use
        work(Job(str(warm), method))
        shutil.rmtree(warm)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                work(Job(**json.loads(line)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    quiet()
    serve()
