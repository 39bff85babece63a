"""The engine against the reference on a run's own rows: one loss, and the gradient of every tensor that trains.

The reference is what a user would write: the rows padded into one batch, through transformers and PEFT, with
transformers' own loss. Dropout is on in both: its masks do not depend on how rows are cut.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from luthier.data.pack import NO_TARGET, pack, pad, passes
from luthier.engine import dropout
from luthier.engine.attention import CannotPackError
from luthier.engine.forward import (
    DevicePass,
    Route,
    SummedLoss,
    adopt,
    base_of,
    inputs,
    on_device,
    rotary_border,
)
from luthier.engine.memory import free_memory, is_full
from luthier.errors import LuthierError, ModelError

if TYPE_CHECKING:
    from luthier.data.examples import Examples

TOLERANCE = {
    torch.float32: ("fp32", 1e-4, 1e-4),
    torch.bfloat16: ("bf16", 2e-3, 1e-1),
    torch.float16: ("fp16", 2e-3, 1e-1),
}
"""Largest relative differences of a loss and of a gradient that rounding explains. Measured on up to 64 layers: fp32
4e-6; bf16 2e-4 and 6e-2, which is why a leak from row to row is looked for by itself: that is exact in any format."""
LEAK = 1e-4
"""Of the hidden states' spread: what a row's may move when the ids of its neighbours change. It is 0 but for kernels
that do not repeat themselves; a recurrent state or convolution that crosses rows gives 5e-3 and more (measured)."""
REPEATED = 1e-6
"""Largest relative difference of a loss computed twice. More, where torch's random numbers moved on: something is drawn
(kernels that do not repeat themselves draw nothing, and a draw may decide nothing)."""
SMALL = 1e-3
"""Of the largest gradient's norm: what a smaller one is measured by. A gradient that is nothing by nature (that of a
key's bias, which softmax does not see) is rounding alone."""
ROWS, FEW = 4, 2
"""Rows compared; those of the first look, whose time foretells that of the whole."""
MINUTE = 60.0
BOTH_WAYS = 6
"""Forward passes that a comparison costs: a backward pass is two, and there are the reference and the engine."""
SHARE = 0.5
"""Of the free memory: what the reference's logits may take. Beyond it a CPU's process is killed without an error."""
SAID = 120
"""Characters of another's error message that are repeated."""
STIRRED = 0.02
"""Standard deviation of what stands in for matrices of zeros (every B) meanwhile: else A would have no gradient."""

Way = Literal["reference", "engine", "own_logits"]


@dataclass(frozen=True)
class Proof:
    """The route that the run takes, the lines that say why, and what goes into proof.json."""

    route: Route
    lines: list[str]
    record: dict[str, Any]


def rows_to_prove(examples: Examples, drawn: np.ndarray, tokens: int) -> np.ndarray:
    """Four of the rows `drawn` first, of unlike lengths, shortest first; padded they have at most `tokens` places.

    Where four have more, it is the two shortest.
    """
    rows = np.unique(drawn)
    rows = rows[np.argsort(examples.lengths[rows], kind="stable")]
    last = int((ROWS * examples.lengths[rows].astype(np.int64) <= tokens).sum()) - 1
    if last < ROWS - 1:
        return np.asarray(rows[:FEW])
    return np.asarray(rows[np.linspace(0, last, ROWS).astype(np.int64)])


def prove(
    model: Any,
    examples: Examples,
    rows: np.ndarray,
    *,
    pad_id: int,
    device: torch.device,
    autocast: torch.dtype | None,
    seed: int | None,
    gradients: bool = True,
    scale: float = 1.0,
) -> Proof:
    """Choose the first route that equals the reference, and leave the model's attention ready for it.

    The loss of two rows is compared always; loss and gradients of `rows` unless `gradients` is false or it would take
    more than a minute. `scale`: of the loss, for fp16. `seed`: of the dropout, None for none. Weights and gradients are
    left as they were.
    """
    began = time.monotonic()
    bench = _Bench(model, examples, pad_id, device, autocast, seed, scale)
    name, of_loss, of_gradient = _tolerance(base_of(model), autocast)
    with _stirred(bench.parameters):
        first, drawn = bench.first(rows[:FEW])  # warms caches and kernels up, and would tell a time far too long
        looked = time.monotonic()
        few = bench.value("reference", rows[:FEW])
        a_place = (time.monotonic() - looked) / bench.places(rows[:FEW])
        rows = rows if BOTH_WAYS * a_place * bench.places(rows) <= MINUTE else rows[:FEW]
        foretold = BOTH_WAYS * a_place * bench.places(rows)
        whole, why = None, "as asked"
        if gradients and foretold > MINUTE:
            why = f"it would take {foretold:,.0f} s"
        elif gradients and bench.logits_bytes(rows) > SHARE * free_memory(device):
            why = "the logits of the padded reference do not fit into memory"
        elif gradients:
            whole, why = bench.gradients_if_room("reference", rows), "the padded reference does not fit into memory"
        route: Route = "plain"
        differs = _relative(first, few)
        if drawn and differs > REPEATED:
            tried = {"reference": {"difference": differs, "of": "a loss computed twice"}}
        else:
            route, tried = _first_that_fits(bench, rows, few, whole, of_loss, of_gradient)
    compared = rows if whole else rows[:FEW]
    record = {
        "path": route,
        "tried": tried,
        "rows": [examples.origin(int(row)) for row in compared],
        "gradients": len(whole[1]) if whole else 0,
        "without_gradient": [name for name, value in whole[1].items() if not value.any()] if whole else [],
        "tolerance": {"loss": of_loss, "gradients": of_gradient},
        "format": name,
        "dropout": seed is not None,
        "seconds": round(time.monotonic() - began, 3),
    }
    said = _lines(route, tried, f"{_rows(rows)}, loss and {len(bench.parameters)} gradients; {name}", name)
    if whole is None and route != "plain":
        said = [f"engine not proven, {why}; the loss of {_rows(compared)} is the reference's"]
    return Proof(route, said, record)


def _tolerance(base: Any, autocast: torch.dtype | None) -> tuple[str, float, float]:
    """That of the coarsest format that takes part: quantised layers may compute in one of their own."""
    formats = {autocast or base.dtype, getattr(base, "luthier_arithmetic", None) or base.dtype}
    return max((TOLERANCE[dtype] for dtype in formats), key=lambda tolerance: tolerance[1])


@dataclass(frozen=True)
class _Bench:
    """Computes the same rows either way."""

    model: Any
    examples: Examples
    pad_id: int
    device: torch.device
    autocast: torch.dtype | None
    seed: int | None
    scale: float

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def places(self, rows: np.ndarray) -> int:
        """Of these rows padded."""
        return len(rows) * int(self.examples.lengths[rows].max())

    def first(self, rows: np.ndarray) -> tuple[float, bool]:
        """The reference for the first time, and whether torch's random numbers moved on by it.

        Errors: ModelError where the model does not take what it is given.
        """
        before = _random_states(self.device)
        try:
            loss = self.value("reference", rows)
        except TypeError as error:
            name = type(base_of(self.model)).__name__
            raise ModelError(f"{name} does not take what a transformers model is given in training: {error}") from error
        after = _random_states(self.device)
        return loss, any(not torch.equal(*pair) for pair in zip(before, after, strict=True))

    def logits_bytes(self, rows: np.ndarray) -> int:
        """Of the reference: the logits, their copy in fp32, its softmax and the gradient are three fp32 in all."""
        return self.places(rows) * int(base_of(self.model).config.get_text_config().vocab_size) * 12

    def leak(self, rows: np.ndarray) -> float:
        """How far the hidden states of a row move, by their spread, when the ids of its neighbours in the pass do."""
        part = pack(self.examples, [int(rows[0]), int(rows[-1]), int(rows[0])])
        start, stop = part.segments[1]
        places = np.arange(part.ids.size)
        others = np.where((places < start) | (places >= stop), part.ids.max() - part.ids, part.ids)
        states = []
        for each in (part, replace(part, ids=others)):
            pass_ = on_device(each, self.device, self.seed)
            dropout.set_keys(self.model, pass_.layout.keys)
            with torch.no_grad(), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                hidden = base_of(self.model).get_decoder()(**inputs(pass_)).last_hidden_state
            states.append(hidden[0, start:stop].float())
        moved: Tensor = (states[0] - states[1]).abs().max() / states[0].std()
        return moved.item()

    def loss(self, way: Way, rows: np.ndarray) -> Tensor:
        """Mean over the supervised tokens of these rows."""
        packed = passes(self.examples, rows, int(self.examples.lengths[rows].sum()), rotary_border(self.model))
        total = torch.zeros((), device=self.device)
        for part in packed:
            given = part if way != "reference" else pad(self.examples, part.rows, self.pad_id)
            on = on_device(given, self.device, self.seed)
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                total = total + (
                    reference_loss(self.model, on) if way == "reference" else SummedLoss(self.model, way)(on)
                )
        return total / int(self.examples.supervised[rows].sum())

    def value(self, way: Way, rows: np.ndarray) -> float:
        with torch.no_grad():
            return self.loss(way, rows).item()

    def gradients(self, way: Way, rows: np.ndarray) -> tuple[float, dict[str, Tensor]]:
        """The loss, and every gradient on the CPU, so that the device holds one set at a time.

        Where fp16 overflows at the loss scale, without one: nothing is trained here.
        """
        loss, found = self._gradients(way, rows, self.scale)
        if self.scale > 1 and not all(bool(value.isfinite().all()) for value in found.values()):
            return self._gradients(way, rows, 1.0)
        return loss, found

    def _gradients(self, way: Way, rows: np.ndarray, scale: float) -> tuple[float, dict[str, Tensor]]:
        loss = self.loss(way, rows)
        torch.autograd.backward(loss * scale)
        found = {}
        for name, parameter in self.parameters.items():
            value = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[name] = value.cpu() / scale
            parameter.grad = None
        return loss.item(), found

    def gradients_if_room(self, way: Way, rows: np.ndarray) -> tuple[float, dict[str, Tensor]] | None:
        try:
            return self.gradients(way, rows)
        except RuntimeError as error:
            if not is_full(error):
                raise
            self.model.zero_grad()
            return None


def reference_loss(model: Any, pass_: DevicePass) -> Tensor:
    """Summed loss of a padded pass by transformers itself (through PEFT where there is an adapter): a scalar."""
    dropout.set_keys(model, pass_.layout.keys)
    labels = torch.full_like(pass_.ids, NO_TARGET).flatten()
    labels[pass_.supervised + 1] = pass_.targets  # labels name the token itself, targets the next one
    loss: Tensor = model(**inputs(pass_), labels=labels.view_as(pass_.ids)).loss
    return loss * len(pass_.targets)


def _first_that_fits(
    bench: _Bench,
    rows: np.ndarray,
    few: float,
    whole: tuple[float, dict[str, Tensor]] | None,
    of_loss: float,
    of_gradient: float,
) -> tuple[Route, dict[str, Any]]:
    """The route, and what was found about each that was tried: a difference and where it was, or a reason."""
    tried: dict[str, Any] = {}
    way: Literal["engine", "own_logits"] = "engine"
    base = base_of(bench.model)
    before = base.config._attn_implementation
    try:
        adopt(bench.model)
        if not bench.leak(rows[:FEW]) <= LEAK:
            raise CannotPackError(f"in {type(base).__name__} a row would depend on the rows beside it")
        for way in ("engine", "own_logits"):
            loss = _relative(bench.value(way, rows[:FEW]), few)
            tried[way] = {"loss": loss, "difference": loss, "of": f"the loss of {_rows(rows[:FEW])}"}
            if loss > of_loss:
                continue
            found = bench.gradients_if_room(way, rows) if whole is not None else None
            if whole is None or found is None:
                return way, tried
            differences = _differences(found[1], whole[1])
            worst = max(differences, key=lambda name: differences[name])
            tried[way] = {"loss": _relative(found[0], whole[0]), "difference": differences[worst], "of": worst}
            if tried[way]["loss"] <= of_loss and differences[worst] <= of_gradient:
                return way, tried
    except CannotPackError as error:
        tried[way] = {"reason": str(error)}
    except LuthierError:
        raise
    except Exception as error:  # a model that takes no Layout breaks anywhere, and trains plainly all the same
        if is_full(error):
            raise
        tried[way] = {"reason": f"{type(base).__name__} takes no packed rows ({_short(error)})"}
    bench.model.zero_grad()
    base.set_attn_implementation(before)
    return "plain", tried


def _short(error: Exception) -> str:
    """What an error is and says, on one line of its own words at most."""
    said = str(error).strip().partition("\n")[0]
    said = said if len(said) <= SAID else f"{said[:SAID].rstrip()}…"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _rows(rows: np.ndarray) -> str:
    return f"{len(rows)} row{'s' if len(rows) > 1 else ''}"


def _random_states(device: torch.device) -> list[Tensor]:
    """Of torch's generators that a model on this device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _relative(value: float, reference: float) -> float:
    return _or_huge(abs(value - reference) / max(abs(reference), 1e-12))


def _or_huge(difference: float) -> float:
    """What is not a number is no small difference; 1e9 can be written as JSON."""
    return difference if math.isfinite(difference) else 1e9


def _differences(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference of each gradient by the norm of the reference's."""
    norms = {name: value.norm().item() for name, value in reference.items()}
    floor = max(SMALL * max(norms.values()), 1e-12)
    return {
        name: _or_huge((value - reference[name]).norm().item() / max(norms[name], floor))
        for name, value in gradients.items()
    }


def _lines(route: Route, tried: dict[str, Any], what: str, name: str) -> list[str]:
    said = []
    for way, found in tried.items():
        if way == route:
            by = "engine" if way == "engine" else "engine with transformers' own logits"
            said.append(f"{by} = reference, {found['difference']:.0e} ({what})")
        elif way == "reference":
            said.append(
                "exactness does not hold for this model: something in it draws random numbers (one loss computed twice "
                f"differs by {found['difference']:.0e}); the plain path is used: rows padded, which is slower"
            )
        elif "reason" in found:
            said.append(f"rows are padded, not packed, which is slower: {found['reason']}")
        else:
            said.append(f"{way.replace('_', ' ')} ≠ reference: {found['difference']:.0e} in {found['of']} ({name})")
    if route == "plain" and "reference" not in tried and not any("reason" in found for found in tried.values()):
        said.append("the plain path is used: rows padded, through transformers alone; it is slower")
    return said


@contextmanager
def _stirred(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Matrices that are nothing but zeros hold small random numbers inside the block."""
    generator = torch.Generator().manual_seed(0)
    zero = [value for value in parameters.values() if value.ndim > 1 and not value.any()]
    for value in zero:
        value.data.copy_(torch.randn(value.shape, generator=generator) * STIRRED)
    try:
        yield
    finally:
        for value in zero:
            value.data.zero_()
