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

from luthier.data.pack import Pass, pack, pad
from luthier.engine.memory import free_memory, is_full
from luthier.errors import RunError
from luthier.training.gradients import Gradients, smaller
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
        self.forget()

    def passes(self, examples: Examples, batch: int, tokens_per_pass: int, reserved: int, say: Say) -> int:
        """Forward and backward of passes as large as any that a step of `batch` rows can come to.

        Beside them as many bytes are `reserved` as the optimizer will keep. Gives back tokens_per_pass, halved as often
        as memory asks for it, the same in every process. Errors: RunError where a row does not fit by itself.
        """
        while True:
            began, parts = time.monotonic(), self._largest(examples, batch, tokens_per_pass)
            if all(self.gradients.world.gather(all(self._fits(part, reserved) for part in parts))):
                tokens = max(part.ids.size for part in parts)
                self.found.append(f"{tokens:,} tokens forward and backward {_took(began)}")
                return tokens_per_pass
            half = smaller(np.sort(examples.lengths)[-batch:], tokens_per_pass)
            if half is None:
                raise self._too_long(examples, KNOBS)
            say(
                f"preflight: passes of {tokens_per_pass:,} tokens do not fit into memory; {half:,} at most instead: "
                "the result is the same"
            )
            tokens_per_pass = half

    def evaluation(self, model: nn.Module, examples: Examples, tokens_per_pass: int) -> None:
        """Passes as large as any of an evaluation. Errors: RunError where memory has no room for one."""
        began, parts = time.monotonic(), self._largest(examples, len(examples), tokens_per_pass)
        model.eval()
        try:
            with torch.no_grad():
                for part in parts:
                    self.gradients.loss(part).item()
        except RuntimeError as error:
            if not is_full(error):
                raise
            raise self._too_long(examples, "a smaller data.max_length or train.tokens_per_pass takes less") from error
        model.train()
        self.found.append(f"evaluation {_took(began)}")

    def checkpoint(self, folder: Path, save: Callable[[Path], Any]) -> None:
        """A whole checkpoint, written into `folder` and removed."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter.") as trial:
            save(Path(trial))
            self.found.append(f"checkpoint {_took(began)}")

    def answer(self, ask: Callable[[int], Any]) -> None:
        """Answers of two tokens to the recipe's prompts. Errors: RunError where memory has no room for them."""
        began = time.monotonic()
        try:
            ask(2)
        except RuntimeError as error:
            if not is_full(error):
                raise
            raise RunError(
                "preflight: the answers to generate.prompts do not fit into memory; give fewer or shorter prompts, or "
                "lower generate.max_new_tokens"
            ) from error
        self.found.append(f"answers {_took(began)}")

    def lines(self, disk: str) -> list[str]:
        """What was tried and what it took. `disk`: what of it the run will take at most."""
        memory = f"{size(free_memory(self.device))} of memory free"
        if self.device.type == "cuda":
            memory = f"{size(torch.cuda.max_memory_allocated(self.device))} of memory at most, {memory}"
        return [f"preflight: {', '.join(self.found)}", f"preflight: {memory}; {disk}"]

    def forget(self) -> None:
        """What the run will have taken at most is not what was tried."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _largest(self, examples: Examples, batch: int, tokens_per_pass: int) -> list[Pass]:
        """A pass as large as any that `batch` rows can make; and one with as many tokens taught, where each of these
        keeps its logits."""
        gradients, lengths = self.gradients, examples.lengths.astype(np.int64)
        budget, processes = tokens_per_pass, gradients.world.size
        if processes > 1:  # a process has about its share of a step's tokens
            budget = min(budget, int(np.sort(lengths)[-batch:].sum()) // processes + int(lengths.max()))
        if gradients.route == "plain":
            return [pad(examples, padded(lengths, batch, budget), gradients.pad_id)]
        taught = [examples.supervised.astype(np.int64)] if gradients.route == "own_logits" else []
        sides = apart(lengths, gradients.border)
        chosen = [side[packed(lengths[side], by[side], batch, budget)] for by in (lengths, *taught) for side in sides]
        return [pack(examples, rows) for rows in chosen]

    def _too_long(self, examples: Examples, knobs: str) -> RunError:
        longest, free = int(examples.lengths.argmax()), size(free_memory(self.device))
        return RunError(
            f"preflight: the longest row, {examples.origin(longest)} with {examples.lengths[longest]:,} tokens, "
            f"does not fit into memory, {free} of which are free; {knobs}"
        )

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


def apart(lengths: np.ndarray, border: int | None) -> list[np.ndarray]:
    """Row numbers on either side of the length that no pass may span; all of them where there is none."""
    if border is None:
        return [np.arange(len(lengths))]
    return [side for side in (np.flatnonzero(lengths > border), np.flatnonzero(lengths <= border)) if len(side)]


def packed(lengths: np.ndarray, by: np.ndarray, most: int, tokens: int) -> np.ndarray:
    """Row numbers, the greatest of `by` first, as far as they fit into so many tokens; one at least.

    What is then left of the tokens other rows may fill: the shortest comes on top.
    """
    order = np.argsort(-by, kind="stable")
    chosen, room, left = list[int](), tokens, list[int]()
    for row in order.tolist():
        if len(chosen) < most and (not chosen or lengths[row] <= room):
            chosen.append(row)
            room -= int(lengths[row])
        else:
            left.append(row)
    if left and room > 0 and len(chosen) < most:
        chosen.append(min(left, key=lambda row: int(lengths[row])))
    return np.array(chosen)


def padded(lengths: np.ndarray, most: int, tokens: int) -> list[int]:
    """The same where each row takes as many places as the longest: of such blocks the largest."""
    order = np.argsort(-lengths, kind="stable")
    falling = -lengths[order]
    best, places = order[:1], int(lengths.max())
    for count in range(2, min(most, tokens // int(lengths.min())) + 1):
        rows = order[np.searchsorted(falling, -(tokens // count)) :][:count]
        if len(rows) == count and count * lengths[rows[0]] > places:
            best, places = rows, int(count * lengths[rows[0]])
    return best.tolist()  # type: ignore[no-any-return]
