"""What is settled before step 1, printed and kept: the path through the engine and its proof, the tokens of a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.data.batches import Order
from luthier.engine import dropout
from luthier.engine.attention import CannotPackError
from luthier.engine.forward import Route, adopt, base_of
from luthier.engine.proof import prove, rows_to_prove
from luthier.engine.rungs import has_layers
from luthier.errors import RecipeError, RunError
from luthier.folder import RunFolder, write_json
from luthier.models.weights import DTYPES, name_of
from luthier.sections import EngineSection, TrainSection
from luthier.training.distributed import World

if TYPE_CHECKING:
    from luthier.data.examples import Examples

Say = Callable[[str], None]
Write = Callable[[Path], None]

DRAWN = 16
"""Rows, at least, among which those of the proof are chosen."""
SHARE = 0.5
"""Of an average step's tokens: what the proof's rows have at most, so that it costs two or three steps."""


@contextmanager
def base_dropout(model: Any, section: TrainSection, write: Write, say: Say) -> Iterator[Write]:
    """Inside, the base model's own dropout is off, and said, unless the recipe wants it.

    Yields `write` for what is saved meanwhile: a config.json with the base's own values.
    """
    found = dropout.of_base(model)
    if not found.names:
        yield write
    elif section.base_dropout:
        say("train.base_dropout: drawn in sequence, so numbers depend on how rows are cut: exactness no longer holds")
        yield write
    else:
        verb, it = ("is", "it") if len(found.names) == 1 else ("are", "them")
        say(f"the base model's own {', '.join(found.names)} {verb} off (train.base_dropout: true gives {it} back)")

        def saved(target: Path) -> None:
            with found.on():
                write(target)

        with found.off():
            yield saved


def choose_route(
    model: Any,
    examples: Examples,
    order: Order,
    section: TrainSection,
    folder: RunFolder,
    world: World,
    *,
    pad_id: int,
    autocast: torch.dtype | None,
    dropping: bool,
    scale: float,
    proof: bool,
    engine: EngineSection,
    say: Say,
) -> tuple[Route, bool]:
    """The route of this run, proven on its own rows (by the first process for all) and written to proof.json; and
    whether its layers are the model's own, which they are where others differ."""
    route: Route = "plain"
    own_layers = not has_layers(engine)
    if world.leads:
        if engine.compile:
            say("engine.compile: the proof compiles the layers, which takes a minute or several")
        steps = range(min(order.steps_per_epoch, -(-DRAWN // order.batch)))
        drawn = np.concatenate([order.rows(step) for step in steps])
        tokens = int(SHARE * examples.lengths[drawn].sum() / len(steps))
        if section.base_dropout:
            model.eval()  # its draws differ between any two computations
        found = prove(
            model,
            examples,
            rows_to_prove(examples, drawn, tokens),
            pad_id=pad_id,
            device=world.device,
            autocast=autocast,
            seed=section.seed if dropping and not section.base_dropout else None,
            gradients=proof,
            scale=scale,
            engine=engine,
        )
        model.train()
        write_json(folder.proof, found.record)
        for line in found.lines:
            say(line)
        route, own_layers = found.route, not has_layers(found.engine)
        if world.size > 1 and (dead := found.record["without_gradient"]):
            raise RunError(f"no gradient reaches {dead[0]} ({len(dead)} tensors): are they used in the forward pass?")
    route, own_layers = world.share((route, own_layers))
    if route != "plain":
        adopt(model)
    return route, own_layers


def adopt_again(model: Any) -> None:
    """Let the model's attention take a Layout, as when the run began. Errors: RunError where it no longer can."""
    try:
        adopt(model)
    except CannotPackError as error:
        raise RunError(f"resume: {error}, which it had not when this run began; is it another version?") from None


def autocast_dtype(model: Any, section: TrainSection) -> torch.dtype | None:
    """The format of the arithmetic where it is not the weights' own. Errors: RecipeError where it cannot be.

    fp16 over bf16 weights is possible (the few unquantised layers of a model); more digits than they have is not.
    """
    held: torch.dtype = base_of(model).dtype
    wanted = DTYPES.get(section.precision, held)
    if wanted == held:
        return None
    if wanted == torch.float32 or (wanted, held) == (torch.bfloat16, torch.float16):
        raise RecipeError(
            f"train.precision: {section.precision}, but the weights are held in {name_of(held)}; change model.dtype"
        )
    return wanted


def computes_in_fp16(model: Any, autocast: torch.dtype | None) -> bool:
    """Is any part of it? The quantised layers have a format of their own."""
    base = base_of(model)
    return torch.float16 in {autocast or base.dtype, getattr(base, "luthier_arithmetic", None)}


def recompute_activations(model: Any) -> None:
    """Activation checkpointing, non-reentrant; inputs of frozen layers require a gradient, or nothing below trains."""
    base = base_of(model)
    if hasattr(base, "activation_checkpointing_enable"):  # transformers of 2026; it sees to the inputs itself
        base.activation_checkpointing_enable({"use_reentrant": False})
    else:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
