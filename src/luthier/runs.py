"""Runs: found, taken in at a glance, stopped, cleaned. Without torch, and quick with hundreds of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError, RunError
from luthier.folder import RunFolder, read_json
from luthier.history import Follower, History, is_alive, place
from luthier.methods import METHODS
from luthier.words import quoted

ROOT = Path("runs")
HEARD = 5.0
"""Seconds within which a run says that it was asked to stop, unless it is within one long computation: two beats."""
GONE = ".old"
"""How the name of a folder ends that is being removed: it begins with a dot, and is no run any more."""


# -- finding ---------------------------------------------------------------------------------------------------------


def find_run(text: str) -> RunFolder:
    """A run by its folder, or by its name alone below ./runs. Errors: RecipeError, with what may have been meant."""
    places = {text: Path(text), str(ROOT / text): ROOT / text}
    for path in places.values():
        if (path / "recipe.yaml").is_file():
            return RunFolder(path.absolute())
    for said, path in places.items():
        if path.exists():
            raise RecipeError(_no_run(said, path))
    names = [folder.name for folder in all_runs()]
    near = get_close_matches(Path(text).name, names)
    if near:
        raise RecipeError(f"there is no run {text}; did you mean {' or '.join(near)}?")
    here = "see `luthier runs`" if names else f"there is none below {ROOT.absolute()}"
    raise RecipeError(f"there is no run {text}; {here}")


def _no_run(said: str, path: Path) -> str:
    """Why a file or folder is no run, with the run that it lies in."""
    above = (folder for folder in path.absolute().parents if (folder / "recipe.yaml").is_file())
    run = next((RunFolder(folder).shown for folder in above if (folder / "checkpoints").is_dir()), None)
    if path.is_dir():
        return f"{said} is a folder, but no run (there is no recipe.yaml in it)" + (
            f"; the run is {run}" if run else ""
        )
    return (
        f"{said} is a file; name the run's folder: {run}" if run else f"{said} is no run's folder; see `luthier runs`"
    )


def run_or_model(text: str) -> str:
    """A run's folder, also where it is given by its name alone; else the text, which then names a model."""
    named = ROOT / text
    return str(named) if not Path(text).exists() and (named / "recipe.yaml").is_file() else text


def all_runs() -> list[RunFolder]:
    """Those below ./runs, by name. Errors: RecipeError where ./runs is a file."""
    if ROOT.is_file():
        raise RecipeError(
            f"{ROOT.absolute()} is a file, where the folder of all runs belongs; move it, or train elsewhere"
        )
    found = sorted(path.parent for path in ROOT.absolute().glob("*/recipe.yaml"))
    return [RunFolder(path) for path in found if not path.name.startswith(".")]


def glance(folder: RunFolder, now: float | None = None) -> History:
    """What `read_history` gives, with no more of metrics.jsonl than the evaluations and the newest step.

    A line of a step without an evaluation is known by its null and never parsed: 100 runs of 1,000 steps take 0.1 s
    instead of 0.7 s.
    """
    whole = folder.metrics.read_bytes() if folder.metrics.is_file() else b""
    lines = whole[: whole.rfind(b"\n") + 1].splitlines()
    newest = next((line for line in reversed(lines) if b'"loss": null' not in line), None)
    kept = [line for line in lines if b'"eval_loss": null' not in line or line is newest]
    status = read_json(folder.status) or {}
    return History(folder, status, list(_parsed(kept)), [], time.time() if now is None else now)


def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with suppress(json.JSONDecodeError):  # a killed run's last words, before it went on
            yield json.loads(line)


def silent_for(history: History) -> float:
    """Seconds since the run's last sign of life."""
    told = history.status.get("time") or (history.metrics[-1]["time"] if history.metrics else None)
    return max(0.0, history.now - float(told or history.folder.recipe.stat().st_mtime))


def age(seconds: float) -> str:
    """12 s, 4 min, 3 h, 5 d."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


def time_left(history: History) -> str:
    """What is still to say behind "running": the phase, the time that is left, or that it hangs."""
    phase = str(history.status.get("phase", ""))
    if history.hung is not None:
        return f"hangs for {age(history.hung)}"
    if history.status.get("stopping"):
        return "stopping"
    if history.left is None or phase not in ("training", "evaluating", "saving"):
        return phase
    return f"{age(history.left)} left"


def disk_bytes(path: Path) -> int:
    """What a file or folder holds, in bytes; what vanishes meanwhile counts nothing."""
    if path.is_file():
        return path.lstat().st_size
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(f"{parent}/{name}").st_size
    return total


def steps_saved(folder: RunFolder) -> list[int]:
    """The steps of the complete checkpoints, oldest first."""
    found = folder.checkpoints.glob("step-*/state.json")
    return sorted(int(path.parent.name[5:]) for path in found if path.parent.name[5:].isdigit())


def result_of(folder: RunFolder) -> Path | None:
    """The adapter's folder, or after full fine-tuning the model's; None before there is one."""
    return next((path for path in (folder.adapter, folder.model) if path.is_dir()), None)


def lost(history: History) -> str | None:
    """Why it is not known how a run ended, where its status.json does not tell; None where it does."""
    folder = history.folder
    if history.status:
        return None
    if folder.status.is_file():
        return "its status.json is damaged"
    if history.metrics or result_of(folder) or steps_saved(folder):
        return "its status.json is gone"
    return "it has no status.json: it has not begun to train"


def elsewhere(history: History) -> str | None:
    """Where a run's process is, when it cannot be reached from here: another machine by its name, or a container."""
    there, here = str(history.status["place"]), place()
    if there == here:
        return None
    return "in another container" if there.split()[0] == here.split()[0] else f"on {there.split()[0]}"


# -- stopping --------------------------------------------------------------------------------------------------------


def ask_to_stop(folder: RunFolder) -> None:
    """SIGTERM to the process that trains here, which then finishes its step and saves; once, as a second one kills it.

    Of several processes status.json names the leading one. They agree on a stop in every step, so that all of them
    save, and whoever launched them ends with 143.
    Errors: RecipeError where the run has ended, or is out of reach.
    """
    import psutil

    history = glance(folder)
    if history.state != "running":
        raise RecipeError(f"{folder.shown} is not running: {has_ended(history)}")
    pid = history.status["pid"]
    if where := elsewhere(history):
        raise RecipeError(f"{folder.shown} runs {where} (process {pid}), out of reach from here; stop it there")
    if history.status.get("stopping"):
        return
    try:
        psutil.Process(pid).terminate()  # that the number is still this process's, history.state has just made sure
    except psutil.AccessDenied:
        raise RecipeError(
            f"{folder.shown} is another user's (process {pid}); stop it as {folder.path.owner()}"
        ) from None
    except psutil.NoSuchProcess:
        raise RecipeError(f"{folder.shown} has ended just now; {folder.standing()}") from None


def has_ended(history: History) -> str:
    """A run that does not run, in words, with what goes on with it."""
    at = f"at step {history.step}"
    words = {"stopped": f"stopped {at}", "failed": f"failed {at}", "dead": f"its process has gone {at}"}
    if history.state == "done":
        return "it has ended, done"
    if why := lost(history):
        return f"{why}; see: luthier runs show {quoted(history.folder.shown)}"
    return f"{words[history.state]}; {goes_on(history)}"


def goes_on(history: History) -> str:
    """How far a run that broke off has come, and the command that goes on with it.

    One that failed before its first checkpoint fails again if it goes on: it begins anew, with another recipe.
    """
    if history.state == "failed" and not steps_saved(history.folder):
        return f"no checkpoint yet; begin anew with: {anew(history)}"
    return history.folder.standing()


def merges(folder: RunFolder) -> bool:
    """Can the run's result be written as one model folder?"""
    from luthier.recipe import load_recipe  # for one run: the list of runs does without

    return METHODS[load_recipe(folder.recipe, check_files=False).method.kind].merges


def anew(history: History) -> str:
    """The command that trains a run's recipe again, with the keys to change where the run's message names them."""
    recipe = quoted(history.folder.shown / "recipe.yaml")
    key, *others = knobs(str(history.status.get("message", ""))) or ["KEY"]
    return f"luthier train {recipe} {key}=VALUE" + (f"  (or {', '.join(others)})" if others else "")


def knobs(message: str) -> list[str]:
    """The recipe's keys that a message names, as train.lr, in its order."""
    from luthier.sections import Recipe

    known = {
        f"{section}.{key}"
        for section, field in Recipe.model_fields.items()
        for key in getattr(field.annotation, "model_fields", ())
    }
    return list(dict.fromkeys(word for word in re.findall(r"[a-z]+\.[a-z_]+", message) if word in known))


def wait_for_end(folder: RunFolder, tell: Callable[[History], None], until_heard: bool = False) -> History:
    """Until the process is gone, so that its folder is free; `until_heard`: until it knows that it shall stop.

    `tell` gets the run as it stands, five times a second.
    """
    follower, began = Follower(folder), time.monotonic()
    while True:
        history = follower.look()
        heard = history.status.get("stopping") or time.monotonic() - began > HEARD
        if not is_alive(history.status, history.now) or (until_heard and heard):
            return follower.look()
        tell(history)
        time.sleep(0.2)


# -- cleaning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """What may go of one run. `paths` lie in its folder, or are the folder itself."""

    folder: RunFolder
    paths: tuple[Path, ...]
    what: str

    @property
    def bytes(self) -> int:
        return sum(map(disk_bytes, self.paths))


def removal(folder: RunFolder, *, dead: bool = False, whole: bool = False) -> Removal | None:
    """What may go of a run as it stands: of a done one its checkpoints, as its result stays.

    `dead`: also the folder of one that broke off with nothing to go on from; `whole`: the folder in any case, but of a
    run that runs.
    """
    history, result = glance(folder), result_of(folder)
    state, steps = history.state, steps_saved(folder)
    if state == "running":
        return None
    if whole:
        there = [f"{result.name}/"] if result else []
        there += [f"checkpoints up to step {steps[-1]}"] if steps else []
        return Removal(folder, (folder.path,), f"the whole run ({', '.join([state, *there])})")
    if state == "done" and result and steps:
        paths = tuple(folder.checkpoints / f"step-{step:06d}" for step in steps)
        return Removal(folder, paths, f"{len(steps)} checkpoint{'s'[: len(steps) > 1]}; {result.name}/ stays")
    if dead and state != "done" and not result and not steps:
        return Removal(folder, (folder.path,), f"the whole run ({state}, without checkpoint and adapter)")
    return None


def remove(planned: Removal, *, dead: bool = False, whole: bool = False) -> int:
    """Remove what was planned and may still go, in the bytes that it freed. Nobody can train here meanwhile.

    Whatever goes gets another name first: a removal that is cut short leaves no half checkpoint and no half run.
    Errors: RunError where another process trains here, or has done since it was planned.
    """
    folder = planned.folder
    with folder.locked():
        if removal(folder, dead=dead, whole=whole) != planned:
            raise RunError(f"{folder.shown} has changed since; left as it is")
        freed = planned.bytes
        for path in planned.paths:
            hidden = path.with_name(f".{path.name}{GONE}")
            shutil.rmtree(hidden, ignore_errors=True)
            path.replace(hidden)
            shutil.rmtree(hidden)
    return freed


def leftovers() -> list[Path]:
    """Below ./runs: folders whose removal was cut short."""
    return sorted(path for path in ROOT.absolute().glob(f".*{GONE}") if path.is_dir())


def sweep(path: Path) -> int:
    """Remove one of them, in the bytes that it freed."""
    freed = disk_bytes(path)
    shutil.rmtree(path, ignore_errors=True)  # the removal may still be at work, in another process
    return freed


def why_kept(folder: RunFolder) -> str:
    """Why `removal` finds nothing in a run."""
    history, steps = glance(folder), steps_saved(folder)
    if history.state == "running":
        return "it is running"
    if history.state == "done":
        return "it has no checkpoints" if not steps else "its result is gone, and only its checkpoints hold it"
    at = f"{history.state}, and can go on from step {steps[-1]}" if steps else history.state
    return f"{at}; --all removes it whole"
