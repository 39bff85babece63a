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

from luthier.engine.attention import CannotPackError
from luthier.engine.forward import Route, adopt, base_of
from luthier.engine.memory import free_memory, is_full
from luthier.engine.reference import Bench
from luthier.engine.rungs import has_layers, rungs, without_layers
from luthier.errors import LuthierError
from luthier.sections import EngineSection

if TYPE_CHECKING:
    from luthier.data.examples import Examples

TOLERANCE = {
    torch.float32: ("fp32", 1e-4, 1e-4),
    torch.bfloat16: ("bf16", 2e-3, 1e-1),
    torch.float16: ("fp16", 2e-3, 1e-1),
}
"""Largest relative differences of a loss and of a gradient that rounding explains. Measured on up to 64 layers: fp32
4e-6; bf16 2e-4 and 6e-2, which is why a leak from row to row is looked for by itself: that is exact in any format."""
ALONE = {"fp32": 0.0, "bf16": 2e-2, "fp16": 2e-2}
"""The same of the loss of one token; of n tokens' mean it is a √n-th of it. (Two rows of 40 tokens in all differed by
2e-3, the four with 80 tokens by 1e-3: the embedded model, every weight trained in bf16.)"""
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
UNUSED: dict[Route, set[str]] = {
    "engine": set(),
    "own_logits": {"chunked_loss", "shared_prefixes"},
    "plain": set(EngineSection.model_fields) - {"prefetch"},
}
"""What of the recipe's engine a route does not take."""


@dataclass(frozen=True)
class Proof:
    """The route that the run takes and its layers' rungs, the lines that say why, and what goes into proof.json."""

    route: Route
    engine: EngineSection
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
    engine: EngineSection = EngineSection(),  # noqa: B008 - it is frozen
) -> Proof:
    """Choose the first route that equals the reference, and leave the model's attention ready for it.

    `engine`: what may be taken; the model's own layers are, where others differ.
    The loss of two rows is compared always; loss and gradients of `rows` unless `gradients` is false or it would take
    more than a minute. `scale`: of the loss, for fp16. `seed`: of the dropout, None for none. Weights and gradients are
    left as they were.
    """
    began = time.monotonic()
    bench = Bench(model, examples, pad_id, device, autocast, seed, scale, engine)
    name, of_loss, of_gradient = _tolerance(base_of(model), autocast)
    of_loss = max(of_loss, ALONE[name] / math.sqrt(max(1, int(examples.supervised[rows[:FEW]].sum()))))
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
        elif engine.packed:
            route, engine, tried = _first_that_fits(bench, rows, few, whole, of_loss, of_gradient)
        else:
            tried = {}
        if route == "plain":
            engine = without_layers(engine)
    compared = rows if whole else rows[:FEW]
    record = {
        "path": route,
        "rungs": [name for name, on in engine.model_dump().items() if on and name not in UNUSED[route]],
        "shares": bench.shares(compared),
        "tried": tried,
        "rows": [examples.origin(int(row)) for row in compared],
        "gradients": len(whole[1]) if whole else 0,
        "without_gradient": [name for name, value in whole[1].items() if not value.any()] if whole else [],
        "tolerance": {"loss": of_loss, "gradients": of_gradient},
        "format": name,
        "dropout": seed is not None,
        "seconds": round(time.monotonic() - began, 3),
    }
    said = _lines(route, tried, f"{_rows(rows)}, loss and {_gradients(bench)}; {name}", name)
    if whole is None and route != "plain":
        said = [f"engine not proven, {why}; the loss of {_rows(compared)} is the reference's"]
    return Proof(route, engine, said, record)


def _tolerance(base: Any, autocast: torch.dtype | None) -> tuple[str, float, float]:
    """That of the coarsest format that takes part: quantised layers may compute in one of their own."""
    formats = {autocast or base.dtype, getattr(base, "luthier_arithmetic", None) or base.dtype}
    return max((TOLERANCE[dtype] for dtype in formats), key=lambda tolerance: tolerance[1])


def _first_that_fits(
    bench: Bench,
    rows: np.ndarray,
    few: float,
    whole: tuple[float, dict[str, Tensor]] | None,
    of_loss: float,
    of_gradient: float,
) -> tuple[Route, EngineSection, dict[str, Any]]:
    """The route and its rungs, and what was found about each that was tried: a difference and where, or a reason."""
    tried: dict[str, Any] = {}
    base = base_of(bench.model)
    before = base.config._attn_implementation
    name: str = "engine"
    try:
        adopt(bench.model)
        if not bench.leak(rows[:FEW]) <= LEAK:
            raise CannotPackError(f"in {type(base).__name__} a row would depend on the rows beside it")
        for way, engine in _ways(bench.engine):
            trial = replace(bench, engine=engine)
            name = way if engine == bench.engine else f"{way}, plain layers"
            try:
                with rungs(bench.model, engine):
                    tried[name] = _compared(trial, way, rows, few, whole, of_loss, of_gradient)
            except RuntimeError as error:
                if is_full(error) or not has_layers(engine):
                    raise
                tried[name] = {"reason": _short(error)}
                bench.model.zero_grad()
            if tried[name].pop("fits", False):
                return way, engine, tried
    except CannotPackError as error:
        tried[name] = {"reason": str(error)}
    except LuthierError:
        raise
    except Exception as error:  # a model that takes no Layout breaks anywhere, and trains plainly all the same
        if is_full(error):
            raise
        tried[name] = {"reason": f"{type(base).__name__} takes no packed rows ({_short(error)})"}
    bench.model.zero_grad()
    base.set_attn_implementation(before)
    return "plain", bench.engine, tried


def _ways(engine: EngineSection) -> Iterator[tuple[Literal["engine", "own_logits"], EngineSection]]:
    """What to try, the fastest first: with the layers asked for, then with the model's own."""
    for each in dict.fromkeys((engine, without_layers(engine))):
        if engine.chunked_loss:
            yield "engine", each
        yield "own_logits", each


def _compared(
    bench: Bench,
    way: Literal["engine", "own_logits"],
    rows: np.ndarray,
    few: float,
    whole: tuple[float, dict[str, Tensor]] | None,
    of_loss: float,
    of_gradient: float,
) -> dict[str, Any]:
    """How far a way is from the reference, and whether that `fits`; the gradients only where the loss does."""
    loss = _relative(bench.value(way, rows[:FEW]), few)
    found: dict[str, Any] = {"loss": loss, "difference": loss, "of": f"the loss of {_rows(rows[:FEW])}"}
    if loss > of_loss:
        return found
    mine = bench.gradients_if_room(way, rows) if whole is not None else None
    if whole is None or mine is None:
        return {**found, "fits": True}
    differences = _differences(mine[1], whole[1])
    worst = max(differences, key=lambda name: differences[name])
    found = {"loss": _relative(mine[0], whole[0]), "difference": differences[worst], "of": worst}
    return {**found, "fits": found["loss"] <= of_loss and differences[worst] <= of_gradient}


def _short(error: Exception) -> str:
    """What an error is and says, on one line of its own words at most."""
    said = str(error).strip().partition("\n")[0]
    said = said if len(said) <= SAID else f"{said[:SAID].rstrip()}…"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _gradients(bench: Bench) -> str:
    count = len(bench.parameters)
    return "1 gradient" if count == 1 else f"{count} gradients"


def _rows(rows: np.ndarray) -> str:
    return f"{len(rows)} row{'s' if len(rows) > 1 else ''}"


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
        last = route != "plain" and way == list(tried)[-1]
        if last:
            by = "engine" if route == "engine" else "engine with transformers' own logits"
            layers = " and the model's own layers" if "plain layers" in way else ""
            said.append(f"{by}{layers} = reference, {found['difference']:.0e} ({what})")
        elif way == "reference":
            said.append(
                "exactness does not hold for this model: something in it draws random numbers (one loss computed twice "
                f"differs by {found['difference']:.0e}); the plain path is used: rows padded, which is slower"
            )
        elif "reason" in found and route != "plain":
            said.append(f"{way.replace('_', ' ')} does not run with this model: {found['reason']}")
        elif "reason" in found:
            said.append(f"rows are padded, not packed, which is slower: {found['reason']}")
        else:
            said.append(f"{way.replace('_', ' ')} ≠ reference: {found['difference']:.0e} in {found['of']} ({name})")
    if not tried:
        said.append("engine.packed: false: rows padded, through transformers alone")
    elif route == "plain" and "reference" not in tried and not any("reason" in found for found in tried.values()):
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
