"""A model as a tree, folded where layers repeat: what it is made of, formats, sizes, and where it is adapted."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from luthier.engine.forward import base_of
from luthier.models import quantize
from luthier.words import size


class Node(NamedTuple):
    """A module without its name. facts: format, size and adapter, one a column; children: name and node of each."""

    kind: str
    facts: tuple[str, str, str]
    children: tuple[tuple[str, Node], ...]


def structure(model: Any) -> list[str]:
    """Lines of aligned text; equal children that follow each other are one line, as `28 × GlmDecoderLayer`.

    `model`: transformers' or a PeftModel around it, on any device. A shared weight counts where it comes first.
    """
    base = base_of(model)
    seen: set[int] = set()
    rows = list(_rows("", _node(base, seen), 0))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _node(module: nn.Module, seen: set[int]) -> Node:
    """The tree from this module down."""
    if isinstance(module, BaseTunerLayer):
        return _adapted(module, seen)
    if isinstance(module, ModulesToSaveWrapper):
        inner = _node(module.modules_to_save["default"], seen)
        return inner._replace(facts=(*inner.facts[:2], "trained whole"))
    before = set(seen)
    children = tuple((name, _node(child, seen)) for name, child in module.named_children())
    return Node(_kind(module), _facts(module, before, seen), children)


def _adapted(layer: Any, seen: set[int]) -> Node:
    """The layer that is adapted, of whatever kind PEFT's layer around it is."""
    inner = _node(layer.get_base_layer(), seen)
    added = (getattr(layer, name) for name in layer.adapter_layer_names if hasattr(layer, name))
    extra = {id(parameter): parameter for part in added for parameter in part.parameters()}
    count = sum(parameter.numel() for key, parameter in extra.items() if key not in seen)
    seen |= extra.keys()
    name = f"LoRA r {next(iter(layer.r.values()))}" if isinstance(layer, LoraLayer) else "adapted"
    return inner._replace(facts=(*inner.facts[:2], f"{name}, {count:,} parameters"))


def _facts(module: nn.Module, before: set[int], seen: set[int]) -> tuple[str, str, str]:
    """Format and size of all below that was not counted yet: `before` this module."""
    own = [parameter for parameter in module.parameters() if id(parameter) not in before]
    seen |= {id(parameter) for parameter in own}
    if not own:
        return ("tied" if any(True for _ in module.parameters()) else "", "", "")
    formats = ", ".join(dict.fromkeys(quantize.format_of(parameter) for parameter in own))
    return (formats, size(quantize.bytes_of(own)), "")


def _kind(module: nn.Module) -> str:
    """Class and, of the common layers, sizes: Linear 896 → 4,864 + bias."""
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        bias = " + bias" if module.bias is not None else ""
        return f"{name} {module.in_features:,} → {module.out_features:,}{bias}"
    if isinstance(module, nn.Embedding):
        return f"{name} {module.num_embeddings:,} × {module.embedding_dim:,}"
    return name


def _rows(name: str, node: Node, depth: int) -> Any:
    yield ("  " * depth + f"{name}  {node.kind}".strip(), *node.facts)
    for _, group in groupby(node.children, key=lambda child: (child[1], child[0].isdigit())):
        same = list(group)
        first, child = same[0]
        if len(same) > 1 and first.isdigit():
            repeated = child._replace(kind=f"{len(same)} × {child.kind}", facts=_each(child.facts))
            yield from _rows("", repeated, depth + 1)
        else:
            for each, node_of in same:
                yield from _rows(each, node_of, depth + 1)


def _each(facts: tuple[str, str, str]) -> tuple[str, str, str]:
    return (facts[0], f"{facts[1]} each" if facts[1] else "", facts[2])
