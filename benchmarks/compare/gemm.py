"""This machine's matrix rate over a cell's own shapes, measured between the contestants' turns.

Of bf16 and fp32 the faster one, product by product: bf16 weights may be multiplied in either.
"""

from __future__ import annotations

import time

import torch
from cells import Shape

FORMATS = (torch.bfloat16, torch.float32)


def rate(shape: Shape, tokens: int, taught: int, seconds: float = 2.0) -> float:
    """FLOP/s of every product of a forward pass: a step's `tokens` through a layer's seven matrices, weighted by
    the layers, and its `taught` places through the head. Each product is repeated until its share of `seconds` is over.
    """
    products = [(tokens, *sides, shape.layers) for sides in shape.projections.values()]
    products.append((taught, shape.hidden, shape.words, 1))
    work = [2.0 * rows * inputs * outputs * times for rows, inputs, outputs, times in products]
    spent = 0.0
    for (rows, inputs, outputs, times), operations in zip(products, work, strict=True):
        share = seconds * operations / sum(work) / len(FORMATS)
        spent += times * min(_best(rows, inputs, outputs, dtype, share) for dtype in FORMATS)
    return sum(work) / spent


def _best(rows: int, inputs: int, outputs: int, dtype: torch.dtype, seconds: float) -> float:
    """The shortest time of a product, of at least three."""
    left, right = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    torch.nn.functional.linear(left, right)  # loads the kernel
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        taken.append(time.perf_counter() - start)
    return min(taken)
