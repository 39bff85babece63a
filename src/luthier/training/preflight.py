"""Before step 1, once, all that comes later: the longest pass, an evaluation, a checkpoint, an answer.

What would fail after a night fails in the first minute, and says which knob to turn.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from luthier.data.pack import Pass
from luthier.engine.memory import free_memory, is_full
from luthier.errors import RunError
from luthier.training.gradients import Gradients, smaller
from luthier.training.room import bytes_in
from luthier.words import duration, size

if TYPE_CHECKING:
    from luthier.data.examples import Examples

Say = Callable[[str], None]
KNOBS = "train.activation_checkpointing: true, a smaller data.max_length or model.quantize: nf4 take less"


class Preflight:
    """Tries out what a run will do and keeps what it took, for two lines. Nothing of it changes the run's numbers."""

    def __init__(self, gradients: Gradients) -> None:
        self.gradients, self.device = gradients, gradients.world.device
        self.found: list[str] = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def passes(self, examples: Examples, batch: int, tokens_per_pass: int, reserved: int, say: Say) -> int:
        """Forward and backward of the largest pass that a step of `batch` rows can come to.

        Beside it as many bytes are `reserved` as the optimizer will keep. Gives back tokens_per_pass, halved as often
        as memory asks for it, the same in every process. Errors: RunError where a row does not fit by itself.
        """
        rows = _longest(examples)[: -(-batch // self.gradients.world.size)]
        while True:
            began, part = time.monotonic(), self._largest(examples, rows, tokens_per_pass)
            if all(self.gradients.world.gather(self._fits(part, reserved))):
                self.found.append(f"{part.ids.size:,} tokens forward and backward {_took(began)}")
                return tokens_per_pass
            half = smaller(examples.lengths[rows], tokens_per_pass)
            if half is None:
                raise RunError(
                    f"preflight: the longest row, {examples.origin(int(rows[0]))} with {examples.lengths[rows[0]]:,} "
                    f"tokens, does not fit into memory, {size(free_memory(self.device))} of which are free; {KNOBS}"
                )
            say(
                f"preflight: passes of {tokens_per_pass:,} tokens do not fit into memory; {half:,} at most instead: "
                "the result is the same"
            )
            tokens_per_pass = half

    def evaluation(self, model: nn.Module, examples: Examples, tokens_per_pass: int) -> None:
        """The largest pass of an evaluation."""
        began, part = time.monotonic(), self._largest(examples, _longest(examples), tokens_per_pass)
        model.eval()
        with torch.no_grad():
            self.gradients.loss(part).item()
        model.train()
        self.found.append(f"evaluation {_took(began)}")

    def checkpoint(self, folder: Path, save: Callable[[Path], Any]) -> None:
        """A whole checkpoint, written into `folder` and removed."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter.") as trial:
            save(Path(trial))
            self.found.append(f"checkpoint {size(bytes_in(Path(trial)))} {_took(began)}")

    def answer(self, ask: Callable[[int], Any]) -> None:
        """An answer of two tokens."""
        began = time.monotonic()
        ask(2)
        self.found.append(f"answer {_took(began)}")

    def lines(self, disk: str) -> list[str]:
        """What was tried and what it took. `disk`: what of it the run will take at most."""
        memory = f"{size(free_memory(self.device))} of memory free"
        if self.device.type == "cuda":
            memory = f"{size(torch.cuda.max_memory_allocated(self.device))} of memory at most, {memory}"
        return [f"preflight: {', '.join(self.found)}", f"preflight: {memory}; {disk}"]

    def _largest(self, examples: Examples, rows: np.ndarray, tokens_per_pass: int) -> Pass:
        """Of some of these rows, which are the longest first: enough to fill a pass."""
        enough = 1 + int(np.searchsorted(examples.lengths[rows].cumsum(), tokens_per_pass))
        return max(self.gradients.cut(examples, rows[:enough], tokens_per_pass), key=lambda part: part.ids.size)

    def _fits(self, part: Pass, reserved: int) -> bool:
        """Is there memory for it? On a CPU the system tells too late: plan and train.tokens_per_pass: auto reckon."""
        try:
            on_gpu = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=on_gpu):  # a base model's own dropout draws
                ballast = torch.empty(reserved, dtype=torch.uint8, device=self.device)
                torch.autograd.backward(self.gradients.loss(part) * 0)
                del ballast
        except RuntimeError as error:
            if not is_full(error):
                raise
            return False
        finally:
            self.gradients.alone.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return True


def _took(began: float) -> str:
    seconds = time.monotonic() - began
    return duration(seconds) if seconds >= 10 else f"{seconds:.2f} s"


def _longest(examples: Examples) -> np.ndarray:
    """Row numbers, the longest row first."""
    return np.argsort(-examples.lengths.astype(np.int64), kind="stable")
