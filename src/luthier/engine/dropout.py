"""Dropout that does not depend on how a step's rows are cut: masks keyed by (seed, step, row up to a token, module).

A mask is never drawn in sequence. One table of random keep-flags is drawn for the whole run; the mask of a token in a
module is the window into it that begins at hash(seed, step, the row's tokens up to this one, module). So any cut, any
number of processes, shared prefixes and any recomputation see the same masks, and a window is cheaper than random
numbers: for 2,700 × 896 in fp32 on one core 4 ms, where F.dropout takes 26 ms (benchmarks/dropout.py: a whole step).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.data.pack import Segment
from luthier.errors import ModelError

TABLE_BITS = 22
"""A window begins at one of 2**22 flags: two tokens of a module share one once in four million pairs."""

WIDEST = 1 << 17
"""Columns of the widest layer that can be masked; the largest model of today has 53,248."""

PIECE = 1 << 17
"""Elements of a piece on the CPU: 512 KiB in fp32 stay in a core's cache; fresh memory costs more than the product."""

OTHER_HEADS = ("classifier", "summary")
"""How the dropouts begin that a configuration keeps for heads which a language model has not."""


def token_keys(
    seed: int, step: int, ids: NDArray[np.int64], positions: NDArray[np.int64], segments: Sequence[Segment] = ()
) -> NDArray[np.int64]:
    """One well-mixed 64-bit key a token, from the step and from its row up to it: [B, L] as `ids`.

    Not from the row's number: what several rows begin with has the same masks in all of them, whether it is computed
    once for all (shared prefixes) or in each. `segments`: those of a packed pass, none in a padded one.
    """
    words = _split_mix(_split_mix(np.zeros(1, np.uint64), positions), ids)
    sums = words.cumsum(axis=1)  # of random words, one a token and position: it wraps around, as a hash may
    for start, stop, parent in segments:
        before = sums[0, segments[parent].stop - 1] if parent >= 0 else np.uint64(0)
        sums[0, start:stop] = before + words[0, start:stop].cumsum()
    key = np.zeros(1, np.uint64)
    for word in (np.array([seed]), np.array([step]), sums):
        key = _split_mix(key, word)
    return key.view(np.int64)


def keep_table(seed: int, p: float, dtype: torch.dtype, device: torch.device, scaled: bool = True) -> Tensor:
    """Flags 0 or 1 / (1 - p) in random order: [2**22 + WIDEST], a circle whose beginning is repeated at its end.
    Not `scaled`: 0 or 1, which bf16 has exactly.

    Exactly the share p (to 2**-22) of the circle is 0, and each column of a window meets the whole circle.
    """
    numbers = _split_mix(
        np.array([seed], np.uint64), np.arange(1 << TABLE_BITS)
    )  # all unlike: the mixing is one to one
    dropped = round(p * len(numbers))
    kept = torch.from_numpy(numbers >= np.partition(numbers, dropped)[dropped])
    flags = torch.cat((kept, kept[:WIDEST])).to(device, dtype)
    return flags / (1 - p) if scaled else flags


class KeyedDropout(nn.Module):
    """Dropout of one layer's input, by the window of each token; in eval mode only the cast to `dtype`.

    `keys`: int64 [tokens], on the device of x. x: [..., columns], the product of the leading sizes = tokens.
    Errors: ModelError in training mode where `keys` are none or not one a token.
    """

    def __init__(self, p: float, name: str, dtype: torch.dtype, table: Callable[..., Tensor]) -> None:
        super().__init__()
        self.p, self.name, self.dtype, self.table = p, name, dtype, table
        self.multiplier = _multiplier(name)
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x.to(self.dtype)
        offsets = self.offsets(x)
        windows = self.table(self.p, self.dtype, x.device).unfold(0, x.shape[-1], 1)  # [2**22 + …, columns], a view
        masked: Tensor = _Masked.apply(x, offsets, windows)  # type: ignore[no-untyped-call]
        return masked

    def offsets(self, x: Tensor) -> Tensor:
        """Where each token's window into the table begins: int64 [tokens]."""
        if self.keys is None or self.keys.numel() * x.shape[-1] != x.numel():
            raise ModelError(
                f"dropout on {self.name} cannot be made independent of how rows are cut (it is given other tokens "
                "than those of the rows); set method.dropout: 0"
            )
        # Multiply-shift hash: the top bits of the product, which wraps. >> keeps the sign: bring it to 0 … 2**22 - 1.
        return (self.keys * self.multiplier >> (64 - TABLE_BITS)) + (1 << (TABLE_BITS - 1))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _Masked(torch.autograd.Function):
    """x × its windows. The backward gathers them again: only the offsets are kept, neither mask nor x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, windows: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.windows, ctx.dtype = windows, x.dtype
        return times_windows(x, offsets, windows, windows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return times_windows(gradient, offsets, ctx.windows, ctx.dtype), None, None


def times_windows(x: Tensor, offsets: Tensor, windows: Tensor, dtype: torch.dtype) -> Tensor:
    """The product, in the wider dtype of the two, then as `dtype`. On the CPU by pieces: only the result is new memory.

    index_select copies row by row; windows[offsets] would go element by element and take twice as long.
    """
    columns = windows.shape[1]
    result = torch.empty(x.shape, dtype=dtype, device=x.device)
    tokens, masked = x.reshape(-1, columns), result.view(-1, columns)
    rows = max(1, (PIECE if x.device.type == "cpu" else x.numel()) // columns)
    for start in range(0, len(offsets), rows):
        piece = slice(start, start + rows)
        torch.mul(tokens[piece], windows.index_select(0, offsets[piece]), out=masked[piece])
    return result


@contextmanager
def keyed(model: nn.Module, seed: int) -> Iterator[bool]:
    """Inside, the dropout of the model's adapters is keyed; afterwards PEFT's own dropout modules are back.

    Yields whether there is any. Decoder layers take the keys from `layout.keys` of the call argument `layout`; adapters
    outside of them (on the head) get theirs by `set_keys`. The cast from bf16 to the adapter's fp32 happens with the
    masking instead of before it, in PEFT: the same numbers for half of what dropout would add to a step.
    """
    table = cache(partial(keep_table, seed))  # one a (p, dtype, device), given up with this context
    shared: dict[nn.Module, KeyedDropout] = {}  # layers with one A have one dropout: the first one's name
    places = [
        (
            layer,
            adapter,
            dropout,
            shared.setdefault(dropout, _keyed_like(dropout, name, readers[adapter].weight.dtype, table)),
        )
        for name, layer in model.named_modules()
        for dropouts, readers in [droppable(layer)]
        for adapter, dropout in dropouts.items()
        if adapter in readers and isinstance(dropout, nn.Dropout) and dropout.p > 0
    ]
    casts = [(layer, layer.cast_input_dtype_enabled) for layer, *_ in places]
    for layer, adapter, _, ours in places:
        droppable(layer)[0][adapter] = ours
        layer.cast_input_dtype_enabled = False
    hooks = [
        child.register_forward_pre_hook(partial(_take_keys, layer), with_kwargs=True)
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer) and any(_dropouts(layer))
        for child in layer.children()
    ]
    try:
        yield bool(places)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, cast in casts:
            layer.cast_input_dtype_enabled = cast
        for layer, adapter, dropout, ours in places:
            droppable(layer)[0][adapter] = dropout.train(ours.training)  # else a model put to eval() would drop again


def droppable(layer: Any) -> tuple[Any, Any]:
    """Of a layer's adapters: their dropouts, and the layers that read what these leave; both by the adapter's name.

    LoRA's, and those of a layer that has them as `luthier_dropout` (models/bottleneck.py). A dropout's input has one
    row a token of the pass; its result is wanted in the format of its reader's weight.
    """
    if isinstance(layer, LoraLayer):
        return layer.lora_dropout, layer.lora_A
    found: tuple[Any, Any] = getattr(layer, "luthier_dropout", ({}, {}))
    return found


def set_keys(module: nn.Module, keys: Tensor | None) -> None:
    """Give `keys` (int64, one a token of the next call, or None) to every keyed dropout inside `module`."""
    for dropout in _dropouts(module):
        dropout.keys = keys


def check_keys(model: Any) -> None:
    """Two rows through a PeftModel with its dropout. Errors: ModelError where an adapter is not given all their tokens.

    (An expert of its own sees those alone that are sent to it.) Nothing changes; without dropout nothing is computed.
    """
    with keyed(model, 0) as dropping, of_base(model).off(), torch.random.fork_rng(devices=[]), torch.no_grad():
        trains, device = model.training, next(model.parameters()).device
        if not dropping or device.type == "meta":
            return
        ids = torch.arange(16, device=device).view(2, 8) % model.get_input_embeddings().num_embeddings
        set_keys(model, ids.flatten())
        try:
            model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except TypeError:  # a model with other arguments: the proof says which
            pass
        finally:
            model.train(trains)


@dataclass(frozen=True)
class BaseDropout:
    """The base model's own dropout. places: (module or configuration, attribute, value); names: it all, for the user.

    names are as ["attention_dropout 0.1", "dropout 0.1"].
    """

    places: list[tuple[Any, str, float]]
    names: list[str]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, nothing of it is drawn. It comes in sequence: with it, a gradient depends on the cut."""
        self.set_to(0.0)
        try:
            yield
        finally:
            self.set_to()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within `off`: its own values again, for a configuration that is saved meanwhile."""
        self.set_to()
        try:
            yield
        finally:
            self.set_to(0.0)

    def set_to(self, value: float | None = None) -> None:
        """All of it to one value; without one each to its own."""
        for holder, attribute, own in self.places:
            setattr(holder, attribute, own if value is None else value)


def of_base(model: nn.Module) -> BaseDropout:
    """What the base model itself drops, in its modules and in its configurations, which some read in their forward.

    Adapters are left out, and what a configuration says of other heads than the language model's.
    """
    adapters = {
        part
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, child in layer.named_children()
        if name != "base_layer"
        for part in child.modules()
    }
    own = [(name.rpartition(".")[2], module) for name, module in model.named_modules() if module not in adapters]
    said = [place for config in _configs(module for _, module in own) for place in _drops(config)]
    said = [one for one in said if not (one[1].startswith(OTHER_HEADS) or getattr(one[0], "drops_nothing", False))]
    names = {f"{attribute} {value:g}" for _, attribute, value in said}
    told, places = {value for *_, value in said}, list(said)
    for name, module in own:
        for place in _drops(module):
            places.append(place)
            if place[2] not in told:
                names.add(f"{name if place[1] == 'p' else place[1]} {place[2]:g}")
    return BaseDropout(places, sorted(names))


def _drops(holder: Any) -> Iterator[tuple[Any, str, float]]:
    """The attributes of a module or a configuration that are shares to be dropped."""
    for attribute, value in vars(holder).items():
        is_one = "drop" in attribute or (attribute == "p" and isinstance(holder, nn.Dropout))
        if is_one and isinstance(value, float) and value > 0:
            yield holder, attribute, value


def _configs(modules: Iterable[nn.Module]) -> list[PretrainedConfig]:
    """Every configuration that a module holds, and those inside of them, each once."""
    found: dict[int, PretrainedConfig] = {}
    waiting: list[Any] = [getattr(module, "config", None) for module in modules]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()
    return list(found.values())


def _take_keys(layer: nn.Module, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a child of a decoder layer runs: the layer's keys are those of the call's own layout.

    transformers checkpoints a layer's forward, inside of the layer's own hooks: in the recomputation, which runs when
    another pass has set other keys, only hooks of its children run again. The attention child gets the layout.
    """
    if (layout := kwargs.get("layout")) is not None:
        set_keys(layer, layout.keys)


def _keyed_like(
    dropout: nn.Dropout,
    name: str,
    dtype: torch.dtype,
    table: Callable[..., Tensor],
) -> KeyedDropout:
    ours = KeyedDropout(dropout.p, name.removeprefix("base_model.model."), dtype, table)
    return ours.train(dropout.training)


def _dropouts(module: nn.Module) -> Iterator[KeyedDropout]:
    return (part for part in module.modules() if isinstance(part, KeyedDropout))


def _multiplier(name: str) -> int:
    """An odd multiplier of 64 bits, as the int64 that torch takes; the same in every process."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) | 1


def _split_mix(state: NDArray[np.uint64], index: NDArray[Any]) -> NDArray[np.uint64]:
    """Output number `index` of the generator SplitMix64 (Steele, Lea and Flood 2014) that starts at `state`."""
    z = state + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
