"""The optimizer step, and the run that is made of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from luthier.data.batches import Order, total_steps
from luthier.engine import dropout
from luthier.engine.memory import is_full
from luthier.engine.rungs import rungs, without_layers
from luthier.errors import RunError
from luthier.folder import RunFolder, folder_atomic
from luthier.methods import whole
from luthier.sections import EngineSection, TrainSection
from luthier.training import checkpoint, start
from luthier.training.budget import decide
from luthier.training.checkpoint import TrainState
from luthier.training.distributed import World, lost
from luthier.training.gradients import Gradient, Gradients, smaller
from luthier.training.guard import CHECKED, Movement, clear_when_full, not_finite, stoppable
from luthier.training.monitor import Facts, Monitor
from luthier.training.optim import lr_factor, make_optimizer, peak_lr, set_lr, warmup_steps
from luthier.training.outcome import Outcome
from luthier.training.preflight import Preflight
from luthier.training.room import check_room, moments
from luthier.training.scale import doubled, halved, unscale
from luthier.training.scale import first as first_scale
from luthier.words import duration

if TYPE_CHECKING:
    from luthier.data.examples import Examples
    from luthier.data.prepare import Data

SLOW = 20.0
"""Seconds from which on it is said what the samples take."""
Ask = Callable[[int | None], list[dict[str, Any]]]
"""The model's replies to the recipe's prompts, of so many tokens at most (None: of the recipe's own number)."""


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
    world: World,
    resume: Path | None = None,
    proof: bool = True,
    ask: Ask | None = None,
    engine: EngineSection = EngineSection(),  # noqa: B008 - it is frozen
) -> Outcome:
    """Train those parameters of `model` that require a gradient; leave the best, or last, in the run folder.

    `kind` is the method's; `write` puts the adapter or model into the folder that it is given; `world` is the
    processes that train together, of which the first writes; `resume` is a checkpoint; without `proof` only the loss
    of two rows is compared before step 1; `ask` gives the model's replies to the recipe's prompts, as samples.jsonl
    has them, of so many tokens at most (None: of the recipe's); `engine` is how a step is computed.
    Errors: RecipeError where precision or rates cannot be; RunError where the run had to stop (guard.py).
    """
    with (
        start.base_dropout(model, section, write, say) as write,
        monitor.told(),
        lost(),
        clear_when_full(folder.checkpoints),
        stoppable() as stop,
        dropout.keyed(model, section.seed) as dropping,
        ExitStack() as held,
    ):
        monitor.pulse.stop = lambda: stop.signal
        training = Training(
            model, data, order, section, engine, kind, folder, pad_id, write, monitor, say, world, resume, ask
        )
        training.settle(resume is None, dropping, proof, held)
        state, held_out = training.state, data.eval
        stopped = stop.signal if world.size == 1 else None
        if state.step == 0 and stopped is None:
            if held_out is not None:
                monitor.record(None, training.evaluate(held_out))
            training.sample()
        monitor.enter("training")
        while state.step < training.steps and not training.had_enough() and stopped is None:
            facts, stopped = training.step(stop.signal)
            if world.size == 1:  # several have agreed on it before the step
                stopped = stop.signal
            looks, eval_loss = training.due(section.eval_every), None
            if held_out is not None and looks:
                eval_loss = training.evaluate(held_out)
            monitor.record(facts, eval_loss)
            if looks:
                training.sample()
            if training.due(section.save_every) or training.had_enough() or stopped is not None:
                training.save_checkpoint()
            monitor.enter("training")
        return training.finish(stopped)


class Training:
    """A run in progress: everything that a step, an evaluation and a checkpoint share."""

    gradients: Gradients

    def __init__(
        self,
        model: Any,
        data: Data,
        order: Order,
        section: TrainSection,
        engine: EngineSection,
        kind: str,
        folder: RunFolder,
        pad_id: int,
        write: Callable[[Path], None],
        monitor: Monitor,
        say: Callable[[str], None],
        world: World,
        resume: Path | None,
        ask: Ask | None,
    ) -> None:
        self.model, self.data, self.order, self.section, self.world = model, data, order, section, world
        self.folder, self.pad_id, self.write, self.monitor, self.say = folder, pad_id, write, monitor, say
        self.ask, self.kind, self.engine, self.best = (
            ask,
            kind,
            engine,
            folder.model if whole(kind) else folder.adapter,
        )
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.steps, self.peak = total_steps(section, order), peak_lr(section, kind, model)
        self.warmup = warmup_steps(section, self.steps)
        self.optimizer = make_optimizer(self.parameters, section, say)
        torch.manual_seed(section.seed)
        self.state = TrainState(0)
        if resume is not None:
            exact = not section.base_dropout
            self.state = checkpoint.load(resume, self.parameters, self.optimizer, say, world.rank, world.size, exact)
        self.movement = Movement(self.parameters, self.optimizer, self.state.step, self.warmup, say)
        if self.steps < CHECKED:
            say(f"not checked that every trainable tensor moves: that takes {CHECKED} steps")
        lines = monitor.begin(self.state.step, self.steps, order.steps_per_epoch, self.state.seconds)
        self.losses = [line["loss"] for line in lines if line["loss"] is not None]
        self.evals = [(line["step"], line["eval_loss"]) for line in lines if line["eval_loss"] is not None]
        self.began = time.monotonic() - self.state.seconds
        if section.activation_checkpointing:
            start.recompute_activations(model)
        model.train()

    def settle(self, first: bool, dropping: bool, proof: bool, held: ExitStack) -> None:
        """Decide on what is decided once: the path through the engine, and how much goes through it at once.

        What it does to the model's layers is undone with `held`.
        """
        state, section, examples = self.state, self.section, self.data.train
        autocast = start.autocast_dtype(self.model, section)
        fp16 = start.computes_in_fp16(self.model, autocast)
        if first or fp16 != state.fp16:  # a run may go on on another device
            state.fp16, state.scale, state.steady = fp16, first_scale(fp16), 0
        asked = self.engine.model_dump()
        if state.engine != asked:
            if not first:
                self.say("resume: engine is not what it was: proven anew, and numbers will be equal only to rounding")
            state.engine = asked
            state.route, state.own_layers = start.choose_route(
                self.model,
                examples,
                self.order,
                section,
                self.folder,
                self.world,
                pad_id=self.pad_id,
                autocast=autocast,
                dropping=dropping,
                scale=state.scale,
                proof=proof,
                engine=self.engine,
                say=self.say,
            )
        elif state.route != "plain":
            start.adopt_again(self.model)
        engine = without_layers(self.engine) if state.own_layers else self.engine
        for line in held.enter_context(rungs(self.model, engine, self.say)):
            self.say(line)
        settings: dict[str, Any] = {"pad_id": self.pad_id, "autocast": autocast, "beat": self.monitor.beat}
        seed = section.seed if dropping else None
        self.gradients = Gradients(self.model, state.route, self.world, seed, **settings, engine=engine)
        decide(state, section, self.gradients, examples, first, self.say)
        if state.step < self.steps:
            self.preflight()
            for line in self.gradients.saved(examples, self.order.rows(state.step), state.tokens_per_pass):
                self.say(line)

    def preflight(self) -> None:
        """Is there room, in memory and on the disk, for all that comes?"""
        state, section, leads = self.state, self.section, self.world.leads
        self.monitor.enter("preflight")
        disk = ""
        if leads:
            course = (self.kind, self.steps, self.order.steps_per_epoch)
            disk = check_room(self.folder, self.model, self.parameters, self.write, section, *course)
        tried = Preflight(self.gradients)
        paged = section.optimizer.startswith("paged")  # what has no room on the GPU goes to the CPU's memory
        reserved = 0 if paged or self.optimizer.state else moments(self.parameters, section.optimizer)
        state.tokens_per_pass = tried.passes(self.data.train, section.batch, state.tokens_per_pass, reserved, self.say)
        if self.data.eval is not None:
            tried.evaluation(self.model, self.data.eval, state.tokens_per_pass)
        generators = self.world.gather(checkpoint.generators(self.world.device))
        if leads:
            tried.checkpoint(self.folder.path, lambda folder: self.save(folder, generators))
            if self.ask is not None:
                tried.answer(self.ask)
            for line in tried.lines(disk):
                self.say(line)
        tried.forget()

    def due(self, every: int | Literal["epoch"]) -> bool:
        """Is this the step for it? The last one always is."""
        period = self.order.steps_per_epoch if every == "epoch" else every
        return self.state.step % period == 0 or self.state.step == self.steps

    def had_enough(self) -> bool:
        return self.section.early_stop is not None and self.state.not_better >= self.section.early_stop

    def step(self, stop: int | None) -> tuple[Facts, int | None]:
        """One optimizer step: all of its rows and no other. `stop`: the signal that this process was asked to stop by;
        gives back that of any process."""
        began, state, section, examples = time.monotonic(), self.state, self.section, self.data.train
        rows = self.order.rows(state.step)
        found, value, size = self.finite_gradient(rows, stop)
        lr = self.peak * lr_factor(state.step, self.steps, self.warmup, section.schedule, section.min_lr / self.peak)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = int(examples.lengths[rows].sum())
        state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, time.monotonic() - self.began
        seconds = time.monotonic() - began
        facts = Facts(value, lr, size, tokens, found.computed, found.supervised, len(rows), found.passes, seconds)
        self.losses.append(value)
        self.monitor.show_step(state.step, facts)
        self.movement.check(state.step)
        return facts, found.stop

    def finite_gradient(self, rows: np.ndarray, stop: int | None) -> tuple[Gradient, float, float]:
        """The step's gradient, clipped, with its loss and norm. In fp16 an overflow is met by a smaller loss scale."""
        state = self.state
        while True:
            found = self.gradient(rows, stop)
            unscale(self.parameters.values(), state.scale)
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.section.clip or math.inf)
            mean, size = torch.stack((found.loss, norm.float())).tolist()  # the step's only wait for the device
            (value,) = self.world.total([mean])
            if math.isfinite(value) and math.isfinite(size):
                state.steady += 1
                state.scale = doubled(state.scale, state.steady, state.fp16)
                return found, value, size
            half = halved(state.scale, value, size)
            if half is None:
                where = f"step {state.step + 1}: loss {value:g}, gradient norm {size:g}"
                raise self.not_finite(where, self.data.train, rows)
            self.say(f"step {state.step + 1}: fp16 overflowed; computed again at a loss scale of {half:g}")
            self.optimizer.zero_grad()
            state.scale, state.steady = half, 0

    def gradient(self, rows: np.ndarray, stop: int | None) -> Gradient:
        """The step's gradient. Where memory has no room for its passes, the same in smaller ones, for good."""
        state, examples = self.state, self.data.train
        then = self.order.rows(state.step + 1) if state.step + 1 < self.steps else None
        while True:
            try:
                course = (examples, rows, state.step, state.tokens_per_pass, stop, state.scale)
                return self.gradients.of_step(*course, then)
            except RuntimeError as error:
                half = smaller(examples.lengths[rows], state.tokens_per_pass)
                if not is_full(error) or half is None or self.world.size > 1:
                    raise
            self.optimizer.zero_grad()
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
            self.say(
                f"out of memory in step {state.step + 1}: done again in passes of at most {half:,} tokens instead of "
                f"{state.tokens_per_pass:,}; the result is the same"
            )
            state.tokens_per_pass = half

    def evaluate(self, examples: Examples) -> float:
        """Mean loss over the supervised tokens of the eval rows; the best after step 0 so far is saved."""
        self.monitor.enter("evaluating")
        self.model.eval()
        loss = self.gradients.mean_loss(examples, self.state.tokens_per_pass)
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
        self.write_best()
        return "best so far"

    def write_best(self) -> None:
        self.monitor.enter("saving")
        if self.world.leads:
            with folder_atomic(self.best) as target:
                self.write(target)

    def sample(self) -> None:
        """The recipe's prompts, asked the model as it stands, by the first process alone."""
        if self.ask is None or not self.world.leads:
            return
        self.monitor.enter("sampling")
        began, step = time.monotonic(), self.state.step
        try:
            replies = self.ask(None)
        except RuntimeError as error:
            if not is_full(error):
                raise
            self.say(f"out of memory in the samples of step {step}: left out; lower generate.max_new_tokens")
            return
        self.monitor.record_samples([{"step": step, **line} for line in replies])
        took = time.monotonic() - began
        if step == 0 and took > SLOW:
            self.say(f"samples took {duration(took)}, and come again at each evaluation (train.eval_every)")

    def save_checkpoint(self) -> None:
        self.monitor.enter("saving")
        generators = self.world.gather(checkpoint.generators(self.world.device))
        if self.world.leads:
            self.save(self.folder.checkpoints, generators)

    def save(self, checkpoints: Path, generators: list[checkpoint.Generators]) -> None:
        keep = self.section.keep
        checkpoint.save(checkpoints, self.write, self.parameters, self.optimizer, self.state, keep, generators)

    def finish(self, stopped: int | None) -> Outcome:
        """Save the last where there is no best, and say how it ended."""
        state = self.state
        self.model.eval()
        if self.world.leads:
            checkpoint.prune(self.folder.checkpoints, self.section.keep)  # a kill may have come before it
        if self.had_enough():
            self.say(f"early stop: {state.not_better} evaluations in a row without a better loss")
        before = next((loss for step, loss in self.evals if step == 0), math.inf)
        if state.best_eval is not None and state.best_eval >= before:
            self.say(f"the eval loss never fell below the {before:.4f} of step 0: the training did not help")
        saved = f"best of step {state.best_step} by eval loss"
        if state.step == 0:
            saved = "nothing: stopped before the first step"
        elif state.best_step is None:
            saved = "last"
            self.write_best()
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
            loss = self.gradients.loss(self.gradients.one(examples, row), self.state.step)
            loss = loss / max(1, int(examples.supervised[row]))  # a sum may overflow in fp16 where a mean does not
            if loss.requires_grad:
                torch.autograd.backward(loss)
            values = [loss, *(value.grad for value in self.parameters.values() if value.grad is not None)]
            return all(bool(value.isfinite().all()) for value in values)

        return not_finite(where, rows.tolist(), finite_alone, examples.origin, self.folder.checkpoints)
