"""Who is measured, and one turn of one of them in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers

HERE = Path(__file__).resolve().parent
RUNGS = [
    "packed",
    "chunked_loss",
    "fused_lora",
    "fused_layers",
    "fp32_products",
    "fast_attention",
    "shared_prefixes",
    "prefetch",
]
"""Of the recipe's `engine:` section, in the order in which they are added."""
TOKENS_PER_PASS = 4096
"""In every line of Luthier's: what `auto` gives where memory allows, and the same whatever is free just now."""
BATCH = 10
"""Rows at once of those who pad or count rows: S4's; where a step is no multiple of it, the largest divisor below."""


@dataclass(frozen=True)
class Contestant:
    """`excluded`: steps at the beginning of a turn that are not counted; `steps`: those that are.

    rung: what Luthier's ladder adds here. job: what its process is told besides.
    """

    name: str
    group: str
    script: str
    variant: str = ""
    steps: int = 1
    excluded: int = 0
    rung: str | None = None
    job: dict[str, Any] = field(default_factory=dict)

    @property
    def peer(self) -> str | None:
        """The environment of its own that it needs."""
        return self.script.removeprefix("with_") if self.script.removeprefix("with_") in peers.PEERS else None


def contestants(full: bool, slow: bool) -> list[Contestant]:
    """In the order of their turns. slow: a step of theirs takes so long that no whole one is spent on warming up."""
    counts = {"steps": 1, "excluded": 0 if slow else 1}
    others = [
        Contestant("tutorial script", "tutorial script", "with_trainer", **counts),
        Contestant("TRL padded", "TRL", "with_trl", "padded", **counts),
        Contestant("TRL packed", "TRL", "with_trl", "packed", **counts),
        Contestant("LLaMA-Factory", "LLaMA-Factory", "with_llamafactory", "plain", **counts),
        Contestant("LLaMA-Factory neat_packing", "LLaMA-Factory", "with_llamafactory", "neat_packing", **counts),
        Contestant("Unsloth", "Unsloth", "with_unsloth", "packed", steps=2, excluded=1),
    ]
    if full:
        plain = {"checkpointing": False}
        others += [
            Contestant("TRL packed, nothing recomputed", "TRL", "with_trl", "packed", job=plain, **counts),
            Contestant(
                "LLaMA-Factory neat_packing, nothing recomputed",
                "LLaMA-Factory",
                "with_llamafactory",
                "neat_packing",
                job=plain,
                **counts,
            ),
        ]
    return others + ladder(full)


def ladder(full: bool) -> list[Contestant]:
    """Luthier plain, and with each rung added to those before it; at last what is off by default."""

    def line(name: str, on: int, rung: str | None, *more: str, steps: int = 2, excluded: int = 1) -> Contestant:
        off = [f"engine.{key}=false" for key in RUNGS[on:]]
        job = {"overrides": [f"train.tokens_per_pass={TOKENS_PER_PASS}", *off, *more]}
        return Contestant(name, "Luthier", "with_luthier", steps=steps, excluded=excluded, rung=rung, job=job)

    # A padded step takes many times as long as the others: one is enough.
    lines = [line("Luthier, every rung off", 0, "plain", steps=1)]
    lines += [line(f"Luthier + {rung}", on, rung) for on, rung in enumerate(RUNGS, start=1)]
    if full:
        lines.append(line("Luthier, dropout 0.1", len(RUNGS), None, "method.dropout=0.1"))
        lines.append(line("Luthier + compile", len(RUNGS), None, "engine.compile=true", excluded=3))
    return lines


def turn(
    one: Contestant, folder: Path, rows: int, threads: int, timeout: float, script: str | None = None
) -> dict[str, Any]:
    """One turn: what its process measured, or {"failed": why}. Its output goes to a log beside its files.

    script: another than its own, in its environment.
    """
    work = folder / "turns" / one.name.replace(" ", "-").replace(",", "")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    batch = max(size for size in range(1, BATCH + 1) if rows % size == 0)
    job = {"folder": str(folder), "work": str(work), "out": str(work / "out.json"), "threads": threads}
    job |= {"batch": batch, "steps": one.steps + one.excluded, "variant": one.variant} | one.job
    (work / "job.json").write_text(json.dumps(job))
    python = str(peers.python_of(one.peer)) if one.peer else sys.executable
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with (work / "log").open("wb") as log:
        process = subprocess.Popen(
            [python, str(HERE / f"{script or one.script}.py"), str(work / "job.json")],
            cwd=work,
            env=environment | {"TOKENIZERS_PARALLELISM": "true", "LUTHIER_CACHE": str(work / "cache")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # what it started itself ends with it
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"failed": f"longer than {timeout:g} s"}
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if code or not (work / "out.json").is_file():
        lines = (work / "log").read_text(errors="replace").strip().splitlines() or ["no output"]
        last = lines[-1].replace(str(folder), "…").replace(str(peers.ROOT), "…")  # results name no folder
        return {"failed": f"status {code}: {last[:160]}"}
    found: dict[str, Any] = json.loads((work / "out.json").read_text())
    return found
