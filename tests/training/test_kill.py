"""Exact resume: a run that was killed, wherever, ends bit for bit as the run that was not.

Real processes and real deaths (dying.py). Broken on purpose, each of these made tests here fail: a checkpoint or
adapter written, replaced or removed in place; metrics.jsonl not cut back to the checkpoint; optimizer, early-stop
counters, tokens_per_pass or any generator not restored; what a killed process left not cleared away.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from dying import HELD_OUT, ROWS, SECTION, Job, Processes, build, visible
from luthier.models.adapters import fill_adapter
from luthier.sections import TrainSection
from luthier.training import checkpoint
from luthier.training.checkpoint import latest
from luthier.training.optim import make_optimizer
from rows import fit

SEED = 3
TIMES = ("time", "tokens_per_second", "memory_gib")
DURING = {
    "the writing of a checkpoint's adapter": r"/save/save_adapter: ",
    "the gathering of a checkpoint's tensors": r"/save/_tensors: ",
    "the writing of a checkpoint's state.json": r"/save/write_json/write_atomic: ",
    "the flushing of a checkpoint": r"/save/folder_atomic/_flush: ",
    "the naming of a checkpoint": r"/save/folder_atomic: temporary\.replace",
    "the removal of an old checkpoint": r"/prune/rmtree",
    "the writing of the best adapter": r"(?<!/save)/(folder_atomic|save_adapter): ",
    "the exchange of the best adapter": r"target\.replace\(old\) → \S+: temporary\.replace",
    "the making of metrics.jsonl": r"/begin/write_atomic: ",
    "the writing of the last status.json": r"/end/end/write_json/write_atomic: ",
}
"""What a process does when it is killed, as its line, or the line before it and its own, tell."""
BETWEEN = {
    "optimizer step and metrics line": (r"optimizer\.step\(\)", r"/record: file\.write"),
    "metrics line and checkpoint": (r"/record: file\.write", r"/save: "),
    "the names of two checkpoints": (r"/save/folder_atomic: temporary\.replace", r"/prune: for leftover"),
}
"""After the first of these lines, and not yet at the second."""


class Straight(NamedTuple):
    """A run that nobody kills. places: what its lines are, from the first."""

    path: Path
    places: list[str]


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def straight(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    assert processes(Job(str(folder / "run"), places=str(folder / "places.json"))) == 0
    return Straight(folder / "run", json.loads((folder / "places.json").read_text()))


def killed(processes: Processes, run: Path, moment: int, **job: Any) -> None:
    assert processes(Job(str(run), moment=moment, **job)) == -signal.SIGKILL
    assert_that_what_is_visible_loads(run, job.get("method", "lora"))


def resumed(processes: Processes, run: Path, expected: Path, **job: Any) -> None:
    """Go on to the end; it must be the end of `expected`."""
    assert processes(Job(str(run), **job)) == 0
    assert_equal_runs(run, expected)


def assert_that_what_is_visible_loads(run: Path, method: str) -> None:
    """Every step-* folder by what resumes from it, the adapter by what `generate` loads it with."""
    with torch.random.fork_rng(devices=[]):
        model = build(method)
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for folder in visible(run):
            if folder.name.startswith("step-"):
                optimizer = make_optimizer(parameters, TrainSection(**SECTION))
                state = checkpoint.load(folder, parameters, optimizer, print)
                assert state.step == int(folder.name[5:]) and len(optimizer.state) == len(parameters)
            elif folder.name == "adapter":
                fill_adapter(model, folder)
            else:
                model.load_state_dict(load_file(folder / "model.safetensors"))


def assert_equal_runs(run: Path, expected: Path) -> None:
    """The same files with the same bytes, but for times and process ids; so weights, optimizer and generators too."""
    assert metrics(run) == metrics(expected)
    assert [line["step"] for line in metrics(run)] == list(range(len(metrics(expected))))
    assert files(run) == files(expected)
    for name in files(expected):
        if name.endswith(("state.json", "proof.json")):
            assert without_seconds(run / name) == without_seconds(expected / name)
        elif name not in ("status.json", "metrics.jsonl"):
            assert (run / name).read_bytes() == (expected / name).read_bytes(), name


def files(run: Path) -> list[str]:
    """Hidden leftovers of killed writes included."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, times apart."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def without_seconds(path: Path) -> Any:
    record = json.loads(path.read_text())
    for part in (record, record.get("state", {})):
        part.pop("seconds", None)
    return record


def moments(places: list[str]) -> list[int]:
    """A hundred moments drawn evenly from a run's lines, the same ones every time."""
    return random.Random(SEED).sample(range(1, len(places) + 1), 100)


def moments_in(places: list[str], window: str) -> list[int]:
    """All moments of a run that lie in a window of DURING or BETWEEN."""
    if window in DURING:
        pairs = zip(["", *places], places, strict=False)
        return [
            count
            for count, (before, here) in enumerate(pairs, 1)
            if re.search(DURING[window] + "[^→]*$", f"{before} → {here}")
        ]
    begin, end = BETWEEN[window]
    found, inside = [], False
    for count, place in enumerate(places, 1):
        inside = (inside or re.search(begin, places[count - 2]) is not None) and not re.search(end, place)
        found += [count] if inside else []
    return found


def in_step(places: list[str], step: int) -> int:
    """The moment at which step `step` is about to move the optimizer."""
    return [count for count, place in enumerate(places, 1) if re.search(r"optimizer\.step\(\)", place)][step - 1]


FULL = pytest.mark.full


@pytest.mark.parametrize("number", [*range(6), *(pytest.param(number, marks=FULL) for number in range(6, 100))])
def test_killed_at_a_random_moment(processes: Processes, straight: Straight, tmp_path: Path, number: int) -> None:
    """Every fourth is killed a second time, while it begins to go on."""
    killed(processes, tmp_path / "run", moments(straight.places)[number])
    if number % 4 == 3:
        killed(processes, tmp_path / "run", random.Random(number).randrange(1, 200))
    resumed(processes, tmp_path / "run", straight.path)


@pytest.mark.parametrize("again", [0, *(pytest.param(again, marks=FULL) for again in range(1, 4))])
@pytest.mark.parametrize("window", [*DURING, *BETWEEN])
def test_killed_during(processes: Processes, straight: Straight, tmp_path: Path, window: str, again: int) -> None:
    found = moments_in(straight.places, window)
    assert found, f"no line of the run lies in {window}"
    killed(processes, tmp_path / "run", random.Random(SEED + again).choice(found))
    resumed(processes, tmp_path / "run", straight.path)


def test_an_adapter_that_was_moved_aside_comes_back(processes: Processes, straight: Straight, tmp_path: Path) -> None:
    """Killed between the two renames that exchange it, and again before a better one can be written."""
    run = tmp_path / "run"
    killed(processes, run, moments_in(straight.places, "the exchange of the best adapter")[0])
    assert not (run / "adapter").exists() and latest(run / "checkpoints") is not None
    killed(processes, run, 200)
    assert (run / "adapter").is_dir()
    resumed(processes, run, straight.path)


@pytest.mark.parametrize("file", ["save_file", "write_json"])
def test_killed_in_the_middle_of_a_file(processes: Processes, straight: Straight, tmp_path: Path, file: str) -> None:
    """The system ends the process (SIGXFSZ) when state.safetensors or state.json of step 6 would pass 20,000 bytes.

    Two were written before it: the preflight's and that of step 3.
    """
    run = tmp_path / "run"
    moment = [count for count, place in enumerate(straight.places, 1) if f"/save: {file}(" in place][2]
    assert processes(Job(str(run), moment=moment, torn=20_000)) == -signal.SIGXFSZ
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000003"]
    begun = [path for path in (run / "checkpoints").glob(".step-000006.*/*") if path.name.startswith(".")]
    assert len(begun) == 1 and begun[0].stat().st_size in (0, 20_000)  # safetensors asks for the whole size first
    assert_that_what_is_visible_loads(run, "lora")
    resumed(processes, run, straight.path)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_at_no_line_of_a_run_a_folder_is_visible_that_is_not_whole(
    processes: Processes, tmp_path: Path, method: str
) -> None:
    assert processes(Job(str(tmp_path / "run"), method, watch=True)) == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_step_3_of_8_and_a_kill_is_a_straight_run(processes: Processes, tmp_path: Path, method: str) -> None:
    """LoRA with dropout 0.1, and full fine-tuning; step 5, which is cut off, belongs to the second epoch."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert processes(Job(str(straight), method, places=str(tmp_path / "places.json"))) == 0
    killed(processes, run, in_step(json.loads((tmp_path / "places.json").read_text()), 5), method=method)
    assert latest(run / "checkpoints") == run / "checkpoints" / "step-000003"
    assert metrics(run) == metrics(straight)[:5]  # steps 0 to 4; step 4 is taken a second time
    resumed(processes, run, straight, method=method)
    assert [line["rows"] for line in metrics(run)] == [None, 6, 6, 6, 5, 6, 6, 6, 5]
    weights = load_file(straight / "checkpoints" / "step-000008" / "state.safetensors")
    assert sum(name.endswith("/exp_avg_sq") and bool(value.any()) for name, value in weights.items()) > 10


def test_early_stopping_counts_on(processes: Processes, tmp_path: Path) -> None:
    """Two evaluations without a better loss lie before the kill, the third after it."""
    section = {"steps": 40, "lr": 0.05, "eval_every": 1, "save_every": 1, "early_stop": 3}
    straight, run, places = tmp_path / "straight", tmp_path / "run", tmp_path / "places.json"
    assert processes(Job(str(straight), section=section, places=str(places))) == 0
    ended = json.loads((straight / "ended.json").read_text())
    assert 0 < ended["best_step"] == ended["steps"] - 3
    killed(processes, run, in_step(json.loads(places.read_text()), ended["steps"]), section=section)
    newest = latest(run / "checkpoints")
    assert newest is not None
    state = json.loads((newest / "state.json").read_text())["state"]
    assert (state["not_better"], state["best_step"]) == (2, ended["best_step"])
    resumed(processes, run, straight, section=section)


def test_the_pass_size_that_auto_decided_is_kept(processes: Processes, straight: Straight, tmp_path: Path) -> None:
    """The checkpoint says 50 tokens a pass; auto would now decide on a whole step, whose sums round otherwise.

    Sabotage: TrainState.tokens_per_pass not restored (decided anew at each start): this test fails.
    """
    anew, run = tmp_path / "anew", tmp_path / "run"
    assert processes(Job(str(anew), section={"tokens_per_pass": "auto"})) == 0
    assert {line["passes"] for line in metrics(anew)[1:]} == {1}
    results = [run / "adapter" / "adapter_model.safetensors" for run in (anew, straight.path)]
    assert results[0].read_bytes() != results[1].read_bytes()
    killed(processes, run, in_step(straight.places, 5))
    resumed(processes, run, straight.path, section={"tokens_per_pass": "auto"})


def test_what_a_run_leaves_has_the_modes_that_the_user_asked_for(straight: Straight) -> None:
    """safetensors makes its files for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in straight.path.rglob("*") if path.is_file()}
    modes.pop(".lock")
    assert set(modes.values()) == {0o666 & ~mask} and len(modes) > 8


def test_another_device_is_said(tmp_path: Path) -> None:
    model = build("lora")
    fit(tmp_path, model, ROWS, TrainSection(**SECTION), eval_rows=HELD_OUT)
    state = tmp_path / "checkpoints" / "step-000008" / "state.json"
    record = json.loads(state.read_text())
    record["environment"]["device"] = "NVIDIA H200"
    state.write_text(json.dumps(record))
    said: list[str] = []
    section = TrainSection(**SECTION | {"steps": 9})
    fit(tmp_path, build("lora"), ROWS, section, eval_rows=HELD_OUT, resume=state.parent, say=said.append)
    line = "resume: device NVIDIA H200 → cpu: the numbers will be equal only to rounding"
    assert said.count(line) == 1 and len([line for line in said if line.startswith("resume")]) == 1
