"""Several processes as a user runs them: the launcher's and torchrun's, stopped, resumed, refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shell import ENVIRONMENT, LUTHIER, begin, luthier, well

TWO = "train.devices=[cpu, cpu]"


def started(folder: Path, *arguments: str) -> Any:
    """A verb that runs, with its lines in `stdout`."""
    return subprocess.Popen([LUTHIER, *arguments], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run in two processes."""
    folder = tmp_path_factory.mktemp("two")
    begin(folder, train={"save_every": 2, "keep": "all"})
    (folder / "train.txt").write_text(well(folder, "train", "town.yaml", TWO))
    return folder


@pytest.mark.full
def test_two_processes_are_one(two: Path) -> None:
    """Dropout 0.1, an epoch end, a last batch of fewer rows."""
    said = (two / "train.txt").read_text()
    assert " on cpu, in 2 processes\n" in said and said.count("engine = reference, ") == 1
    assert said.count("step  1/8") == 1 and said.count("\nsample: ") == 2
    well(two, "train", "town.yaml", "run=alone")
    together, alone = (metrics(two / "runs" / name) for name in ("town", "alone"))
    assert [line["step"] for line in together] == list(range(9))
    for name in ("loss", "grad_norm", "eval_loss"):
        one, two_of_them = ([line[name] for line in lines if line[name] is not None] for lines in (alone, together))
        assert two_of_them == pytest.approx(one, rel=1e-5) and len(one) in (3, 8)
    for name in ("tokens", "supervised", "rows", "lr"):
        assert [line[name] for line in together] == [line[name] for line in alone]


@pytest.mark.full
def test_stopped_and_resumed_it_is_the_same_run_bit_for_bit(two: Path, tmp_path: Path) -> None:
    begin(tmp_path, train={"save_every": 2, "keep": "all", "devices": ["cpu", "cpu"]})
    said = ""
    with started(tmp_path, "train", "town.yaml") as process:
        for line in process.stdout:
            said += line
            if line.startswith("step  3/8"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    step = said.splitlines()[-1].split(";")[0].removeprefix("stopped at step ")
    assert said.splitlines()[-1] == f"stopped at step {step}; go on with: luthier train runs/town --resume"
    assert 3 <= int(step) < 8
    assert f"resume: from checkpoints/step-00000{step}\n" in (
        resumed := well(tmp_path, "train", "runs/town", "--resume")
    )
    assert "equal only to rounding" not in resumed
    theirs, ours = (load_file(path / "runs/town/adapter/adapter_model.safetensors") for path in (two, tmp_path))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [line["loss"] for line in metrics(tmp_path / "runs/town")] == [
        line["loss"] for line in metrics(two / "runs/town")
    ]


@pytest.mark.full  # tests/training/test_launch.py has torchrun's part of it
def test_torchrun_starts_it_as_well_and_one_process_can_go_on(two: Path, tmp_path: Path) -> None:
    begin(tmp_path, train={"save_every": 2, "steps": 8})
    done = subprocess.run(
        [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc-per-node", "2",
         "-m", "luthier", "train", "town.yaml", TWO],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step  8/8") == 1 and done.stdout.count("\nadapter: ") == 1
    assert [line["loss"] for line in metrics(tmp_path / "runs/town")] == [
        line["loss"] for line in metrics(two / "runs/town")
    ]
    for folder in ("step-000006", "step-000008"):  # as if it had been killed after step 4
        (tmp_path / "runs/town/checkpoints" / folder).rename(tmp_path / folder)
    said = well(tmp_path, "train", "runs/town", "train.devices=cpu", "--resume")
    assert "resume: processes 2 → 1: the numbers will be equal only to rounding\n" in said
    assert [line["loss"] for line in metrics(tmp_path / "runs/town")][1:] == pytest.approx(
        [line["loss"] for line in metrics(two / "runs/town")][1:], rel=1e-5
    )


def test_a_mistake_is_told_once(two: Path) -> None:
    done = luthier(two, "train", "town.yaml", TWO, "model.name=./nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    done = luthier(two, "train", "town.yaml", "train.devices=[0, cpu]")
    assert done.returncode == 2 and "train.devices" in done.stderr and "mixes the CPU with GPUs" in done.stderr


@pytest.mark.full
def test_the_launcher_killed_leaves_no_process_behind(two: Path, tmp_path: Path) -> None:
    begin(tmp_path, train={"steps": 4000})
    with started(tmp_path, "train", "town.yaml", TWO) as process:
        next(line for line in process.stdout if line.startswith("step"))
        process.kill()
    worker = json.loads((tmp_path / "runs/town/status.json").read_text())["pid"]
    until = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
