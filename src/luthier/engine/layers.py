"""Norms and gated feed-forwards of transformers' models with the same numbers, less memory and fewer passes over it.

Which modules can be replaced is found out by trying: a class's own forward runs on a few random numbers beside each
form known here, and where none gives the same the module is left alone. Names decide nothing.

Shapes: T tokens, D columns of a norm, F of a feed-forward.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.engine import dropout
from luthier.engine.again import with_again

TRIED = 24
"""Rows of numbers for a try: of 768 or more in 16 bits, a fifth show which of two products was rounded first."""


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[Counter[str]]:
    """Inside, the model's norms and gated feed-forwards are these; yields how many of which class.

    They stand as `forward` on the modules, so that hooks go on running; a module that has a `forward` of its own
    already (bitsandbytes', a context's like this one) is left alone. torch.compile gets the class's own forward.
    """
    forms: dict[Hashable, Norm | Gated | None] = {}
    fused: list[nn.Module] = []
    try:
        for module in model.modules():
            form = None if "forward" in vars(module) else _form(module, forms)
            if form is not None:
                module.forward = partial(form.forward, module)
                fused.append(module)
        yield Counter(type(module).__name__ for module in fused)
    finally:
        for module in fused:
            del module.forward


def _form(module: nn.Module, known: dict[Hashable, Norm | Gated | None]) -> Norm | Gated | None:
    """The form that gives a module's numbers; None where it is no norm or feed-forward, or one of another kind.

    One try for all modules of a class with the same settings.
    """
    if _is_norm(module):
        find: Callable[[Any], Norm | Gated | None] = _norm_of
        key: Hashable = _settings(module)
    elif (activation := _activation(module)) is not None:
        find, key = _gated_of, (_settings(module), _settings(activation), tuple(module._modules))
    else:
        return None
    if key not in known:
        # Plain numbers on the CPU, whatever surrounds the call; and torch's own random numbers stay where they are.
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            known[key] = find(module)
    return known[key]


def _settings(module: nn.Module) -> Hashable:
    plain = ((name, value) for name, value in vars(module).items() if isinstance(value, int | float | str))
    return type(module), tuple(plain)


def _stand_in(module: nn.Module, **parts: Any) -> Any:
    """The module with other parameters or children, whatever its own are: adapted, quantised, on another device."""
    twin = copy.copy(module)
    vars(twin).update({kind: {**vars(module)[kind], **new} for kind, new in parts.items()})
    return twin


def _same(ours: Tensor, theirs: Any) -> bool:
    """To rounding in fp32; in 16 bits nearly all numbers are equal, so that both were rounded at the same places."""
    if not isinstance(theirs, Tensor) or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    near = torch.isclose(ours, theirs, rtol=8 * torch.finfo(ours.dtype).eps, atol=1e-6).all()
    return bool(near) and (ours.dtype.itemsize > 2 or (ours != theirs).float().mean().item() < 0.05)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _own(module: nn.Module, x: Tensor) -> Any:
    """What its class computes; None where it wants more than x, or other children than it was given."""
    try:
        return type(module).forward(module, x)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None


# -- norms -------------------------------------------------------------------------------------------------------------


class Norm(NamedTuple):
    """x / rms(x), in fp32, times (offset + weight). late: rounded to x's format after the weight, not before."""

    offset: float
    late: bool

    def forward(self, module: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        return normed(x, module.weight, _epsilon(module), self)


LLAMA, GEMMA, OLMO = Norm(0.0, late=False), Norm(1.0, late=True), Norm(0.0, late=True)


def normed(x: Tensor, weight: Tensor, epsilon: float, form: Norm) -> Tensor:
    """x: [..., D]; weight: [D]. The result is in x's format; where the weight comes last, in the wider of the two."""
    result: Tensor = _Normed.apply(x, weight, epsilon, form)  # type: ignore[no-untyped-call]
    return with_again(result, partial(_normed_again, epsilon, form), x, weight)


def _normed_again(epsilon: float, form: Norm, x: Tensor, weight: Tensor) -> Tensor:
    with torch.no_grad():
        return _Normed.apply(x, weight, epsilon, form)  # type: ignore[no-any-return, no-untyped-call]


class _Normed(torch.autograd.Function):
    """x itself and one fp32 number a token are kept: transformers keeps x in fp32 and, for a weight that trains, once
    more normed. On the CPU by pieces, which stay in cache."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, form: Norm) -> Tensor:
        dtype = x.dtype if form.late else torch.promote_types(x.dtype, weight.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        tokens, results = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
        inverse = torch.empty(len(tokens), 1, device=x.device)
        factor = weight.float() + form.offset if form.late else weight
        a, b = _buffers(tokens, 2)
        for piece in _pieces(tokens):
            mine, result, scale = tokens[piece], results[piece], inverse[piece]
            wide, squares = a[: len(mine)], b[: len(mine)]
            wide.copy_(mine)
            torch.mean(torch.mul(wide, wide, out=squares), -1, keepdim=True, out=scale)
            wide.mul_(scale.add_(epsilon).rsqrt_())
            if form.late:
                result.copy_(wide.mul_(factor))
            else:
                result.copy_(wide if dtype == x.dtype else wide.to(x.dtype)).mul_(factor)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = form.offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """n = x / rms: dn = g · (offset + weight), dx = (dn - n · mean(dn · n)) / rms, dweight = Σ g · n."""
        x, weight, inverse = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        tokens, gradients = x.reshape(-1, x.shape[-1]), upstream.reshape(-1, x.shape[-1])
        factor = weight.float() + ctx.offset
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants_x else None
        dweight = torch.zeros_like(factor) if wants_weight else None
        a, b, c = _buffers(tokens, 3)
        for piece in _pieces(tokens):
            mine, scale = tokens[piece], inverse[piece]
            g, n, gn = (buffer[: len(mine)] for buffer in (a, b, c))
            g.copy_(gradients[piece])
            n.copy_(mine).mul_(scale)
            if dweight is not None:
                dweight += torch.mul(g, n, out=gn).sum(0)
            if dx is not None:
                g.mul_(factor)
                mean = torch.mul(g, n, out=gn).mean(-1, keepdim=True)
                dx.view_as(tokens)[piece].copy_(g.addcmul_(n, mean, value=-1).mul_(scale))
        return dx, None if dweight is None else dweight.to(weight.dtype), None, None


def _pieces(tokens: Tensor) -> Iterator[slice]:
    rows = _rows(tokens)
    return (slice(start, start + rows) for start in range(0, len(tokens), rows))


def _rows(tokens: Tensor) -> int:
    return max(1, dropout.PIECE // tokens.shape[1]) if tokens.device.type == "cpu" else max(1, len(tokens))


def _buffers(tokens: Tensor, number: int) -> list[Tensor]:
    rows = min(len(tokens), _rows(tokens))
    return [torch.empty(rows, tokens.shape[1], dtype=torch.float32, device=tokens.device) for _ in range(number)]


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    return alone and weight is not None and weight.ndim == 1 and isinstance(_epsilon(module), float)


def _epsilon(module: Any) -> Any:
    """Under either of transformers' names for it."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _norm_of(module: Any) -> Norm | None:
    """The form which gives the class's numbers in fp32, in the weight's format, and for bf16 that meets that weight."""
    weight, x = _random(len(module.weight)), _random(max(TRIED, 768 // len(module.weight)), len(module.weight))
    own = module.weight.dtype
    tries = [(weight.to(w), x.to(d)) for w, d in {(torch.float32,) * 2, (own, own), (own, torch.bfloat16)}]
    for form in (LLAMA, GEMMA, OLMO):
        theirs = (_own(_stand_in(module, _parameters={"weight": w}), x) for w, x in tries)
        if all(_same(normed(x, w, _epsilon(module), form), y) for (w, x), y in zip(tries, theirs, strict=True)):
            return form
    return None


# -- gated feed-forwards -----------------------------------------------------------------------------------------------

_ATEN = torch.ops.aten
ACTIVATIONS: dict[str, tuple[Any, Any]] = {
    "silu": (_ATEN.silu.out, _ATEN.silu_backward.grad_input),
    "gelu_tanh": (
        partial(_ATEN.gelu.out, approximate="tanh"),
        partial(_ATEN.gelu_backward.grad_input, approximate="tanh"),
    ),
    "gelu": (_ATEN.gelu.out, _ATEN.gelu_backward.grad_input),
}
"""Each with its gradient, into memory that is there."""
APART, JOINED = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")
"""What the layers of a gated feed-forward are called; the one child beside them is the activation."""


class Gated(NamedTuple):
    """down(act(gate) · up). swapped: the activation is on up (Yuan2)."""

    activation: str
    swapped: bool

    def forward(self, module: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        joined = "gate_up_proj" in module._modules
        parts = (module.gate_up_proj(x),) if joined else (module.gate_proj(x), module.up_proj(x))
        return module.down_proj(gated(self, *parts))  # type: ignore[no-any-return]


def gated(form: Gated, *parts: Tensor) -> Tensor:
    """act(gate) · up: [..., F]. parts: gate and up [..., F] each, or both as one [..., 2 F]."""
    result: Tensor = _Gated.apply(form, *parts)  # type: ignore[no-untyped-call]
    return with_again(result, partial(_gated_again, form), *parts)


def _gated_again(form: Gated, *parts: Tensor) -> Tensor:
    with torch.no_grad():
        return _Gated.apply(form, *parts)  # type: ignore[no-any-return, no-untyped-call]


class _Gated(torch.autograd.Function):
    """Gate and up are kept; act(gate), a third more, is computed again for the backward. The same numbers, bit for
    bit, as without.

    Not by pieces: they gain nothing beside an activation, which is bound by arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, form: Gated, *parts: Tensor) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(*parts)
        acted, other = _acted_and_other(form, parts)
        out = torch.empty(other.shape, dtype=other.dtype, device=other.device)
        ACTIVATIONS[form.activation][0](acted, out=out)
        return out.mul_(other)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors  # to be asked for once: checkpoints give it out no second time
        acted, other = _acted_and_other(ctx.form, parts)
        gradients = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in parts]
        d_acted, d_other = _acted_and_other(ctx.form, gradients)
        act, derivative = ACTIVATIONS[ctx.form.activation]
        act(acted, out=d_other)
        d_other.mul_(upstream)
        torch.mul(upstream, other, out=d_acted)
        derivative(d_acted, acted, grad_input=d_acted)
        return None, *gradients


def _acted_and_other(form: Gated, parts: Any) -> tuple[Tensor, Tensor]:
    gate, up = parts if len(parts) == 2 else parts[0].chunk(2, dim=-1)
    return (up, gate) if form.swapped else (gate, up)


def _activation(module: nn.Module) -> nn.Module | None:
    """That of what may be a gated feed-forward, where nothing hangs on it: it will not be called."""
    for names in (APART, JOINED):
        if set(names) < set(module._modules) and len(module._modules) == len(names) + 1 and not module._parameters:
            (name,) = set(module._modules) - set(names)
            found = module._modules[name]
            if found is not None and not ("forward" in vars(found) or found._forward_hooks or found._forward_pre_hooks):
                return found
    return None


def _gated_of(module: Any) -> Gated | None:
    """The form which gives the class's numbers in fp32 and in bf16, with small layers in place of the module's own."""
    gate, up, down = _random(33, 5), _random(33, 6)[:, :5], _random(4, 33)
    weights = {"gate_proj": gate, "up_proj": up, "gate_up_proj": torch.cat((gate, up)), "down_proj": down}
    for activation, swapped in product(ACTIVATIONS, (False, True)):
        form = Gated(activation, swapped)
        if all(_gives(form, module, weights, dtype) for dtype in (torch.float32, torch.bfloat16)):
            return form
    return None


def _gives(form: Gated, module: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> bool:
    small = {n: partial(F.linear, weight=w.to(dtype)) for n, w in weights.items() if n in module._modules}
    x = _random(TRIED, 5).to(dtype)
    twin = _stand_in(module, _modules=small)
    return _same(form.forward(twin, x), _own(twin, x))
