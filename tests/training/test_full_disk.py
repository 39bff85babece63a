"""A disk that fills up: a small real one (tmpfs), with the run folder on it, and somebody else's file beside it.

The disk lies in a mount namespace of its own and is reached through /proc: nothing is mounted where others see it,
and no right is needed that a user lacks, where the system lets users have namespaces.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from luthier.errors import RunError
from luthier.folder import RunFolder
from luthier.models.adapters import save_adapter
from luthier.resume import resume_from
from luthier.run import train as luthier_train
from luthier.sections import TrainSection
from luthier.training.checkpoint import latest
from luthier.training.loop import Outcome
from rows import fit, lora, random_rows, tiny
from tiny import tiny_llama, tiny_tokenizer

ROWS = random_rows(23)
HELD_OUT = random_rows(5, seed=1)
SECTION: dict[str, Any] = {"batch": 6, "steps": 5, "save_every": 1, "eval_every": 2, "lr": 3e-3, "keep": 2}
LUTHIER = Path(sys.executable).parent / "luthier"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 2 MiB."""
    (tmp_path / "disk").mkdir()
    rights = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    script = "mount -t tmpfs -o size=2m small disk && echo there && exec cat"
    try:
        holder = subprocess.Popen(
            ["unshare", *rights, "sh", "-c", script],
            cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs `unshare`, to mount a small disk")
    with holder:
        assert holder.stdin is not None and holder.stdout is not None
        if holder.stdout.readline() != "there\n":
            pytest.skip("needs the right to mount a small disk in a namespace of its own")
        yield Path(f"/proc/{holder.pid}/root") / (tmp_path / "disk").relative_to("/")
        holder.stdin.close()


def fill(disk: Path, leave: int) -> None:
    """Somebody else's file: `leave` bytes stay free."""
    with (disk / "other").open("ab") as file:
        file.write(b"0" * max(shutil.disk_usage(disk).free - leave, 0))


def free(disk: Path) -> None:
    (disk / "other").unlink()


def train(run: Path, say: Callable[[str], None] = lambda line: None, **section: Any) -> Outcome:
    """Begin a run, or go on with it as the real verb does."""
    model, tokenizer = lora(tiny("qwen2"), lora_dropout=0.1), tiny_tokenizer()
    run.mkdir(exist_ok=True)
    with RunFolder(run).locked():
        return fit(
            run,
            model,
            ROWS,
            TrainSection(**SECTION | section),
            eval_rows=HELD_OUT,
            say=say,
            resume=resume_from(RunFolder(run), lambda line: None),
            write=lambda target: save_adapter(model, target, tokenizer),
        )


def filled_at(disk: Path, step: int, leave: int) -> Callable[[str], None]:
    def say(line: str) -> None:
        if re.match(rf"step\s+{step}/", line):
            fill(disk, leave)

    return say


def assert_whole(run: Path) -> None:
    """Nothing half written, and nothing left of what was."""
    folders = [*(run / "checkpoints").iterdir(), *([run / "adapter"] if (run / "adapter").exists() else [])]
    assert not [path.name for path in (*folders, *run.iterdir()) if path.name.startswith(".") and path.name != ".lock"]
    for folder in folders:
        assert load_file(folder / "adapter_model.safetensors") and json.loads((folder / "tokenizer.json").read_text())
        assert folder.name == "adapter" or load_file(folder / "state.safetensors")
        assert folder.name == "adapter" or json.loads((folder / "state.json").read_text())


def result(run: Path) -> list[bytes]:
    newest = latest(run / "checkpoints")
    assert newest is not None
    names = ["adapter_model.safetensors", "state.safetensors"]
    return [(run / "adapter" / names[0]).read_bytes(), *((newest / name).read_bytes() for name in names)]


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    train(run)
    return run


LEFT = (0, 4096, 8192, 12288, 16384, 20480, 32768, 49152, 65536, 98304, 131072)
CASES = [*((3, leave) for leave in LEFT), *((4, leave) for leave in LEFT[1:7:2])]


@pytest.mark.parametrize(
    ("step", "leave"),
    [pytest.param(*case, marks=[pytest.mark.full] * (place % 3 > 0)) for place, case in enumerate(CASES)],
)
def test_a_disk_that_fills_up_leaves_the_checkpoint_before_it(
    small_disk: Path, straight: Path, step: int, leave: int
) -> None:
    """With each number of bytes left another file is the one that does not fit: metrics, tokenizer, tensors, state.

    At step 4 it is the best adapter, which an older one must outlive.
    """
    run = small_disk / "run"
    with pytest.raises(RunError) as caught:
        train(run, filled_at(small_disk, step, leave))
    assert_whole(run)
    newest = run / "checkpoints" / f"step-{step - 1:06d}"
    assert str(caught.value) == (
        f"{run}: no room left on the disk; last good checkpoint: {newest}; free some space and resume"
    )
    assert (run / "adapter").is_dir()
    free(small_disk)
    train(run)
    assert result(run) == result(straight)
    assert steps(run) == [0, 1, 2, 3, 4, 5]
    assert_whole(run)


def test_a_disk_that_fills_up_while_a_line_is_written(small_disk: Path, tmp_path: Path) -> None:
    """No checkpoint is due: it is the metrics that find the disk full. The heartbeat would, too, and keeps quiet."""
    run, section = small_disk / "run", {"steps": 36, "save_every": 5, "eval_every": 36}
    metrics = run / "metrics.jsonl"

    def say(line: str) -> None:
        """The metrics line of this step is the next thing to be written; a file's last page is filled with it first."""
        step = re.match(r"step +(\d+)/", line)
        if step is None or int(step[1]) < 6 or (small_disk / "other").exists():
            return
        room, width = -metrics.stat().st_size % 4096, len(metrics.read_text().splitlines()[-1])
        if room < width - 20:
            fill(small_disk, 0)

    with pytest.raises(RunError, match=r"no room left on the disk; last good checkpoint: \S+/step-\d+; free some"):
        train(run, say, **section)
    assert_whole(run)
    assert not metrics.read_text().endswith("}\n")  # the line was cut off
    assert json.loads((run / "status.json").read_text())["state"] == "running"  # the disk takes no last word either
    free(small_disk)
    train(run, **section)
    train(tmp_path / "straight", **section)
    assert result(run) == result(tmp_path / "straight")
    assert steps(run) == list(range(37))
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_a_run_that_would_not_fit_is_refused_before_its_first_step(small_disk: Path) -> None:
    fill(small_disk, 300_000)
    said: list[str] = []
    with pytest.raises(RunError) as caught:
        train(small_disk / "run", said.append)
    assert re.fullmatch(
        rf"{small_disk / 'run'}: the disk has 28\d\.\d KiB free, and the run needs up to 4\d\d\.\d KiB: 3 checkpoints "
        r"of 13\d\.\d KiB \(2 kept and a new one\) and an adapter of 3\d\.\d KiB; lower train\.keep, free some space, "
        "or train in a folder on another disk",
        str(caught.value),
    )
    assert not [line for line in said if line.startswith("step")]
    assert list((small_disk / "run").glob("checkpoints/*")) == []
    free(small_disk)
    assert train(small_disk / "run").steps == 5


@pytest.mark.full
def test_the_command_line_on_a_disk_that_fills_up(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is stopped while its disk fills up, as another's writing would do it between two of its own."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    for name in ("here", "straight"):
        begin(tmp_path / name)
    (tmp_path / "here" / "runs").symlink_to(small_disk)
    process = luthier(tmp_path / "here", "train", "town.yaml")
    with process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if re.match(r"step\s+7/", line):
                break
        process.send_signal(signal.SIGSTOP)
        fill(small_disk, 60_000)
        process.send_signal(signal.SIGCONT)
        process.stdout.read()
        errors = process.stderr.read().splitlines()
    run = tmp_path / "here" / "runs" / "town"
    newest = latest(run / "checkpoints")
    assert process.returncode == 1 and newest is not None and int(newest.name[5:]) >= 5
    assert errors == [
        f"error: {run}: no room left on the disk; last good checkpoint: {newest}; free some space and resume"
    ]
    assert_whole(run)
    free(small_disk)
    with luthier(tmp_path / "here", "train", "runs/town", "--resume") as again:
        said, errors_again = again.communicate()
    assert (again.returncode, errors_again) == (0, "") and f"resume: from checkpoints/{newest.name}" in said
    assert_whole(run)
    monkeypatch.chdir(tmp_path / "straight")
    luthier_train("town.yaml", say=lambda line: None)
    assert result(run) == result(tmp_path / "straight" / "runs" / "town")
    assert steps(run) == list(range(1, 41))


@pytest.mark.parametrize("leave", [pytest.param(n, marks=[pytest.mark.full] * (n > 0)) for n in (0, 4096, 8192, 16384)])
def test_a_disk_that_is_full_when_a_run_begins(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: int
) -> None:
    """With each number of bytes left another file of the run's record is the one that does not fit."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    begin(tmp_path / "here")
    (tmp_path / "here" / "runs").symlink_to(small_disk)
    fill(small_disk, leave)
    with luthier(tmp_path / "here", "train", "town.yaml") as process:
        errors = process.communicate()[1].splitlines()
    assert process.returncode == 1 and len(errors) == 1, errors
    assert errors[0].startswith(f"error: {tmp_path / 'here' / 'runs' / 'town'}") and "free some space" in errors[0]
    if leave < 16384:
        assert [path.name for path in small_disk.iterdir()] == ["other"]


def begin(folder: Path) -> None:
    """A folder with a tiny model, 23 rows and a recipe."""
    tiny_llama(folder / "model")
    rows = [{"prompt": f"Where is {i}?", "response": f"In town {i % 3}."} for i in range(23)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name": "./model"},
        "data": {"train": "rows.jsonl", "max_length": 64},
        "method": {"r": 4, "dropout": 0.1},
        "train": {"batch": 6, "steps": 40, "lr": 5e-3, "save_every": 5, "keep": 2},
    }
    (folder / "town.yaml").write_text(yaml.safe_dump(recipe))


def luthier(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([LUTHIER, *arguments], cwd=folder, env=environment, **pipes)
