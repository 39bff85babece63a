"""The run folder: what lies where, and files that a reader never sees half written.

runs/<name>/
  recipe.yaml        the resolved recipe, every default filled in
  environment.json   versions, device, threads
  data.json          counts, drops, hashes
  proof.json         the engine against the reference on a few of the run's own rows
  rejected.jsonl     rows that were skipped, with the reason
  metrics.jsonl      a line a step
  status.json        state and heartbeat
  checkpoints/step-000100/
  adapter/           the best by eval loss where there is an eval set, else the last (full fine-tuning: model/)
  samples.jsonl      replies to the recipe's prompts at every evaluation, and before training
  compare.md, compare.html, compare.json
  merges.json        the models that it was merged into, and how far they were from it
  report.html        all of it on one page
  trackers/          NAME.json: a tracker's own run, to go on in it; NAME.lock, NAME.pid: the process that works for it
  tensorboard/, wandb/, mlruns/, swanlab/   the trackers' files, where the environment names no other place
  .lock              held by the process that trains here
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from luthier.errors import RecipeError, RunError
from luthier.words import quoted

TEMPORARY = r"\.(adapter|model|step-\d+|\w+\.(json|jsonl|yaml|md|html))\.(old|[a-z0-9_]{8})"
"""What write_atomic and folder_atomic call a thing in a run folder while it is being written, or on its way out."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system calls a disk that has no room for a file."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part (temporary file, fsync, rename)."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):  # it names the temporary file, or none
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented UTF-8 JSON, atomically."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's value; None where it is not there, or no JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def folder_atomic(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target`; when the block ends well it becomes `target`, else it is removed.

    Every file in it is flushed to disk before the rename, so that a folder with the final name is complete.
    An existing `target` is replaced.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors makes its files for their owner alone
                _flush(file)
        if target.exists():
            old = target.with_name(f".{target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            target.replace(old)
            temporary.replace(target)
            shutil.rmtree(old)
        else:
            temporary.replace(target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_name(name: str, root: Path) -> None:
    """Errors: RecipeError where runs/<name> below `root` cannot be a folder."""
    if not re.fullmatch(r"[\w][\w.\- ]*", name):
        raise RecipeError(f"run: {name!r} cannot be a folder's name; use letters, digits, blanks, '-', '_' and '.'")
    if (root / "runs").is_file():
        raise RecipeError(
            f"{root / 'runs'} is a file, where the folder of all runs belongs; move it, or train elsewhere"
        )


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. The paths are where things lie; whether they are there is another question."""

    path: Path

    @classmethod
    def create(cls, name: str, root: Path) -> RunFolder:
        """Make runs/<name> below `root`, or <name>-2, -3 … where that is taken. Errors: those of `check_name`."""
        check_name(name, root)
        (root / "runs").mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            path = root / "runs" / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            try:
                (path / "checkpoints").mkdir()
            except OSError:
                path.rmdir()
                raise
            return cls(path)
        raise RunError(f"runs/{name} and 9,998 more of that name are taken; give another with run=NAME")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Errors: RecipeError when there is no recipe.yaml in it."""
        if not (path / "recipe.yaml").is_file():
            raise RecipeError(f"{path}: not a run folder (it has no recipe.yaml)")
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """In the block no other process trains here. Errors: RunError at once where one does.

        What a killed process left half written is removed: nobody else writes here now.
        The lock file stays: to remove one that another process has just opened would let both in.
        """
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self._clear()
                yield
        except Timeout:
            status = read_json(self.status)
            who = f"another process (pid {status['pid']} by status.json)" if status else "another process"
            raise RunError(f"{self.path} is being trained by {who}; wait for it, or end it") from None

    def standing(self) -> str:
        """How far a run that broke off has come, and what goes on with it; without torch."""
        steps = [int(path.name[5:]) for path in self.checkpoints.glob("step-*") if path.name[5:].isdigit()]
        there = f"newest checkpoint: step {max(steps)}" if steps else "no checkpoint yet"
        if (read_json(self.status) or {}).get("state") == "done":
            there = "it is trained to its end"
        return f"{there}; go on with: luthier train {quoted(self.shown)} --resume"

    def _clear(self) -> None:
        """Remove what a killed process left half written; an adapter that it had only moved aside comes back."""
        for place in (self.adapter, self.model):
            aside = place.with_name(f".{place.name}.old")
            if aside.is_dir() and not place.exists():
                aside.replace(place)
        for path in [*self.path.glob(".*.*"), *self.checkpoints.glob(".*.*")]:
            if re.fullmatch(TEMPORARY, path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    @property
    def shown(self) -> Path:
        """The path as short as the user would type it."""
        return self.path.relative_to(Path.cwd()) if self.path.is_relative_to(Path.cwd()) else self.path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The whole model, which full fine-tuning writes instead of an adapter."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def proof(self) -> Path:
        return self.path / "proof.json"

    @property
    def data(self) -> Path:
        return self.path / "data.json"

    @property
    def rejected(self) -> Path:
        return self.path / "rejected.jsonl"

    @property
    def merges(self) -> Path:
        return self.path / "merges.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
