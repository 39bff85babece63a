"""The gradient of a step's rows, however they are cut into passes and dealt to processes; and the mean loss of rows.

It is the sum over the step's supervised tokens divided by their number, which is known before the first pass.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from luthier.data.deal import deal
from luthier.data.pack import Pass, behind, pack, pad, padded_passes, passes
from luthier.engine.forward import DevicePass, Route, SummedLoss, on_device, rotary_border
from luthier.engine.soft import virtual_of
from luthier.sections import EngineSection
from luthier.training.distributed import World

if TYPE_CHECKING:
    from luthier.data.examples import Examples


class Gradient(NamedTuple):
    """What a step's passes came to. loss: mean over its supervised tokens, fp32, of this process's rows only.

    computed: tokens that went through the model, of all processes: fewer than the rows have where beginnings are
    shared, more where rows are padded.
    """

    loss: Tensor
    supervised: int
    passes: int
    computed: int
    stop: int | None
    """The signal that some process was asked to stop by."""


class Given(NamedTuple):
    """A process's part of a step, before it is computed. supervised: tokens of its rows."""

    parts: list[DevicePass]
    supervised: int


class Gradients:
    """Computes losses and gradients of one model; which of its parameters train is settled.

    seed: of the dropout, None where there is none. autocast: the format of the
    arithmetic where it is not the weights' own. engine: how a pass is cut and computed; what it says of the model's
    layers is done by rungs().
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
        engine: EngineSection = EngineSection(),  # noqa: B008 - it is frozen
    ) -> None:
        self.route, self.world, self.seed, self.pad_id = route, world, seed, pad_id
        self.autocast, self.beat, self.engine = autocast, beat, engine
        self.border, self.virtual = rotary_border(model), virtual_of(model)
        self.helper = ThreadPoolExecutor(1, "luthier-passes") if engine.prefetch else None
        self.ahead: tuple[Any, Future[Given]] | None = None
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
        then: np.ndarray | None = None,
    ) -> Gradient:
        """Put the gradient of these rows, times `scale`, into the parameters; `step` counts from 0.

        `then`: the rows of the next step, whose passes are made meanwhile.
        Errors: torch's own (memory.is_full) where memory runs out, with part of the gradient in the parameters.
        """
        given = self.given(examples, rows, step, tokens_per_pass)
        if then is not None:
            self.prepare(examples, then, step + 1, tokens_per_pass)
        computed = sum(part.ids.numel() for part in given.parts)
        known = (given.supervised, computed, len(given.parts), stop)
        supervised, computed, most, stopped = self.world.agree(*known)
        mean = torch.zeros((), device=self.world.device)
        for number in range(most):
            # Every process runs as many passes, or the others would wait for it: one too many weighs nothing.
            real = number < len(given.parts)
            part = given.parts[number] if real else self.on_device(self.smallest(examples, rows), step)
            with self.world.not_yet(self.shared, number < most - 1):
                loss = self.loss(part, step, self.shared) / supervised * real
                torch.autograd.backward(loss * (scale * self.world.size))  # the processes' gradients are averaged
            mean += loss.detach()
            self.beat()
        return Gradient(mean, supervised, most, computed, stopped)

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

    def given(self, examples: Examples, rows: np.ndarray, step: int, tokens_per_pass: int) -> Given:
        """This process's passes of a step, as `prepare` made them or made now."""
        key, ahead = (rows.tobytes(), step, tokens_per_pass), self.ahead
        self.ahead = None
        if ahead is not None and ahead[0] == key:
            return ahead[1].result()
        return self._made(examples, rows, step, tokens_per_pass)

    def prepare(self, examples: Examples, rows: np.ndarray, step: int, tokens_per_pass: int) -> None:
        """Begin with the passes of the next step, while this one computes. What comes out is the same."""
        if self.helper is not None:
            made = self.helper.submit(self._made, examples, rows, step, tokens_per_pass)
            self.ahead = (rows.tobytes(), step, tokens_per_pass), made

    def _made(self, examples: Examples, rows: np.ndarray, step: int, tokens_per_pass: int) -> Given:
        mine = rows[deal(examples.lengths[rows], self.world.size)[self.world.rank]]
        parts = [self.on_device(part, step) for part in self.cut(examples, mine, tokens_per_pass)]
        return Given(parts, int(examples.supervised[mine].sum()))

    def on_device(self, part: Pass, step: int = 0) -> DevicePass:
        """A pass where the model is, behind the method's virtual tokens, with the dropout of a step."""
        return on_device(behind(part, self.virtual), self.world.device, self.seed, step, self.engine.fast_attention)

    def loss(self, part: Pass | DevicePass, step: int = 0, module: Any = None) -> Tensor:
        """Sum over the supervised tokens of a pass: a fp32 scalar. `module`: shared with other processes, or alone."""
        given = self.on_device(part, step) if isinstance(part, Pass) else part
        with torch.autocast(self.world.device.type, self.autocast, enabled=self.autocast is not None):
            loss: Tensor = (module or self.alone)(given)
        return loss

    def cut(self, examples: Examples, rows: np.ndarray, tokens_per_pass: int) -> list[Pass]:
        """These rows as passes, without virtual tokens: packed, or padded where the route is the plain one."""
        further = self.virtual.tokens if self.virtual.columns else 0
        if self.route == "plain":
            return padded_passes(examples, rows, tokens_per_pass, self.pad_id, self.border, further)
        shared = self.engine.shared_prefixes and self.route == "engine"
        return passes(examples, rows, max(1, tokens_per_pass - further), self.border, shared)

    def saved(self, examples: Examples, rows: np.ndarray, tokens_per_pass: int) -> list[str]:
        """The line, if it is due, about what rows of a step have in common."""
        tokens = int(examples.lengths[rows].sum())
        saved = tokens - sum(part.ids.size for part in self.cut(examples, rows, tokens_per_pass))
        if saved <= 0:
            return []
        return [
            f"shared prefixes: of the first step's {tokens:,} tokens {tokens - saved:,} are computed, "
            f"{saved / tokens:.0%} saved".replace("%", " %")
        ]

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
