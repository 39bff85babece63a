"""The optimizer step, and the run that is made of it.

A step's gradient is the sum over its supervised tokens divided by their number, which is known before the first pass:
how its rows are cut into passes does not matter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.batches import Order, total_steps
from luthier.data.pack import Pass, cut, pad, passes
from luthier.engine.loss import base_of, on_device, summed_loss
from luthier.errors import RecipeError, RunError
from luthier.folder import RunFolder, folder_atomic
from luthier.sections import TrainSection
from luthier.training import checkpoint
from luthier.training.checkpoint import TrainState
from luthier.training.guard import CHECKED, Movement, clear_when_full, not_finite, stoppable
from luthier.training.monitor import Facts, Monitor
from luthier.training.optim import lr_factor, make_optimizer, peak_lr, set_lr, warmup_steps

if TYPE_CHECKING:
    from luthier.data.examples import Examples
    from luthier.data.prepare import Data

TOKENS_PER_PASS = {"cuda": 16_384, "cpu": 4_096}
"""Places in a pass where the recipe says auto: enough to keep the device busy, few enough for small memory."""


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


def train(
    model: Any,
    data: Data,
    order: Order,
    section: TrainSection,
    kind: str,
    folder: RunFolder,
    *,
    pad_id: int,
    write: Callable[[Path], None],
    monitor: Monitor,
    say: Callable[[str], None],
    resume: Path | None = None,
) -> Outcome:
    """Train those parameters of `model` that require a gradient; leave the best, or last, in the run folder.

    `kind` is the method's; `write` puts the adapter or model into the folder that it is given; `resume` is a
    checkpoint. Errors: RecipeError where precision or rates cannot be; RunError where the run had to stop (guard.py).
    """
    training = Training(model, data, order, section, kind, folder, pad_id, write, monitor, say, resume)
    state, held_out = training.state, data.eval
    with monitor.told(), clear_when_full(folder.checkpoints, state.tokens_per_pass), stoppable() as stop:
        if held_out is not None and state.step == 0:
            monitor.record(None, training.evaluate(held_out))
        while state.step < training.steps and not training.had_enough() and stop.signal is None:
            facts = training.step()
            eval_loss = None
            if held_out is not None and training.due(section.eval_every):
                eval_loss = training.evaluate(held_out)
            monitor.record(facts, eval_loss)
            if training.due(section.save_every) or training.had_enough() or stop.signal is not None:
                training.save_checkpoint()
        return training.finish(stop.signal)


class Training:
    """A run in progress: everything that a step, an evaluation and a checkpoint share."""

    def __init__(
        self,
        model: Any,
        data: Data,
        order: Order,
        section: TrainSection,
        kind: str,
        folder: RunFolder,
        pad_id: int,
        write: Callable[[Path], None],
        monitor: Monitor,
        say: Callable[[str], None],
        resume: Path | None,
    ) -> None:
        self.model, self.data, self.order, self.section = model, data, order, section
        self.folder, self.pad_id, self.write, self.monitor, self.say = folder, pad_id, write, monitor, say
        self.best = folder.model if kind == "full" else folder.adapter
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.steps, self.peak = total_steps(section, order), peak_lr(section, kind)
        self.warmup = warmup_steps(section, self.steps)
        self.autocast = needs_autocast(model, section)
        self.optimizer = make_optimizer(self.parameters, section)
        torch.manual_seed(section.seed)
        self.state = TrainState(TOKENS_PER_PASS[self.device.type])
        if resume is not None:
            self.state = checkpoint.load(resume, self.parameters, self.optimizer, say)
        if section.tokens_per_pass != "auto":
            self.state.tokens_per_pass = section.tokens_per_pass
        self.movement = Movement(self.parameters, self.optimizer, self.state.step, self.warmup, say)
        if self.steps < CHECKED:
            say(f"not checked that every trainable tensor moves: that takes {CHECKED} steps")
        lines = monitor.begin(self.state.step, self.steps, order.steps_per_epoch)
        self.losses = [line["loss"] for line in lines if line["loss"] is not None]
        self.evals = [(line["step"], line["eval_loss"]) for line in lines if line["eval_loss"] is not None]
        self.began = time.monotonic() - self.state.seconds
        if section.activation_checkpointing:
            recompute_activations(model)
        model.train()

    def due(self, every: int | Literal["epoch"]) -> bool:
        """Is this the step for it? The last one always is."""
        period = self.order.steps_per_epoch if every == "epoch" else every
        return self.state.step % period == 0 or self.state.step == self.steps

    def had_enough(self) -> bool:
        return self.section.early_stop is not None and self.state.not_better >= self.section.early_stop

    def loss(self, pass_: Pass) -> Tensor:
        """Sum over the supervised tokens of a pass: a fp32 scalar."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return summed_loss(self.model, on_device(pass_, self.device))

    def step(self) -> Facts:
        """One optimizer step: all of its rows and no other."""
        began, state, section, examples = time.monotonic(), self.state, self.section, self.data.train
        rows = self.order.rows(state.step)
        supervised, tokens = int(examples.supervised[rows].sum()), int(examples.lengths[rows].sum())
        parts = passes(examples, rows, state.tokens_per_pass, self.pad_id)
        mean = torch.zeros((), device=self.device)
        for part in parts:
            loss = self.loss(part) / supervised
            torch.autograd.backward(loss)
            mean += loss.detach()
            self.monitor.beat()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), section.clip or math.inf)
        value, size = torch.stack((mean, norm.float())).tolist()  # the step's only wait for the device
        if not (math.isfinite(value) and math.isfinite(size)):
            raise self.not_finite(f"step {state.step + 1}: loss {value:g}, gradient norm {size:g}", examples, rows)
        lr = self.peak * lr_factor(state.step, self.steps, self.warmup, section.schedule, section.min_lr / self.peak)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, time.monotonic() - self.began
        facts = Facts(value, lr, size, tokens, supervised, len(rows), len(parts), time.monotonic() - began)
        self.losses.append(value)
        self.monitor.show_step(state.step, facts)
        self.movement.check(state.step)
        return facts

    def evaluate(self, examples: Examples) -> float:
        """Mean loss over the supervised tokens of the eval rows; the best after step 0 so far is saved."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for rows in cut(examples.lengths, self.state.tokens_per_pass):
                total += self.loss(pad(examples, rows, self.pad_id))
                self.monitor.beat()
            loss = total.item() / int(examples.supervised.sum())
            if not math.isfinite(loss):
                where = f"evaluation at step {self.state.step}: loss {loss:g}"
                raise self.not_finite(where, examples, np.arange(len(examples)))
        self.model.train()
        self.evals.append((self.state.step, loss))
        self.monitor.show_eval(loss, self.compare(loss))
        return loss

    def compare(self, loss: float) -> str:
        """Save the best so far, count those that are not better; what to say about it."""
        state = self.state
        if state.step == 0:
            return "before training"
        if state.best_eval is not None and loss >= state.best_eval:
            state.not_better += 1
            return f"not below {state.best_eval:.4f} of step {state.best_step}"
        state.best_step, state.best_eval, state.not_better = state.step, loss, 0
        with folder_atomic(self.best) as target:
            self.write(target)
        return "best so far"

    def save_checkpoint(self) -> None:
        keep = self.section.keep
        checkpoint.save(self.folder.checkpoints, self.write, self.parameters, self.optimizer, self.state, keep)

    def finish(self, stopped: int | None) -> Outcome:
        """Save the last where there is no best, and say how it ended."""
        state = self.state
        self.model.eval()
        if self.had_enough():
            self.say(f"early stop: {state.not_better} evaluations in a row without a better loss")
        if state.best_eval is not None and self.evals[0][0] == 0 and state.best_eval >= self.evals[0][1]:
            self.say(f"the eval loss never fell below the {self.evals[0][1]:.4f} of step 0: the training did not help")
        saved = f"best of step {state.best_step} by eval loss"
        if state.step == 0:
            saved = "nothing: stopped before the first step"
        elif state.best_step is None:
            saved = "last"
            with folder_atomic(self.best) as target:
                self.write(target)
        self.monitor.end("done" if stopped is None else "stopped", saved)
        return Outcome(
            steps=state.step,
            losses=self.losses,
            eval_losses=self.evals,
            best_step=state.best_step,
            best_eval=state.best_eval,
            seconds=state.seconds,
            tokens=state.tokens,
            saved=saved,
            stopped=stopped,
        )

    def not_finite(self, where: str, examples: Examples, rows: np.ndarray) -> RunError:
        def finite_alone(row: int) -> bool:
            self.optimizer.zero_grad()
            loss = self.loss(pad(examples, np.array([row]), self.pad_id))
            if loss.requires_grad:
                torch.autograd.backward(loss)
            values = [loss, *(value.grad for value in self.parameters.values() if value.grad is not None)]
            return all(bool(value.isfinite().all()) for value in values)

        return not_finite(where, rows.tolist(), finite_alone, examples.origin, self.folder.checkpoints)


def needs_autocast(model: Any, section: TrainSection) -> bool:
    """bf16 arithmetic over fp32 weights; else the arithmetic follows the weights. Errors: RecipeError."""
    held: torch.dtype = base_of(model).dtype
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(section.precision, held)
    if wanted != held and (wanted, held) != (torch.bfloat16, torch.float32):
        name = str(held).removeprefix("torch.")
        raise RecipeError(
            f"train.precision: {section.precision}, but the weights are held in {name}; change model.dtype"
        )
    return wanted != held


def recompute_activations(model: Any) -> None:
    """Activation checkpointing, non-reentrant; inputs of frozen layers require a gradient, or nothing below trains."""
    base = base_of(model)
    if hasattr(base, "activation_checkpointing_enable"):  # transformers of 2026; it sees to the inputs itself
        base.activation_checkpointing_enable({"use_reentrant": False})
    else:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
