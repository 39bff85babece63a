"""Trackers: the real packages' own files read back, and packages that fail in every way they can."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import REPOSITORY
from luthier.folder import RunFolder
from luthier.training import trackers
from luthier.training.trackers import PACKAGES, alone, numbers, one_line, start_trackers

CARD = {"name": "NVIDIA X", "index": 1, "memory_gib": 14.5, "memory_total_gib": 23.7, "utilisation": None}
RECIPE = {"model": {"name": "./model"}, "train": {"lr": 2e-4, "steps": 12}, "track": ["wandb"]}
SAFE = "; the run goes on; its figures are in metrics.jsonl"

RUN = """
    import sys, time
    sys.path.insert(0, TESTS)
    from test_trackers import RECIPE, row, samples
    from luthier.folder import RunFolder
    from luthier.training import trackers
    from pathlib import Path

    trackers.END = 60.0  # the machine may be busy
    folder = RunFolder(Path.cwd() / "runs" / "town")
    folder.path.mkdir(parents=True, exist_ok=True)
    tracking = trackers.start_trackers(NAMES, folder, RECIPE, lambda line: print(line, flush=True))
    for step in STEPS:
        tracking.log(row(step))
        tracking.samples(samples(step))
"""


def row(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl; an evaluation every fourth step."""
    trained = {"loss": 4.0 - step / 8, "lr": 1e-4, "grad_norm": 0.5, "tokens": 64, "tokens_per_second": 512.0}
    line = {"step": step, "epoch": step / 4, "time": 1.7e9 + step, "memory_gib": 1.25, "gpu": [CARD]}
    return {**line, **dict.fromkeys(trained), **(trained if step else {}), "eval_loss": None if step % 4 else 3.5}


def samples(step: int) -> list[dict[str, Any]]:
    """Lines of samples.jsonl, one prompt a text and one a conversation."""
    if step % 4:
        return []
    turns = [{"role": "user", "content": "你好"}]
    replies = [("Where is 7?", f"<b>In town</b> {step}."), (turns, "你好！")]
    return [{"step": step, "prompt": prompt, "reply": reply, "stopped": True} for prompt, reply in replies]


def begin(folder: Path, names: list[str], steps: range, last: str, **environment: str) -> subprocess.Popen[str]:
    """A process that tracks `steps`, and ends with the statement `last`; its two streams come together."""
    head = f"TESTS, NAMES, STEPS = {str(REPOSITORY / 'tests' / 'training')!r}, {names!r}, {steps!r}\n"
    hidden = {"WANDB", "MLFLOW", "SWANLAB"}
    kept = {key: value for key, value in os.environ.items() if key.partition("_")[0] not in hidden}
    path = os.pathsep.join([str(REPOSITORY / "tests"), environment.pop("PYTHONPATH", "")])
    kept |= {"HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": path, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(RUN) + last],
        cwd=folder,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def track(folder: Path, names: list[str], steps: range, state: str = "done", **environment: str) -> list[str]:
    """The lines that such a process prints."""
    process = begin(folder, names, steps, f"tracking.end({state!r}, {{'best_eval': 3.5}})", **environment)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    return printed.splitlines()


def needs(*names: str) -> None:
    for name in names:
        if not find_spec(name):
            pytest.skip(f"needs {PACKAGES[name]} (pip install 'luthier[track]')")


def alive(folder: Path) -> list[str]:
    """What was started in this folder and still runs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.cwd() == str(folder):
                found.append(" ".join(process.cmdline()))
    return found


def ended(folder: Path) -> bool:
    """Whether all that was started in this folder has ended, within half a minute."""
    deadline = time.monotonic() + 30
    while alive(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(folder)


# The real packages


@dataclass
class Tracked:
    """A run that went on: steps 0 to 8, then 6 to 12 from the checkpoint of step 5. called: connections tried."""

    folder: Path
    printed: list[list[str]] = field(default_factory=list)
    called: list[object] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "town"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """With all packages that are here; whoever wants to reach the network has to ask a proxy that counts."""
    done = Tracked(tmp_path_factory.mktemp("tracked"))
    names = [name for name in PACKAGES if find_spec(name)]
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    done.called.append(proxy.accept())

        threading.Thread(target=listen, daemon=True).start()
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        proxies = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "http_proxy": url, "https_proxy": url}
        done.printed.append(track(done.folder, names, range(9), "stopped", **proxies))
        done.printed.append(track(done.folder, names, range(6, 13), **proxies))
    return done


def test_tensorboard_files_hold_every_step_once(tracked: Tracked) -> None:
    needs("tensorboard")
    told = read(
        tracked.run / "tensorboard",
        """
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        scalars = {tag: [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)] for tag in events.scalars.Keys()}
        texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("samples/1")]
        """,
        "[scalars, texts]",
    )
    scalars, texts = told
    assert set(scalars) == set(numbers(row(4)))
    assert scalars["train/loss"] == [[step, 4.0 - step / 8, 1.7e9 + step] for step in range(1, 13)]
    assert scalars["eval/loss"] == [[step, 3.5, 1.7e9 + step] for step in (0, 4, 8, 12)]
    assert texts == [[s, f"    Where is 7?\n    \n    → <b>In town</b> {s}.\n"] for s in (0, 4, 8, 12)]


def test_wandb_without_a_login_is_offline_in_files_to_upload(tracked: Tracked) -> None:
    needs("wandb")
    (line,) = [line for line in tracked.printed[0] if "wandb" in line]
    kept = json.loads((tracked.run / "trackers" / "wandb.json").read_text())
    assert kept == {"id": kept["id"], "step": 12, "sampled": 12}
    assert line == (
        "track: wandb is offline (No API key configured. Use `wandb login` to log in); "
        f"to upload the run: wandb sync runs/town/wandb/offline-run-*-{kept['id']}"
    )
    parts = sorted(tracked.run.glob(f"wandb/offline-run-*-{kept['id']}/run-{kept['id']}.wandb"))
    first, second = map(wandb_records, parts)
    history = [line for part in (first, second) for line in part["history"] if "train/loss" in line]
    assert [(line["_step"], line["train/loss"]) for line in history] == [(s, 4.0 - s / 8) for s in range(1, 13)]
    assert [line["_step"] for line in second["history"] if "samples/_type" in line] == [12]
    about = first["run"][0]
    assert (about["run_id"], about["project"], about["display_name"]) == (kept["id"], "luthier", "town")
    assert first["config"]["train"] == RECIPE["train"]
    assert first["exit"] == second["exit"] == [0]
    assert second["summary"] | {"state": "done", "best_eval": 3.5} == second["summary"]


def test_mlflow_goes_on_in_the_same_run(tracked: Tracked) -> None:
    needs("mlflow")
    runs, loss, texts = read(
        tracked.run / "mlruns",
        """
        import os
        os.environ |= {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
        from mlflow import MlflowClient
        client = MlflowClient("file://" + sys.argv[1])
        found = client.search_runs([client.get_experiment_by_name("luthier").experiment_id])
        runs = [(run.info.run_name, run.info.status, run.data.params, run.data.tags["best_eval"]) for run in found]
        id = found[0].info.run_id
        loss = [(m.step, m.value, m.timestamp) for m in client.get_metric_history(id, "train/loss")]
        paths = [file.path for file in client.list_artifacts(id, "samples")]
        texts = {path: open(client.download_artifacts(id, path)).read() for path in paths}
        """,
        "[runs, loss, texts]",
    )
    params = {"model.name": "./model", "train.lr": "0.0002", "train.steps": "12", "track": "['wandb']"}
    assert runs == [["town", "FINISHED", params, "3.5"]]
    assert loss == [[step, 4.0 - step / 8, 1_700_000_000_000 + 1000 * step] for step in range(1, 13)]
    assert sorted(texts) == [f"samples/step-{step:06d}.txt" for step in (0, 4, 8, 12)]
    assert texts["samples/step-000004.txt"] == "Where is 7?\n→ <b>In town</b> 4.\n\nuser: 你好\n→ 你好！"


def test_swanlab_without_a_login_is_offline_in_files_to_upload(tracked: Tracked) -> None:
    needs("swanlab")
    id = json.loads((tracked.run / "trackers" / "swanlab.json").read_text())["id"]
    (line,) = [line for line in tracked.printed[1] if "swanlab" in line]
    files = f"runs/town/swanlab/run-*-{id}"
    assert line == f"track: swanlab is offline (not logged in); to upload the run: swanlab sync {files}"
    parts = sorted(tracked.folder.glob(files))
    assert len(parts) == 2
    assert "steps" in (parts[0] / "files" / "config.yaml").read_text()
    replies = {path.read_text() for path in parts[0].glob("media/text/004-*")}
    assert replies == {"<b>In town</b> 4.", "你好！"}
    assert [path.name[:3] for path in sorted(parts[1].glob("media/text/*"))] == ["012", "012"]
    assert all(path.stat().st_size > 500 for part in parts for path in part.glob(f"run-{id}.swanlab"))


def test_trackers_say_a_line_each_and_call_nobody(tracked: Tracked) -> None:
    names = {name for name in PACKAGES if find_spec(name)}
    for printed in tracked.printed:
        assert {line.removeprefix("track: ").split()[0].rstrip(":") for line in printed} == names
        assert len(printed) == len(names)
    assert tracked.called == []
    assert ended(tracked.folder)


def read(path: Path, code: str, value: str) -> Any:
    """What a package reads in a folder, as JSON from a process of its own: some warn while they are imported."""
    code = f"import json, sys\n{textwrap.dedent(code)}\nprint(json.dumps({value}))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def wandb_records(path: Path) -> dict[str, Any]:
    """A .wandb file: after 7 bytes, LevelDB's log (blocks of 32 KiB; checksum, length and kind before each part)."""
    data, records, part = path.read_bytes(), list[bytes](), b""
    at = 7
    while at < len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            records, part = [*records, part], b""
    joined = path.with_suffix(".records")
    joined.write_text(json.dumps([record.hex() for record in records]))
    return read(  # type: ignore[no-any-return]
        joined,
        """
        from wandb.proto.wandb_internal_pb2 import Record
        found = {"history": [], "config": {}, "summary": {}, "exit": [], "run": []}
        def items(updates):
            return {"/".join([*i.nested_key] or [i.key]): json.loads(i.value_json) for i in updates}
        for text in json.load(open(sys.argv[1])):
            record = Record.FromString(bytes.fromhex(text))
            kind = record.WhichOneof("record_type")
            if kind == "history":
                found["history"].append(items(record.history.item))
            elif kind == "summary":
                found["summary"] |= items(record.summary.update)
            elif kind == "exit":
                found["exit"].append(record.exit.exit_code)
            elif kind == "run":
                about = record.run
                found["run"].append({key: getattr(about, key) for key in ("run_id", "project", "display_name")})
                found["config"] |= items(about.config.update)
        """,
        "found",
    )


# What goes wrong


def killed(folder: Path, names: list[str], steps: range, last: str = "", **environment: str) -> None:
    """A run that has begun to track those steps, and is killed when the statements `last` are done."""
    last = f"{READY}\n{last}\nprint('now', flush=True); time.sleep(60)"
    process = begin(folder, names, steps, last, **environment)
    assert process.stdout
    said = []
    while (line := process.stdout.readline()) not in ("now\n", ""):
        said.append(line)
    process.kill()
    process.communicate(timeout=60)
    assert (line, len(said)) == ("now\n", len(names)), said
    assert not [line for line in said if " is off: " in line]


READY = "while not all(t.ready for t in tracking.on): time.sleep(0.02); tracking.listen()"


def test_a_killed_run_leaves_what_it_had_and_no_process(tmp_path: Path) -> None:
    needs("wandb")
    names = [name for name in PACKAGES if find_spec(name)]
    killed(tmp_path, names, range(5))
    assert ended(tmp_path)
    (file,) = tmp_path.glob("runs/town/wandb/offline-run-*/*.wandb")
    found = wandb_records(file)
    assert [line["_step"] for line in found["history"]] == [0, 1, 2, 3, 4]
    assert "state" not in found["summary"]
    for path in tmp_path.glob("runs/town/mlruns/*/*/meta.yaml"):
        assert "status: 1\n" in path.read_text()  # RUNNING: it may go on
    assert all(path.stat().st_size > 500 for path in tmp_path.glob("runs/town/swanlab/run-*/run-*.swanlab"))


SLOW = """
def note(*what):
    with open(Path.home() / "notes", "a") as file: print(os.getpid(), *what, file=file)
def log(figures, step):
    if "train/loss" in figures: note(step)
    time.sleep(0.2)
note("begins")
def init(**given):
    return Some(log=log, finish=lambda state, error: note(error), url=None, config=config)
"""


@pytest.mark.full
def test_a_run_that_goes_on_waits_for_the_tracker_of_before(tmp_path: Path) -> None:
    """Killed while the tracker still has steps to log, and gone on with from an earlier step."""
    package = make_package(tmp_path, SLOW)
    killed(tmp_path, ["swanlab"], range(1, 9), PYTHONPATH=package)
    kept = tmp_path / "runs" / "town" / "trackers" / "swanlab.json"
    assert json.loads(kept.read_text())["step"] < 8
    assert track(tmp_path, ["swanlab"], range(6, 12), PYTHONPATH=package) == ["track: swanlab: logs"]
    assert ended(tmp_path)
    notes = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    old, new = dict.fromkeys(who for who, _ in notes)
    first = [(old, what) for what in ("begins", *map(str, range(1, 9)), "killed")]
    assert [tuple(note) for note in notes] == [*first, *((new, what) for what in ("begins", "9", "10", "11", "done"))]
    assert json.loads(kept.read_text())["step"] == 11


@pytest.mark.full
def test_a_tracker_of_before_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = "import subprocess\ndef log(*given, **more): subprocess.run(['sleep', '600'], start_new_session=True)"
    package = make_package(tmp_path, hang)
    killed(tmp_path, ["swanlab"], range(1, 5), PYTHONPATH=package)
    monkeypatch.setattr(trackers, "TAKEOVER", 0.2)
    kept = tmp_path / "runs" / "town" / "trackers" / "swanlab.json"
    holder = kept.with_suffix(".pid")
    told = json.loads(holder.read_text())
    for other in ({"born": told["born"] - 10}, {"place": "another machine"}):
        holder.write_text(json.dumps(told | other))
        with pytest.raises(RuntimeError, match="the process that tracked the run before does not end"):
            alone(kept, 0.2).__enter__()
    holder.write_text(json.dumps(told))
    assert len(alive(tmp_path)) == 2
    with alone(kept, 10):
        assert alive(tmp_path) == []
        assert json.loads(holder.read_text())["pid"] == os.getpid()


@pytest.mark.full
def test_a_tracker_that_hangs_does_not_outlive_a_killed_run(tmp_path: Path) -> None:
    hang = "sys.modules['__main__'].LONELY = 0.1\ndef log(*given, **more): time.sleep(600)"
    killed(tmp_path, ["swanlab"], range(1, 5), PYTHONPATH=make_package(tmp_path, hang))
    assert ended(tmp_path)


def test_ctrl_c_is_the_runs_alone(tmp_path: Path) -> None:
    needs("wandb", "tensorboard")
    last = """
import signal
signal.signal(signal.SIGINT, lambda *_: None)
while not all(t.ready for t in tracking.on):
    tracking.listen()
    time.sleep(0.05)
print("ready", flush=True)
signal.pause()
tracking.log(row(4))
tracking.end("stopped", {})
print(signal.getsignal(signal.SIGINT).__name__)
"""
    process = begin(tmp_path, ["wandb", "tensorboard"], range(4), last)
    assert process.stdout
    lines = [process.stdout.readline().strip() for _ in range(3)]
    assert lines[2] == "ready"
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=90)[0] == "<lambda>\n"
    (file,) = tmp_path.glob("runs/town/wandb/offline-run-*/*.wandb")
    assert [line["_step"] for line in wandb_records(file)["history"]] == [0, 1, 2, 3, 4]


@pytest.mark.full
def test_a_server_that_refuses(tmp_path: Path) -> None:
    names = [name for name in ("wandb", "mlflow") if find_spec(name)]
    needs(*names[:1] or ["wandb"])
    nowhere = "http://127.0.0.1:9"
    given = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": nowhere, "WANDB_INIT_TIMEOUT": "2"}
    given |= {"MLFLOW_TRACKING_URI": nowhere, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    printed = sorted(track(tmp_path, names, range(3), **given))
    if "mlflow" in names:
        line = printed.pop(0)
        assert line.startswith("track: mlflow is off: MlflowException: ") and line.endswith(SAFE)
        assert len(line) < 500
    (line,) = printed
    assert line.startswith("track: wandb is offline (") and "connection refused" in line
    assert "); to upload the run: wandb sync runs/town/wandb/offline-run-*-" in line
    (file,) = tmp_path.glob("runs/town/wandb/offline-run-*/*.wandb")
    assert len(wandb_records(file)["history"]) == 3


def test_a_package_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """Nor is it there where W&B, or the user, has left a folder of its name."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("filelock", "psutil"):
        spec = find_spec(name)
        assert spec and spec.origin
        (site / name).symlink_to(Path(spec.origin).parent)
    (tmp_path / "wandb").mkdir()
    code = f"""
import sys
sys.path = ["", {str(REPOSITORY / "src")!r}, {str(site)!r}] + [p for p in sys.path if p and "site-packages" not in p]
from pathlib import Path
from luthier.folder import RunFolder
from luthier.training.trackers import start_trackers
tracking = start_trackers(["wandb", "mlflow"], RunFolder(Path.cwd()), {{}}, print)
tracking.log({{"step": 1, "time": 0.0, "loss": 1.0}})
tracking.end("done", {{}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.splitlines() == [
        f"track: wandb is off: not installed (pip install wandb, or all: pip install 'luthier[track]'){SAFE}",
        f"track: mlflow is off: not installed (pip install mlflow-skinny, or all: pip install 'luthier[track]'){SAFE}",
    ]


def make_package(folder: Path, source: str) -> str:
    """A package `swanlab` that does as little as it can, then `source`; the folder that it is in."""
    package = folder / "site" / "swanlab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STUB + textwrap.dedent(source))
    return str(package.parent)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a package `swanlab` of that source, starts it, and gives the trackers and what they say."""
    monkeypatch.chdir(tmp_path)
    begun = []

    def make(source: str) -> tuple[trackers.Trackers, list[str]]:
        site = make_package(tmp_path, source)
        monkeypatch.setenv("PYTHONPATH", site)
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, "swanlab", raising=False)
        (tmp_path / "runs" / "town").mkdir(parents=True)
        said: list[str] = []
        tracking = start_trackers(["swanlab"], RunFolder(tmp_path / "runs" / "town"), RECIPE, said.append)
        begun.append(tracking)
        return tracking, said

    yield make
    for tracking in begun:
        assert tracking.on == []
    assert ended(tmp_path)
    shutil.rmtree(tmp_path / "site")


STUB = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace as Some
class Settings:
    Terminal = Probe = dict
    def __init__(self, **given):
        self.mode, self.api_key, self.log_dir = "local", None, Path("logs")
        self.project = self.experiment = Some(name=None)
def Text(text, caption): return text
config = {}
def init(**given):
    print("a banner")
    print("a warning", file=sys.stderr)
    os.system("echo a child")
    return Some(log=log, finish=lambda **_: None, url="http://local", config=config)
def log(*given, **more): pass
"""


def wait(tracking: trackers.Trackers, said: list[str], lines: int) -> None:
    deadline = time.monotonic() + 60
    while len(said) < lines and time.monotonic() < deadline:
        time.sleep(0.02)
        tracking.listen()
    assert len(said) >= lines, said


def test_a_tracker_that_fails_is_off_after_one_line(stub: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tracking, said = stub(
        """
        def log(figures, step):
            if step == 3: raise ValueError("\\x1b[31mno\\nmore")
        """
    )
    for step in range(8):
        tracking.log(row(step))
    wait(tracking, said, 2)
    for step in range(8, 12):
        tracking.log(row(step))
    tracking.end("done", {})
    assert said == ["track: swanlab: http://local", f"track: swanlab is off: ValueError: ␛[31mno more{SAFE}"]
    assert capfd.readouterr() == ("", "")


def test_a_tracker_that_hangs_costs_its_wait_at_the_end_once(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking, said = stub("def log(*given, **more): time.sleep(600)")
    wait(tracking, said, 1)
    monkeypatch.setattr(trackers, "END", 0.5)
    began = time.monotonic()
    long = {"step": 4, "prompt": "x" * 300_000, "reply": "y", "stopped": True}  # more than a pipe holds
    for step in range(20):
        tracking.log(row(step))
        tracking.samples([long])
    assert said == ["track: swanlab: http://local"]
    assert time.monotonic() - began < 5
    began = time.monotonic()
    tracking.end("done", {})
    tracking.end("done", {})
    assert 0.5 <= time.monotonic() - began < 5
    assert said[1:] == ["track: swanlab did not finish within 0.5 s and was ended; its figures are in metrics.jsonl"]


@pytest.mark.full
def test_a_tracker_that_is_new_to_a_long_run_catches_up_by_itself(
    stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "AHEAD", 100_000)
    monkeypatch.setattr(trackers, "END", 60.0)
    tracking, said = stub(
        """
        time.sleep(1)
        file = open(Path.cwd() / "logged", "w", buffering=1)
        def log(figures, step): file.write(f"{step} {figures['train/loss']}\\n")
        """
    )
    cards = [CARD | {"index": index, "energy_wh": 1.5} for index in range(8)]
    lines = [row(step) | {"gpu": cards} for step in range(1, 3001)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "runs" / "town" / "metrics.jsonl").write_text(text + '{"step": 3001, "half a li')
    began = time.monotonic()
    tracking.catch_up(3000)
    tracking.log(row(3001))
    assert time.monotonic() - began < 0.5
    tracking.end("done", {})
    assert said == ["track: swanlab: http://local"]
    expected = [f"{step} {4.0 - step / 8}\n" for step in range(1, 3002)]
    assert (tmp_path / "logged").read_text() == "".join(expected)


@pytest.mark.full
def test_a_tracker_that_takes_all_at_once_does_not_hold_the_run_up(stub: Any, tmp_path: Path) -> None:
    """The run has its turn after every AT_ONCE bytes; here a file, which takes all, is in the pipe's place."""
    tracking, _ = stub("")
    (tracker,) = tracking.on
    tracker.waiting += b" " * (3 * trackers.AT_ONCE - 1)
    into = tracker.into
    with (tmp_path / "taken").open("wb") as file:
        tracker.into = file.fileno()
        tracking.listen()
        assert os.fstat(tracker.into).st_size <= trackers.AT_ONCE
        tracking.listen()
        tracking.listen()
    tracker.into = into
    assert (tmp_path / "taken").stat().st_size == 3 * trackers.AT_ONCE - 1
    tracking.end("done", {})


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("START", 1.0, "it did not start within 1 s"),
        ("AHEAD", 100_000, "it hangs, or does not keep up with the run"),
    ],
)
def test_a_tracker_that_does_not_start_is_off(
    stub: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: float, why: str
) -> None:
    tracking, said = stub("time.sleep(600)")
    monkeypatch.setattr(trackers, name, value)
    for step in range(100):
        tracking.log(row(step) | {"gpu": [CARD | {"index": i} for i in range(100)]})
    wait(tracking, said, 1)
    assert said == [f"track: swanlab is off: {why}{SAFE}"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("input('key: ')", "EOFError: EOF when reading a line"),
        ("import getpass; open('/dev/tty')", "OSError: [Errno 6] No such device or address: '/dev/tty'"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("os._exit(3)", "its process ended (exit status 3)"),
        ("import numpy.nowhere", "ModuleNotFoundError: No module named 'numpy.nowhere'"),
    ],
)
def test_a_tracker_that_asks_or_dies_is_off(stub: Any, source: str, why: str) -> None:
    tracking, said = stub(source)
    tracking.log(row(1))
    wait(tracking, said, 1)
    assert said == [f"track: swanlab is off: {why}{SAFE}"]


# What is said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mlflow: https://me:s3cr@t@host:8080/a", "mlflow: https://host:8080/a"),
        ("Failed to parse: http://me:sl/ash@host/", "Failed to parse: http://host/"),
        ("'postgresql://me@db/x', 'mysql+p://a:b@db'", "'postgresql://db/x', 'mysql+p://db'"),
        ("see https://host:8080/@me or me@host", "see https://host:8080/@me or me@host"),
        ("401 for Bearer 0123abcd4567; 0123abcd", "401 for Bearer ***; ***"),
        ("a\nlong\tone \x1b[0m yes", "a *** ␛[0m yes"),
    ],
)
def test_a_line_has_no_secret(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WANDB_API_KEY": "0123abcd4567", "OF_TOKEN": "0123abcd", "A_PASSWORD": "long\n one", "ONE_KEY": "yes"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert one_line(text) == shown


def test_what_a_tracker_says_has_no_secret(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the half of one, where an error is cut short."""
    monkeypatch.setenv("SWANLAB_API_KEY", "0123abcd4567")
    tracking, said = stub(
        """
        def init(**given): return Some(log=log, url="http://me:secret@local/?key=0123abcd4567")
        def log(*given, **more): raise ValueError("e" * 180 + " http://me:" + "secret" * 9 + "@host 0123abcd4567")
        """
    )
    tracking.log(row(1))
    wait(tracking, said, 2)
    off = f"track: swanlab is off: ValueError: {'e' * 180} http://host ***{SAFE}"
    assert said == ["track: swanlab: http://local/?key=***", off]


def test_mlflow_is_said_without_its_password(tmp_path: Path) -> None:
    needs("mlflow")
    uri = f"sqlite://me:secret@host/{tmp_path}"
    printed = track(tmp_path, ["mlflow"], range(3), MLFLOW_TRACKING_URI=uri)
    assert "secret" not in str(printed) and len(printed) == 1


# Facts → numbers


def test_lines_are_logged_as_numbers_under_plain_names() -> None:
    assert numbers(row(0)) == {
        "train/epoch": 0.0,
        "eval/loss": 3.5,
        "memory_gib": 1.25,
        "gpu/1/memory_gib": 14.5,
    }
    line = row(3) | {"gpu": None, "supervised": 32, "rows": 6, "passes": 1}
    assert numbers(line) == {
        "train/epoch": 0.75,
        "train/loss": 3.625,
        "train/lr": 1e-4,
        "train/grad_norm": 0.5,
        "train/tokens": 64,
        "train/supervised_tokens": 32,
        "train/tokens_per_second": 512.0,
        "memory_gib": 1.25,
    }


def test_no_tracker_is_nothing() -> None:
    tracking = start_trackers([], RunFolder(Path("nowhere")), {}, print)
    tracking.log(row(1))
    tracking.end("done", {})
    assert not {"wandb", "mlflow", "swanlab", "tensorboard"} & set(sys.modules)
