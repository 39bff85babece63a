"""What every contestant's process measures of itself. Standard library alone, but for Watch's own imports."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Probe:
    """The seconds of each optimizer step, the losses, the gradients' norms, and memory.

    They are written to the job's `out` at the end. Make it when the imports are done: memory is told as a whole, and as
    what came after them.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.imports = job, status("VmRSS")
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []  # of each step's gradient, before it is clipped
        self.facts: dict[str, Any] = {}
        self.began = 0.0

    def begin(self) -> None:
        """A step begins."""
        self.began = time.perf_counter()

    def end(self) -> None:
        """A step has ended, its optimizer's part included."""
        self.seconds.append(time.perf_counter() - self.began)

    def write(self, packages: list[str]) -> None:
        """All that was measured, with the versions of what it was measured with."""
        found = {
            "seconds": self.seconds,
            "losses": self.losses,
            "norms": self.norms,
            "peak_mib": round(status("VmHWM")),
            "above_imports_mib": round(status("VmHWM") - self.imports),
            "versions": {name: version(name) for name in ["torch", "transformers", *packages]},
        }
        Path(self.job["out"]).write_text(json.dumps(found | self.facts), encoding="utf-8")


def status(key: str) -> float:
    """MiB that this process has (VmRSS), or had at most (VmHWM); elsewhere than on Linux the most for either."""
    path = Path("/proc/self/status")
    if not path.exists():
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    found = re.search(rf"{key}:\s+(\d+)", path.read_text())
    assert found is not None, key
    return int(found[1]) / 1024


def job_of() -> dict[str, Any]:
    """The job that this process was started with."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def tokens(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The rows of the step: input_ids and labels."""
    rows: list[dict[str, list[int]]] = json.loads(Path(job["folder"], "tokens.json").read_text(encoding="utf-8"))
    return rows
