"""The gradient of a step's rows, however they are cut into passes and dealt to processes; and the mean loss of rows.

It is the sum over the step's supervised tokens divided by their number, which is known before the first pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from luthier.data.deal import deal
from luthier.data.pack import Pass, pack, pad, padded_passes, passes
from luthier.engine.forward import Route, SummedLoss, on_device, rotary_border
from luthier.training.distributed import World

if TYPE_CHECKING:
    from luthier.data.examples import Examples


class Gradient(NamedTuple):
    """What a step's passes came to. loss: mean over its supervised tokens, fp32, of this process's rows only."""

    loss: Tensor
    supervised: int
    passes: int
    stop: int | None
    """The signal that some process was asked to stop by."""


class Gradients:
    """Computes losses and gradients of one model; which of its parameters train is settled.

    seed: of the dropout, None where there is none. autocast: the format of the
    arithmetic where it is not the weights' own.
    """

    def __init__(
        self,
        model: Any,
        route: Route,
        world: World,
        seed: int | None,
        *,
        pad_id: int,
        autocast: torch.dtype | None,
        beat: Callable[[], None],
    ) -> None:
        self.route, self.world, self.seed, self.pad_id, self.autocast, self.beat = (
            route,
            world,
            seed,
            pad_id,
            autocast,
            beat,
        )
        self.border = rotary_border(model)
        self.alone = SummedLoss(model, route)  # for what one process computes by itself
        self.shared = world.wrap(self.alone)

    def of_step(
        self,
        examples: Examples,
        rows: np.ndarray,
        step: int,
        tokens_per_pass: int,
        stop: int | None,
        scale: float = 1.0,
    ) -> Gradient:
        """Put the gradient of these rows, times `scale`, into the parameters; `step` counts from 0.

        Errors: torch's own (memory.is_full) where memory runs out, with part of the gradient in the parameters.
        """
        mine = rows[deal(examples.lengths[rows], self.world.size)[self.world.rank]]
        parts = self.cut(examples, mine, tokens_per_pass)
        supervised, most, stopped = self.world.agree(int(examples.supervised[mine].sum()), len(parts), stop)
        mean = torch.zeros((), device=self.world.device)
        for number in range(most):
            # Every process runs as many passes, or the others would wait for it: one too many weighs nothing.
            part = parts[number] if number < len(parts) else self.smallest(examples, rows)
            with self.world.not_yet(self.shared, number < most - 1):
                loss = self.loss(part, step, self.shared) / supervised * (number < len(parts))
                torch.autograd.backward(loss * (scale * self.world.size))  # the processes' gradients are averaged
            mean += loss.detach()
            self.beat()
        return Gradient(mean, supervised, most, stopped)

    def mean_loss(self, examples: Examples, tokens_per_pass: int) -> float:
        """Mean loss over the supervised tokens of all these rows, without a gradient: the same in every process."""
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with torch.no_grad():
            for part in self.cut(examples, np.arange(len(examples)), tokens_per_pass)[
                self.world.rank :: self.world.size
            ]:
                total += self.loss(part)
                self.beat()
        return self.world.total([total.item()])[0] / int(examples.supervised.sum())

    def loss(self, part: Pass, step: int = 0, module: Any = None) -> Tensor:
        """Sum over the supervised tokens of a pass: a fp32 scalar."""
        with torch.autocast(self.world.device.type, self.autocast, enabled=self.autocast is not None):
            loss: Tensor = (module or self.alone)(on_device(part, self.world.device, self.seed, step))
        return loss

    def cut(self, examples: Examples, rows: np.ndarray, tokens_per_pass: int) -> list[Pass]:
        """These rows as passes: packed, or padded where the route is the plain one."""
        if self.route == "plain":
            return padded_passes(examples, rows, tokens_per_pass, self.pad_id, self.border)
        return passes(examples, rows, tokens_per_pass, self.border)

    def one(self, examples: Examples, row: int) -> Pass:
        """A pass of one row."""
        return pad(examples, [row], self.pad_id) if self.route == "plain" else pack(examples, [row])

    def smallest(self, examples: Examples, rows: np.ndarray) -> Pass:
        """The shortest of these rows by itself."""
        return self.one(examples, int(rows[examples.lengths[rows].argmin()]))


def smaller(lengths: np.ndarray, tokens_per_pass: int) -> int | None:
    """Tokens for smaller passes of rows that did not fit: half; None where each was alone already."""
    longest = int(lengths.max())
    largest = min(int(lengths.sum()), tokens_per_pass)
    return max(longest, largest // 2) if largest > longest else None
