"""How long a user waits: for the help, for the list of runs, and from `luthier train` to its first step.

Beside the last, in turn, what importing torch, transformers and peft alone takes. Wall clock: use a quiet machine.

    .venv/bin/python benchmarks/startup.py
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path

LUTHIER = Path(sys.executable).parent / "luthier"
TURNS = 5
IMPORTS = "import torch, transformers, peft"


def seconds(command: list[str | Path], folder: Path) -> float:
    """Of a whole process, by the wall clock."""
    began = time.time()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.time() - began


def to_first_step(folder: Path, number: int) -> float:
    """From the start of `luthier train` on the embedded model to the line of its first step."""
    began = time.time()
    command = [LUTHIER, "train", "recipe.yaml", f"run=r{number}", "train.epochs=null", "train.steps=1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    lines = (folder / "runs" / f"r{number}" / "metrics.jsonl").read_text("utf-8").splitlines()
    return next(float(line["time"]) for line in map(json.loads, lines) if line["step"] == 1) - began


def main() -> None:
    """Print the medians."""
    with tempfile.TemporaryDirectory() as scratch, as_file(files("luthier") / "assets") as assets:
        folder = Path(scratch)
        shutil.copytree(assets / "quickstart", folder, dirs_exist_ok=True)
        shutil.copytree(assets / "tiny", folder / "tiny")
        to_first_step(folder, 0)  # fills the cache of encoded rows, and the disk's
        helps, lists, bare, trained = list[float](), list[float](), list[float](), list[float]()
        for turn in range(1, TURNS + 1):
            bare.append(seconds([sys.executable, "-c", IMPORTS], folder))
            trained.append(to_first_step(folder, turn))
            helps.append(seconds([LUTHIER, "--help"], folder))
            lists.append(seconds([LUTHIER, "runs"], folder))
    for name, values in (("luthier --help", helps), ("luthier runs", lists), (IMPORTS, bare)):
        print(f"{name:<34} {statistics.median(values):6.2f} s   ({min(values):.2f} to {max(values):.2f})")
    more = statistics.median(mine - theirs for mine, theirs in zip(trained, bare, strict=True))
    median = statistics.median(trained)
    print(f"{'luthier train, to step 1':<34} {median:6.2f} s   {more:.2f} s more than the imports, turn by turn")


if __name__ == "__main__":
    main()
