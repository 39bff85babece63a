"""One tracker's process: `python -m luthier.training.trackerprocess wandb PID` logs what a run tells it, line by line.

It is started by trackers.py, reads JSON lines on its standard input until the end, and answers in JSON lines: what to
tell the user, that it is ready, that it is done, or why it is off. Only here is a tracker's package imported.
One process at a time works for a run (trackers/NAME.lock): a killed run's may not be done when the run goes on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from luthier.training.trackers import alone, one_line, read_logged

PROJECT = "luthier"
"""The project or experiment where the user's environment names none."""
LONELY = 60.0
"""Seconds to finish in when the run's process has been killed."""
QUIET = {
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_INIT_TIMEOUT": "20",  # seconds; its own 90 would be up with ours
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # 120 seconds, seven times over, by itself
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # else it asks for SQLite, for which mlflow-skinny has no driver
}
"""Set where the user has not."""


@dataclass(frozen=True)
class Start:
    """What a tracker starts with. shown: the run folder as the user would type it; id: of the tracker's own run;
    resumed: that run is there already."""

    folder: str
    shown: str
    run: str
    recipe: dict[str, Any]
    id: str
    resumed: bool


@dataclass
class Kept:
    """trackers/NAME.json: what goes on when the run does. step, sampled: the last that was logged, -1 before."""

    id: str
    step: int = -1
    sampled: int = -1

    def write(self, path: Path) -> None:
        """At once or not at all; it need not survive the machine's end, so nothing waits for the disk."""
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self)), "utf-8")
        temporary.replace(path)


class Tracker(Protocol):
    """One package. told: the line that says where its run is seen; id: what goes into trackers/NAME.json."""

    told: str
    id: str

    def log(self, figures: dict[str, float], step: int, at: float) -> None:
        """Numbers of a step; `at` is seconds since 1970."""

    def samples(self, rows: Sequence[Sequence[str]], step: int, at: float) -> None:
        """(prompt, reply) of a step."""

    def end(self, state: str, figures: dict[str, Any]) -> None:
        """done, stopped or failed. All that it has must be written, or sent, when this returns.

        Or killed: the run may go on, so that nothing is said of its end but what the package says when it is closed.
        """


def main(name: str, run: int) -> None:
    """Serve the run of the process number `run`. Ends by os._exit: the packages' exit hooks would wait, or print."""
    threading.Thread(target=_outlive, args=(run,), daemon=True).start()
    words, mouth = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what packages and their children print goes nowhere, and no question is answered
        os.dup2(nothing, stream)
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)

    def say(**message: Any) -> None:
        with suppress(BrokenPipeError):  # the run has gone
            os.write(mouth, json.dumps(message).encode() + b"\n")

    try:
        _serve(name, (json.loads(line) for line in words if line.endswith(b"\n")), say)
    except BaseException as error:  # SwanLab leaves by SystemExit
        said = _brief(error)
        say(off=f"{type(error).__name__}: {said}" if said else type(error).__name__)
        os._exit(1)
    os._exit(0)


def _serve(name: str, messages: Iterator[dict[str, Any]], say: Any) -> None:
    about = next(messages)["start"]
    path = Path(about["folder"], "trackers", f"{name}.json")
    path.parent.mkdir(exist_ok=True)
    with alone(path, LONELY):
        _work(name, path, about, messages, say)


def _work(name: str, path: Path, about: dict[str, Any], messages: Iterator[dict[str, Any]], say: Any) -> None:
    resumed = path.is_file()
    kept = Kept(**json.loads(path.read_text("utf-8"))) if resumed else Kept(uuid.uuid4().hex[:12])
    tracker = TRACKERS[name](Start(**about, id=kept.id, resumed=resumed))
    kept.id = tracker.id
    kept.write(path)
    say(ready=True, told=tracker.told)
    for message in _spelt_out(messages, Path(about["folder"], "metrics.jsonl")):
        if "log" in message and message["step"] > kept.step:
            tracker.log(message["log"], message["step"], message["time"])
            kept.step = message["step"]
        elif "samples" in message and message["step"] > kept.sampled:
            tracker.samples(message["samples"], message["step"], message["time"])
            kept.sampled = message["step"]
        elif "end" in message:
            tracker.end(message["end"], message["figures"])
            say(done=True)
            return
        else:
            continue
        kept.write(path)
    tracker.end("killed", {})  # the run's process was


def _spelt_out(messages: Iterator[dict[str, Any]], metrics: Path) -> Iterator[dict[str, Any]]:
    for message in messages:
        yield from read_logged(metrics, message["catch_up"]) if "catch_up" in message else (message,)


def _outlive(run: int) -> None:
    """End this process and its children LONELY seconds after the run's, whatever they hang at."""
    while os.getppid() == run:
        time.sleep(1)
    time.sleep(LONELY)
    os.killpg(0, signal.SIGKILL)


# -- the four ---------------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files, written by the tensorboard package alone (torch's writer would import torch here)."""

    def __init__(self, start: Start) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event, self.summary, self.text_pb = Event, Summary, text_pb
        self.writer, self.id = EventFileWriter(str(Path(start.folder, "tensorboard"))), start.id
        self.told = f"tensorboard: tensorboard --logdir {quote(f'{start.shown}/tensorboard')}"
        if not start.resumed:
            self._text("recipe", json.dumps(start.recipe, ensure_ascii=False, indent=2), 0, None)

    def log(self, figures: dict[str, float], step: int, at: float) -> None:
        values = [self.summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._write(self.summary(value=values), step, at)

    def samples(self, rows: Sequence[Sequence[str]], step: int, at: float) -> None:
        for number, (prompt, reply) in enumerate(rows, 1):
            self._text(f"samples/{number}", f"{prompt}\n\n→ {reply}", step, at)

    def end(self, state: str, figures: dict[str, Any]) -> None:
        self.writer.close()

    def _text(self, tag: str, text: str, step: int, at: float | None) -> None:
        literal = "".join(f"    {line}\n" for line in text.splitlines())  # it is shown as Markdown: no text is markup
        self._write(self.text_pb(tag, literal), step, at)

    def _write(self, summary: Any, step: int, at: float | None) -> None:
        self.writer.add_event(self.event(summary=summary, step=step, wall_time=at))
        self.writer.flush()


class Wandb:
    """Weights & Biases: on its server where there is a login and the server answers, else in files to upload later."""

    def __init__(self, start: Start) -> None:
        import wandb

        self.wandb, why = wandb, ""
        folder = os.environ.get("WANDB_DIR", start.folder)
        Path(folder).mkdir(parents=True, exist_ok=True)
        given = {
            "dir": folder,
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": os.environ.get("WANDB_NAME", start.run),
            "id": start.id,
            "resume": "allow",
            "config": start.recipe,
            "settings": wandb.Settings(
                silent=True,
                console="off",
                x_disable_stats=True,  # it would measure this process; the run's figures have the card's
                x_disable_meta=True,
                disable_git=True,
                disable_code=True,
            ),
        }
        try:
            self.run = wandb.init(**given)
        except wandb.errors.Error as error:  # no login, no network, a server that refuses
            why = _brief(error)
            wandb.teardown()  # its service still holds the run's id
            self.run = wandb.init(**given, mode="offline")
        if self.run.settings.mode == "disabled":
            raise RuntimeError("its mode is `disabled` (WANDB_MODE, or `wandb disabled`)")
        self.id = start.id
        self.told = f"wandb: {self.run.url}"
        if self.run.offline:
            files = f"{quote(_shown(Path(folder), start))}/wandb/offline-run-*-{start.id}"
            self.told = f"wandb is offline ({why or 'as it is set'}); to upload the run: wandb sync {files}"

    def log(self, figures: dict[str, float], step: int, at: float) -> None:
        self.run.log(figures, step=step)

    def samples(self, rows: Sequence[Sequence[str]], step: int, at: float) -> None:
        table = self.wandb.Table(columns=["prompt", "reply"], data=[list(row) for row in rows])
        self.run.log({"samples": table}, step=step)

    def end(self, state: str, figures: dict[str, Any]) -> None:
        if state != "killed":
            self.run.summary.update({"state": state, **figures})
        self.run.finish(exit_code=int(state in ("failed", "killed")))  # without it, files would hold next to nothing
        self.wandb.teardown()


class Mlflow:
    """MLflow, on the server that MLFLOW_TRACKING_URI names, else in files of the run folder (mlruns/)."""

    def __init__(self, start: Start) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric, here = Metric, Path(start.folder, "mlruns")
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", here.as_uri()))
        self.told = f"mlflow: {os.environ.get('MLFLOW_TRACKING_URI')}"
        if "MLFLOW_TRACKING_URI" not in os.environ:
            files = quote(f"{start.shown}/mlruns")
            self.told = f"mlflow: MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {files}"
        self.id = start.id
        if start.resumed:
            self.client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        self.id = self.client.create_run(experiment, run_name=start.run).info.run_id
        params = [Param(key, value[:500]) for key, value in _flat(start.recipe)]
        for first in range(0, len(params), 100):  # as many at once, and as long, as every server takes
            self.client.log_batch(self.id, params=params[first : first + 100])

    def log(self, figures: dict[str, float], step: int, at: float) -> None:
        moment = round(at * 1000)
        self.client.log_batch(self.id, [self.metric(name, value, moment, step) for name, value in figures.items()])

    def samples(self, rows: Sequence[Sequence[str]], step: int, at: float) -> None:
        text = "\n\n".join(f"{prompt}\n→ {reply}" for prompt, reply in rows)
        self.client.log_text(self.id, text, f"samples/step-{step:06d}.txt")

    def end(self, state: str, figures: dict[str, Any]) -> None:
        if state == "killed":  # all that it has is sent
            return
        for key, value in figures.items():
            self.client.set_tag(self.id, key, str(value)[:500])
        self.client.set_terminated(self.id, {"done": "FINISHED", "stopped": "KILLED"}.get(state, "FAILED"))


class SwanLab:
    """SwanLab: on its server where there is a login and the server answers, else in files to upload later."""

    def __init__(self, start: Start) -> None:
        import swanlab

        settings = swanlab.Settings()
        folder = settings.log_dir  # of the user's environment or files, else its default:
        if folder == Path.cwd() / "swanlog":
            folder = Path(start.folder, "swanlab")
        given = {
            "log_dir": str(folder),
            "project": settings.project.name or PROJECT,
            "name": settings.experiment.name or start.run,
            "id": start.id,
            "resume": "allow",
            "config": start.recipe,
            "settings": swanlab.Settings(
                interactive=False,
                terminal=swanlab.Settings.Terminal(proxy_type="none"),
                probe=swanlab.Settings.Probe(
                    monitor=False, hardware=False, runtime=False, requirements=False, git=False
                ),
            ),
        }
        mode, why = settings.mode, "as it is set"
        if mode == "online" and settings.api_key is None:
            mode, why = "offline", "not logged in"
        if mode == "disabled":
            raise RuntimeError("its mode is `disabled` (SWANLAB_MODE, or `swanlab disabled`)")
        try:
            self.run = swanlab.init(**given, mode=mode)
        except (Exception, SystemExit) as error:
            if mode != "online":
                raise
            mode, why = "offline", _brief(error)
            self.run = swanlab.init(**given, mode=mode)
        self.text, self.id = swanlab.Text, start.id
        files = f"{quote(_shown(folder, start))}/run-*-{start.id}"
        self.told = f"swanlab is offline ({why}); to upload the run: swanlab sync {files}"
        if mode != "offline":
            self.told = f"swanlab: {self.run.url or folder}"

    def log(self, figures: dict[str, float], step: int, at: float) -> None:
        self.run.log(figures, step=step)

    def samples(self, rows: Sequence[Sequence[str]], step: int, at: float) -> None:
        self.run.log({"samples": [self.text(reply, caption=prompt) for prompt, reply in rows]}, step=step)

    def end(self, state: str, figures: dict[str, Any]) -> None:
        if state != "killed":
            self.run.config.update({"state": state, **figures})
        self.run.finish(state={"done": "success", "stopped": "aborted"}.get(state, "crashed"), error=state)


TRACKERS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "swanlab": SwanLab,
}


def _shown(folder: Path, start: Start) -> str:
    """A folder as the user would type it, if it is the run's or in it."""
    inside = folder.relative_to(start.folder) if folder.is_relative_to(start.folder) else None
    return str(folder if inside is None else Path(start.shown, inside))


def _brief(error: BaseException) -> str:
    return one_line(str(error))[:200].rstrip(".")  # cut after the secrets are out: half of one would stay


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """A nested recipe as (dotted key, text)."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    else:
        yield key, str(value)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
