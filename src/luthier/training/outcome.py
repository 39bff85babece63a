"""What a run came to. It knows no torch: a launcher gets it back from its workers without loading that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a run came to, resumed parts included."""

    steps: int
    losses: list[float]
    """One a step, from step 1: mean over its supervised tokens."""
    eval_losses: list[tuple[int, float]]
    """(step, mean loss over the supervised tokens of the eval rows), step 0 first."""
    best_step: int | None
    """Step of the lowest eval loss after step 0."""
    best_eval: float | None
    seconds: float
    tokens: int
    """Trained on, without padding."""
    saved: str
    """What the adapter's (or model's) folder now holds."""
    stopped: int | None
    """The signal that stopped the run."""
