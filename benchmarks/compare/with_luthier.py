"""Luthier, as `luthier train` runs a recipe; which rungs of its engine are on is in the job."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from probe import Probe, job_of

from luthier import run as runs


def main() -> None:
    job = job_of()
    torch.set_num_threads(job["threads"])
    import luthier.training.loop  # noqa: F401 (what a run loads as well, before memory is looked at)

    probe = Probe(job)
    os.chdir(job["work"])
    said: list[str] = []
    steps = [f"train.steps={job['steps']}", "train.log_every=1000", "train.save_every=1000"]
    run = runs.train(job["folder"] + "/recipe.yaml", [*steps, *job["overrides"]], proof=False, say=said.append)
    lines = [json.loads(line) for line in run.folder.metrics.read_text(encoding="utf-8").splitlines()]
    probe.losses, probe.norms = [line["loss"] for line in lines], [line["grad_norm"] for line in lines]
    # From one step's record to the next one's: all that a step takes. The first has its own seconds only.
    first = lines[0]["tokens"] / lines[0]["tokens_per_second"]
    probe.seconds = [first, *(after["time"] - before["time"] for before, after in zip(lines, lines[1:], strict=False))]
    kept = runs.open_run(Path(run.folder.path)).recipe
    probe.facts |= {
        "passes": lines[0]["passes"],
        "computed": lines[0]["computed"],
        "said": [line for line in said if line.startswith("engine")],
        "tokens_per_pass": kept.train.tokens_per_pass,
    }
    probe.write(["luthier", "peft"])


if __name__ == "__main__":
    main()
