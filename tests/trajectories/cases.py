"""The models and rows of the trajectory tests, and the ways in which a step of theirs can be cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from luthier.sections import TrainSection
from luthier.training.distributed import World, join
from rows import fit, lora, random_rows, tiny

FAMILIES = ("llama", "qwen2", "gemma", "gemma2", "opt", "glm", "phi3", "mistral", "yuan")
FULL = ("llama, full", "opt, full")
"""Fine-tuned whole, without dropout; Llama's head is its embedding."""
CASES = (*FAMILIES, *FULL)

ROWS = random_rows(23, seed=8, longest=30)
"""5 to 30 tokens: the windows of 8 matter. A step has 109 to 142 of them."""
SECTION = TrainSection(batch=8, steps=6, lr=0.01, warmup=1, save_every=6, tokens_per_pass=1000)
"""Three steps an epoch, of 8, 8 and 7 rows; two epochs."""
CUTS: dict[str, dict[str, Any]] = {
    "one pass": {},
    "three passes": {"tokens_per_pass": 51},
    "one row a pass": {"tokens_per_pass": 1},
    "activation checkpointing": {"tokens_per_pass": 51, "activation_checkpointing": True},
}


class Trajectory(NamedTuple):
    """What a run came to, one entry a step: mean loss, gradient norm before clipping, passes, rows."""

    losses: list[float]
    norms: list[float]
    passes: list[int]
    rows: list[int]


def model_of(case: str, dropout: float = 0.1) -> Any:
    """The same at every call. Adapters that already do something: all of their gradients differ from 0."""
    family = case.removesuffix(", full")
    if case in FULL:
        return tiny(family, tied=family == "llama")
    return lora(tiny(family), lora_dropout=dropout, init_lora_weights=False)


def kind_of(case: str) -> str:
    return "full" if case in FULL else "lora"


def trajectory(
    folder: Path,
    case: str,
    model: Any = None,
    *,
    world: World | None = None,
    resume: Path | None = None,
    **changes: Any,
) -> Trajectory:
    """Luthier's own run of a case in `folder`, through the engine; `changes` are those of its train section."""
    section = TrainSection(**{**SECTION.model_dump(exclude_unset=True), **changes})
    fit(folder, model or model_of(case), ROWS, section, kind=kind_of(case), world=world, resume=resume)
    proof = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
    assert proof["path"] == "engine", proof
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return Trajectory(*([line[name] for line in lines] for name in ("loss", "grad_norm", "passes", "rows")))


def of_two_processes(folder: Path, say: Callable[[str], None]) -> dict[str, Trajectory]:
    """Every case in turn, by the two processes of which this is one."""
    with join(["cpu", "cpu"]) as world:
        return {case: trajectory(folder / case, case, world=world, tokens_per_pass=51) for case in CASES}
