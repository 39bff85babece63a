"""fp16's loss scale: gradients below 6e-8 would be lost, so the loss is multiplied by a power of two, which is exact.

A step that overflows is computed again at half the scale: same rows, schedule unmoved. (PyTorch's GradScaler leaves
such a step out instead: its rows are lost, and the rate goes on.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

FIRST = 2.0**12
LARGEST = 2.0**16
"""PyTorch's first scale. Beyond it nothing is gained: fp16's smallest number times it is 4e-3."""
DOUBLED_AFTER = 2000
"""Steps without an overflow after which the scale is doubled, as PyTorch does it."""


def first(fp16: bool) -> float:
    """The scale that a run starts with; 1 where nothing is computed in fp16."""
    return FIRST if fp16 else 1.0


def halved(scale: float, loss: float, norm: float) -> float | None:
    """The scale to compute the step again with; None where no other would help, or none is needed."""
    overflowed = math.isfinite(loss) and not math.isfinite(norm)
    return scale / 2 if overflowed and scale > 1 else None


def doubled(scale: float, steady: int, fp16: bool) -> float:
    """The scale after a step that was the `steady`th in a row without an overflow."""
    return min(scale * 2, LARGEST) if fp16 and steady % DOUBLED_AFTER == 0 else scale


def unscale(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Divide the gradients by the scale, which is exact in fp32."""
    if scale != 1:
        torch._foreach_div_([value.grad for value in parameters if value.grad is not None], scale)
