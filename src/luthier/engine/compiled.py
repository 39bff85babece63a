"""The decoder's layers by torch.compile, for as long as a context is open.

A layer's attention and what else has a function of its own here (keyed dropout, quantised and fused LoRA layers) stay
as they are, outside of what is compiled: they go by lists of segments and by objects, for which torch would compile
anew each step. So contexts that put functions on such modules are entered before this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.engine import attention
from luthier.engine.dropout import KeyedDropout

SHAPES = 64
"""Times that one function may be compiled before torch gives up and runs it as it is, without a word: a decoder's kinds
of layers, with a gradient and without, in training and not. torch's own bound is 8."""


class Held:
    """A call argument that is carried past what is compiled: torch looks into a Layout, but not into this."""

    def __init__(self, layout: attention.Layout) -> None:
        self.layout, self.keys = layout, layout.keys


@contextmanager
def compiled(model: nn.Module, say: Callable[[str], None]) -> Iterator[int]:
    """Inside, each decoder layer's forward is compiled, for any number of tokens. Yields how many layers there are.

    `say` gets one line when the first pass is through: "engine.compile: 24 layers compiled in 31 s", all that this
    process has spent on it: the proof before step 1 compiles them too.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    apart = [part for layer in layers for part in layer.modules() if part is not layer and _apart(part)]
    own = {module: vars(module).get("forward") for module in (*layers, *apart)}
    limits = torch._dynamo.config.patch(
        recompile_limit=SHAPES * max(1, len(layers)), accumulated_recompile_limit=1 << 20
    )
    clock = _Clock(len(layers), say)
    AttentionInterface.register(attention.NAME, _attend)
    try:
        with limits:
            for part in apart:
                part.forward = torch.compiler.disable(part.forward)  # type: ignore[no-untyped-call]
            for layer in layers:
                layer.forward = partial(_forward, layer, torch.compile(_inside(layer), dynamic=True), clock)
            yield len(layers)
    finally:
        attention.register()
        for module, forward in own.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _apart(part: nn.Module) -> bool:
    """Does it compute by functions of ours: keyed dropout, quantised or fused LoRA layers?"""
    return isinstance(part, KeyedDropout) or "forward" in vars(part)


class _Clock:
    """Says after the first pass, backward included, how long torch compiled."""

    def __init__(self, layers: int, say: Callable[[str], None]) -> None:
        self.layers, self.calls, self.say = layers, 0, say

    def tick(self) -> None:
        """A layer is about to run."""
        self.calls += 1
        if self.calls == self.layers + 1:
            self.say(f"engine.compile: {self.layers} layers compiled in {_compiling():.0f} s")


def _compiling() -> float:
    """Seconds that torch has spent on it in this process."""
    return float(torch._dynamo.utils.calculate_time_spent()["total_wall_time"])


def _inside(layer: Any) -> Any:
    """A layer's forward without the checkpoint that transformers (of 2026) wraps around it: torch would not compile
    that, and says nothing."""
    own = getattr(type(layer).forward, "__wrapped__", None)
    return layer.forward if own is None or "forward" in vars(layer) else partial(own, layer)


def _forward(layer: Any, function: Any, clock: _Clock, *args: Any, layout: Any = None, **kwargs: Any) -> Any:
    if layout is not None:
        kwargs["layout"] = Held(layout)
    clock.tick()
    if layer.training and layer.gradient_checkpointing and hasattr(type(layer).forward, "__wrapped__"):
        return layer._gradient_checkpointing_func(partial(function, **kwargs), *args)
    return function(*args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(*args: Any, layout: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
    return attention.attend(*args, layout=layout.layout if isinstance(layout, Held) else layout, **kwargs)
