"""LoRA layers that read the same input, as one function: y = x · Wᵀ + s · (x · Aᵀ) · Bᵀ for each of them.

What PEFT does in a dozen passes over memory (a copy of x in the adapter's format, the low-rank product scaled, added,
converted) happens in place, and the backward is written by hand: it keeps x, which the layers share (not even that
where it can be made again, again.py), and the r columns of x · Aᵀ, never a weight or a mask. The parameters, their
names and their files are PEFT's.

Which layers read the same input (query, key and value; gate and up) is found by a look: two tokens go through the
model, and layers that are handed the very same tensor belong together. The first of them that is called computes for
all, and the others give back what is theirs.

Shapes: T tokens, D columns in, O columns out, r the rank; R the sum of the ranks of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.engine import products
from luthier.engine.again import Again, again
from luthier.engine.dropout import KeyedDropout, times_windows

FOUND: WeakKeyDictionary[nn.Module, list[list[str]]] = WeakKeyDictionary()
"""The groups of a model by the names of their layers, found once for the same layers."""


@dataclass(eq=False)
class Group:
    """Layers that read one input.

    a: [R, D] and b: [O, r] each, the adapters' numbers in the format of the arithmetic, cast once a pass (`cast`);
    given, results: the input of the call that is under way, and what the other layers will ask for.
    """

    layers: list[Any]
    adapter: str
    a: Tensor | None = None
    b: list[Tensor] = field(default_factory=list)
    stale: bool = True
    given: Tensor | None = None
    results: dict[int, Tensor] = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        return [layer.r[self.adapter] for layer in self.layers]

    @property
    def weights(self) -> list[nn.Parameter]:
        """Every A, then every B."""
        return [part[self.adapter].weight for name in ("lora_A", "lora_B") for part in _each(self.layers, name)]

    def cast(self, dtype: torch.dtype) -> None:
        """Take the adapters' numbers as they are now, unless this pass has done so."""
        if not self.stale and self.a is not None and self.a.dtype == dtype:
            return
        weights, count = self.weights, len(self.layers)
        with torch.no_grad():
            self.a = torch.cat([weight.to(dtype) for weight in weights[:count]])
            self.b = [weight.to(dtype, copy=True) for weight in weights[count:]]
        self.stale = False

    def next_pass(self) -> None:
        self.stale, self.given, self.results = True, None, {}


@contextmanager
def fused_lora(model: Any) -> Iterator[list[str]]:
    """Inside, the LoRA layers of a PeftModel that allow it compute together. Yields how many, and why others do not.

    Nothing changes where a model has no such layers. The plain path is taken by what is not on the list (`_reason`).
    """
    candidates = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    reasons = {name: _reason(model, layer) for name, layer in candidates.items()}
    layers = {name: layer for name, layer in candidates.items() if reasons[name] is None}
    said = list(dict.fromkeys(f"LoRA by PEFT's own layers: {reason}" for reason in reasons.values() if reason))
    if not layers:
        yield ["no LoRA layer is fused", *said] if said else []
        return
    adapter = next(iter(layers.values())).active_adapters[0]
    groups = [Group([layers[name] for name in names], adapter) for names in _groups(model, layers)]
    before = {layer: vars(layer).get("forward") for layer in layers.values()}
    for group in groups:
        for number, layer in enumerate(group.layers):
            layer.forward = partial(_forward, group, number, layer, layer.forward)
    hook = _decoder(model).register_forward_pre_hook(partial(_next_pass, groups))
    try:
        yield [_told(groups), *said]
    finally:
        hook.remove()
        for layer, own in before.items():
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _told(groups: Sequence[Group]) -> str:
    sizes = [len(group.layers) for group in groups]
    return f"{sum(sizes)} LoRA layers fused into {len(sizes)}"


def _reason(model: Any, layer: Any) -> str | None:
    """Why a layer keeps PEFT's own path; None where it need not."""
    if type(layer).__name__ not in ("Linear", "Linear8bitLt", "Linear4bit"):
        return f"it has other layers than linear ones ({type(layer).__name__})"
    if len(layer.active_adapters) != 1 or layer.active_adapters[0] not in layer.lora_A:
        return "several adapters are active, or none"
    adapter = layer.active_adapters[0]
    config, base = model.peft_config[adapter], layer.get_base_layer()
    if adapter in layer.lora_variant or layer.use_dora.get(adapter):
        return "a variant of LoRA"
    if config.init_lora_weights not in (True, False, "gaussian"):
        return f"it starts from another base ({config.init_lora_weights})"
    if config.modules_to_save:
        return "whole layers train beside it (modules_to_save)"
    if layer.lora_bias[adapter] or any(weight.requires_grad for weight in base.parameters()):
        return "weights or biases of the base train"
    if layer.fan_in_fan_out or not (type(base) is nn.Linear or _is_quantised(base)):
        return f"the base has other layers than linear ones ({type(base).__name__})"
    return None


def _groups(model: Any, layers: dict[str, Any]) -> list[list[str]]:
    """Names of the layers that read the same input, as two tokens show it; a layer that they do not reach is alone."""
    if {name for names in FOUND.get(model, []) for name in names} != set(layers):
        inputs: dict[int, list[str]] = {}
        held: list[Tensor] = []  # or another tensor could get the number of one that is gone

        def look(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
            held.append(args[0])
            inputs.setdefault(id(args[0]), []).append(name)

        hooks = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()]
        trains = {module: module.training for module in model.modules()}
        device = next(model.parameters()).device
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                _decoder(model.eval())(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in trains.items():
                module.training = training
        found = [list(dict.fromkeys(names)) for names in inputs.values()]
        seen = [name for names in found for name in names]
        found = [names for names in found if all(seen.count(name) == 1 for name in names)]
        there = {name for names in found for name in names}
        FOUND[model] = [*_of_one_format(found, layers), *([name] for name in layers if name not in there)]
    return FOUND[model]


def _of_one_format(groups: list[list[str]], layers: dict[str, Any]) -> Iterator[list[str]]:
    """The groups, and again by what their layers compute in."""
    for names in groups:
        parts: dict[Any, list[str]] = {}
        for name in names:
            base = layers[name].get_base_layer()
            parts.setdefault((_is_quantised(base), getattr(base, "luthier_dtype", None)), []).append(name)
        yield from parts.values()


def _decoder(model: Any) -> Any:
    base = model.get_base_model()
    return base.get_decoder() if hasattr(base, "get_decoder") else base


def _next_pass(groups: Sequence[Group], *_: Any) -> None:
    """The adapters may have moved since the last pass. What checkpointing computes again belongs to this one."""
    for group in groups:
        group.next_pass()


def _each(layers: Sequence[Any], name: str) -> Iterator[Any]:
    return (getattr(layer, name) for layer in layers)


def _is_quantised(base: Any) -> bool:
    """Is it a layer that models/quantize.py has settled? luthier_weight makes its weight, in luthier_dtype."""
    return hasattr(base, "luthier_weight")


def _arithmetic(base: Any, x: Tensor) -> torch.dtype:
    """What a layer computes in: what it was quantised for, autocast's format, or that of its input."""
    if _is_quantised(base) and base.luthier_dtype is not None:
        return base.luthier_dtype  # type: ignore[no-any-return]
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _forward(group: Group, number: int, layer: Any, plain: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's forward while it is fused."""
    if group.given is x and number in group.results:
        result = group.results.pop(number)
        if not group.results:
            group.given = None
        return result
    drops = [each.lora_dropout[group.adapter] for each in group.layers] if layer.training else []
    unkeyed = any(isinstance(drop, nn.Dropout) and drop.p > 0 for drop in drops)
    others = args or kwargs or layer.disable_adapters or layer.merged or layer.active_adapters != [group.adapter]
    if others or unkeyed:
        return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
    keyed = [drop if isinstance(drop, KeyedDropout) else None for drop in drops]
    results = _Fused.apply(x, again(x), group, keyed if any(keyed) else None, *group.weights)  # type: ignore[no-untyped-call]
    group.results = dict(enumerate(results))
    group.given = x if len(results) > 1 else None
    return group.results.pop(number)


class _Masks(NamedTuple):
    """A layer's dropout in one pass: flags 0 and 1, from offsets [T] into a table, and what a kept number is worth."""

    offsets: Tensor
    windows: Tensor
    worth: float

    def of(self, x: Tensor) -> Tensor:
        return times_windows(x, self.offsets, self.windows, x.dtype)


class _Fused(torch.autograd.Function):
    """y of every layer of a group: [..., O] each. Keeps x, or what makes it again, and x · Aᵀ (of the masked x, where
    there is dropout).

    x, y and their gradients are in the layers' format, the sums in between in that of the products (products.py).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, again: Again, group: Group, drops: list[Any] | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        bases = [layer.get_base_layer() for layer in group.layers]
        dtype = _arithmetic(bases[0], x)
        given = x.reshape(-1, x.shape[-1]).to(dtype)  # [T, D]
        ctx.format = torch.float32 if products.in_fp32(bases[0], len(given)) else dtype
        flat = products.widened("x", given) if ctx.format != dtype else given
        group.cast(ctx.format)
        a = cast(Tensor, group.a)
        masks = None if drops is None else [_masks(drop, flat) for drop in drops]
        scales = [layer.scaling[group.adapter] for layer in group.layers]
        results, kept = [], []
        with torch.autocast(x.device.type, enabled=False):
            if masks is None:
                kept = list(torch.split(F.linear(flat, a), group.ranks, dim=1))
            else:
                parts = zip(masks, torch.split(a, group.ranks), strict=True)
                kept = [F.linear(flat if mask is None else mask.of(flat), part) for mask, part in parts]
                scales = [s if mask is None else s * mask.worth for s, mask in zip(scales, masks, strict=True)]
            for base, low, b, scale in zip(bases, kept, group.b, scales, strict=True):
                y = _sum(flat, _weight(base, dtype), base.bias, low, b, scale)
                own = x.dtype if _is_quantised(base) and base.luthier_dtype is not None else dtype
                results.append(y.view(*x.shape[:-1], -1).to(own, copy=ctx.format != dtype))
        ctx.save_for_backward(*again.tensors, *kept)
        ctx.again, ctx.own = again.make, dtype
        ctx.bases, ctx.a, ctx.b, ctx.masks, ctx.scales, ctx.ranks = bases, a, group.b, masks, scales, group.ranks
        ctx.shape, ctx.given = x.shape, x.dtype
        ctx.formats = [weight.dtype for weight in weights]
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(ctx.bases)
        given, kept = ctx.again(*saved[:-count]), saved[-count:]
        given = given.reshape(-1, given.shape[-1]).to(ctx.own)
        wide, wanted = ctx.format != given.dtype, ctx.needs_input_grad[0]
        flat = products.widened("x", given) if wide else given
        back, of_b = [], []
        of_x: Tensor | None = None
        with torch.autocast(flat.device.type, enabled=False):
            for base, gradient, low, b, scale in zip(ctx.bases, gradients, kept, ctx.b, ctx.scales, strict=True):
                g = gradient.reshape(-1, gradient.shape[-1]).to(given.dtype)  # [T, O]
                g = products.widened("g", g) if wide else g
                back.append((g @ b).mul_(scale))  # [T, r]
                of_b.append((low.t() @ g).t().mul_(scale))  # so, and not g.t() @ low, in half the time
                if wanted:
                    of_x = products.backward(g, _weight(base, given.dtype), of_x)
            of_a = _of_a(ctx, flat, back, of_x)
        found = [value.to(dtype) for value, dtype in zip([*of_a, *of_b], ctx.formats, strict=True)]
        return None if of_x is None else of_x.view(ctx.shape).to(ctx.given, copy=wide), None, None, None, *found


def _sum(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, b: Tensor, scale: float) -> Tensor:
    """x · Wᵀ + bias + scale · low · Bᵀ: [T, O], in the format of x.

    In 16 bits the small product is there first and the large one is added to it in fp32, as it comes, and rounded once
    (with a bias once more). The other way round it is added to what is rounded already: of a first update, mostly below
    half a step of that, a third (of 1e-4) arrived in a layer's output, now all of it.
    """
    if x.dtype == torch.float32:
        return products.forward(x, weight, bias).addmm_(low, b.t(), alpha=scale)
    y = ((low * scale) @ b.t()).addmm_(x, weight.t())
    return y if bias is None else y.add_(bias.to(y.dtype))


def _of_a(ctx: Any, flat: Tensor, back: list[Tensor], of_x: Tensor | None) -> list[Tensor]:
    """The gradients of every A; what goes on to x through them is added to `of_x`. back: [T, r] each."""
    if ctx.masks is None:
        whole = torch.cat(back, dim=1)  # [T, R]
        if of_x is not None:
            of_x.addmm_(whole, ctx.a)
        return list(torch.split(whole.t() @ flat, ctx.ranks))
    found = []
    for mask, a, part in zip(ctx.masks, ctx.a.split(ctx.ranks), back, strict=True):
        found.append(part.t() @ (flat if mask is None else mask.of(flat)))
        if of_x is not None:
            of_x.add_(part @ a if mask is None else mask.of(part @ a))
    return found


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """[O, D]; of a quantised layer made anew, for the forward and again for the backward."""
    weight: Tensor = base.luthier_weight(dtype) if _is_quantised(base) else base.weight.to(dtype)
    return weight


def _masks(drop: KeyedDropout | None, x: Tensor) -> _Masks | None:
    if drop is None:
        return None
    windows = drop.table(drop.p, x.dtype, x.device, False).unfold(0, x.shape[-1], 1)
    return _Masks(drop.offsets(x), windows, 1 / (1 - drop.p))
