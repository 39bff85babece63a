"""Which of the engine's functions a run takes: what changes a model's layers, put in and taken out together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from luthier.engine.compiled import compiled
from luthier.engine.layers import fused_layers
from luthier.engine.lora import fused_lora
from luthier.engine.products import fp32_products
from luthier.sections import EngineSection

OF_LAYERS = ("fused_lora", "fused_layers", "fp32_products", "compile")
"""Those that put functions of ours in the place of a model's layers."""


@contextmanager
def rungs(model: Any, engine: EngineSection, say: Callable[[str], None] = lambda _: None) -> Iterator[list[str]]:
    """Inside, the model's layers are those that `engine` asks for. Yields lines about it; `say` gets what is known
    later, how long torch.compile took. Norms and feed-forwards are fused by torch.compile itself, where it is on."""
    with ExitStack() as held:
        wide = held.enter_context(fp32_products(model)) if engine.fp32_products and not engine.compile else False
        layers = held.enter_context(fused_layers(model)) if engine.fused_layers and not engine.compile else {}
        lora = held.enter_context(fused_lora(model)) if engine.fused_lora else []
        if engine.compile:
            held.enter_context(compiled(model, say))
        parts = [*(f"{count} {name} fused" for name, count in layers.items()), *lora[:1]]
        parts += ["16-bit layers multiplied in fp32, which is faster on this processor"] if wide else []
        yield [*([f"engine: {', '.join(parts)}"] if parts else []), *lora[1:]]


def has_layers(engine: EngineSection) -> bool:
    """Does it ask for other layers than the model's own?"""
    return any(getattr(engine, name) for name in OF_LAYERS)


def without_layers(engine: EngineSection) -> EngineSection:
    """The same with the model's own layers."""
    return engine.model_copy(update=dict.fromkeys(OF_LAYERS, False))
