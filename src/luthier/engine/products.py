"""Products with frozen 16-bit weights, computed in fp32 where the processor multiplies fp32 faster.

The results are 16-bit as before, and nearer to the truth: what is rounded is rounded once. Weights are widened for one
product, a part at a time, and never kept.

Shapes: T tokens, D columns in, O columns out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IN_FP32: WeakSet[nn.Module] = WeakSet()
"""The layers whose products are in fp32 now."""

ROOMS: dict[str, Tensor] = {}
"""fp32 memory that serves one product after the other. Taken anew each time it would lie between what is kept for the
backward, and a heap with such holes held 2.9 GiB instead of 2.2 (0.5 B parameters, 543 tokens)."""

FEWEST = 128
"""Tokens of a product from which widening the weight pays: 64 break even, 110 gain 12 %, 220 gain 25 %, 441 gain 50 %
(896 × 151,936); answers, which come token by token, stay with 16 bits."""

PART = 1 << 22
"""Numbers of a weight that are widened at once: 16 MiB; a quarter and the double of it take the same time."""


@cache
def faster() -> bool:
    """Does this processor multiply fp32 faster than bf16? Known by its instructions, so that runs do not differ.

    An x86 without AMX does: Intel's AVX-512 runs bf16 at 138 GFLOP/s and fp32 at 201 (two cores; whole steps:
    docs/performance.md), and what has no bf16 at all widens every number itself. AMD's AVX-512 has twice the rate
    in bf16 by its documents, and ARM's bf16 is not measured: they keep 16 bits.
    """
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    amd = can.get("avx512_bf16") and "AMD" in str(can.get("cpu_name"))
    return can.get("architecture") == "x86_64" and not can.get("amx_bf16") and not amd


@contextmanager
def fp32_products(model: Any) -> Iterator[bool]:
    """Inside, frozen linear layers of 16 bits on the CPU multiply in fp32, where that is `faster`. Yields if any do.

    Quantised layers do where their LoRA is fused (lora.py).
    """
    layers = [module for module in model.modules() if _is_meant(module)] if faster() else []
    # The head by itself would take all logits in fp32 (frozen_head.py takes a part of the words at once).
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    plain = [layer for layer in layers if "forward" not in vars(layer) and layer is not head]
    try:
        IN_FP32.update(layers)
        for layer in plain:
            layer.forward = partial(_forward, layer)
        yield bool(layers)
    finally:
        for layer in plain:
            del layer.forward
        IN_FP32.difference_update(layers)
        ROOMS.clear()


def in_fp32(layer: nn.Module, tokens: int) -> bool:
    """Is this layer's product with so many tokens in fp32?"""
    return tokens >= FEWEST and layer in IN_FP32


def _is_meant(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or any(each.requires_grad for each in module.parameters()):
        return False
    quantised = getattr(module, "luthier_dtype", None)  # models/quantize.py: what a quantised layer computes in
    return quantised == torch.bfloat16 or (type(module) is nn.Linear and weight.dtype == torch.bfloat16)


def _forward(layer: Any, x: Tensor) -> Tensor:
    if not in_fp32(layer, x.numel() // x.shape[-1]) or x.dtype != layer.weight.dtype:
        return F.linear(x, layer.weight, layer.bias)
    return _Product.apply(x, layer)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    """x · Wᵀ + b of a layer that does not train: [..., O]. Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        flat = widened("x", x.reshape(-1, x.shape[-1]))
        y = forward(flat, layer.weight, layer.bias).view(*x.shape[:-1], -1)
        return y.to(x.dtype)  # a tensor of its own, no view: AdaLoRA adds to it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        flat = widened("g", upstream.reshape(-1, upstream.shape[-1]))
        return backward(flat, ctx.layer.weight).to(upstream.dtype).view(*upstream.shape[:-1], -1), None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · Wᵀ + b in the format of x: [T, O], for the moment only where that is wider than the weight's. x: [T, D];
    weight: [O, D]."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = room("y", len(x), len(weight))
    for part, wide in parts(weight, x.dtype, max(1, PART // weight.shape[1])):
        torch.mm(x, wide.t(), out=y[:, part])
    return y if bias is None else y.add_(bias)


def backward(g: Tensor, weight: Tensor, beside: Tensor | None = None) -> Tensor:
    """g · W in the format of g: [T, D], for the moment only as in `forward`; added to `beside` where that is given.
    g: [T, O]; weight: [O, D]."""
    if weight.dtype == g.dtype:
        return g @ weight if beside is None else beside.addmm_(g, weight)
    of_x = room("of x", len(g), weight.shape[1]).zero_() if beside is None else beside
    for part, wide in parts(weight, g.dtype, max(1, PART // weight.shape[1])):
        of_x.addmm_(g[:, part], wide)
    return of_x


def widened(name: str, x: Tensor) -> Tensor:
    """x in fp32, until the next one of this name."""
    return x if x.dtype == torch.float32 else room(name, *x.shape).copy_(x)


def room(name: str, rows: int, columns: int) -> Tensor:
    """fp32 [rows, columns] of any numbers, in the memory that the last of this name had."""
    if name not in ROOMS or ROOMS[name].numel() < rows * columns:
        ROOMS[name] = torch.empty(rows * columns)
    return ROOMS[name][: rows * columns].view(rows, columns)


def parts(weight: Tensor, dtype: torch.dtype, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight, and these rows in `dtype`: where that is another format, gone with the next ones, which take
    their memory."""
    rows, columns, made = min(rows, len(weight)), weight.shape[1], None
    if weight.dtype != dtype:
        made = room("weight", rows, columns) if dtype == torch.float32 else weight.new_empty(rows, columns, dtype=dtype)
    for start in range(0, len(weight), rows):
        part = slice(start, min(start + rows, len(weight)))
        yield part, weight[part] if made is None else made[: part.stop - start].copy_(weight[part])
