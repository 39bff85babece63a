"""Which layers of a model a method changes: by the names that a recipe gives, or by what they compute."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from luthier.errors import ModelError
from luthier.models import quantize
from luthier.models.fused import fused_names, unfused
from luthier.models.ownmethods import decoder_layers
from luthier.sections import MethodSection

KEYS_AND_VALUES = re.compile(r"(k|v|kv|qkv|key|value|key_value|query_key_value)(_proj)?|c_attn|Wqkv")
"""Last names of the layers that make keys or values, alone or with the queries."""


def targets(model: PreTrainedModel, method: MethodSection) -> list[str]:
    """Last names of the layers that get an adapter: the user's, or every linear layer but the head."""
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    body = [name for name, module in linear.items() if module is not model.get_output_embeddings()]
    kind = model.config.model_type
    layers = [name for name, module in model.named_modules() if _is_layer(module)]
    _check_names(method.modules_to_save, "modules_to_save", layers, kind)
    _refuse_quantised(model, method.modules_to_save)
    for name in method.modules_to_save:  # PEFT compares bare endings here: "norm" is "input_layernorm" too
        if more := [layer for layer in layers if layer.endswith(name) and not f".{layer}".endswith(f".{name}")]:
            raise ModelError(
                f"modules_to_save: {name} would take {more[0]} as well; write more of the name, as model.{name}"
            )
    if isinstance(method.target, str) and not body:
        raise ModelError(f"target: this {kind} model has no linear layers beside its head; name layers, or kind: full")
    if isinstance(method.target, str):
        return [name for name in last_names(body) if name not in method.modules_to_save]
    candidates = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D, nn.Embedding))]
    fused = fused_names(model)
    _check_names(method.target, "target", [*candidates, *fused], kind, shown=last_names([*body, *fused]))
    if twice := sorted(set(unfused(model, method.target)) & set(method.modules_to_save)):
        raise ModelError(f"target and modules_to_save both name {', '.join(twice)}; train it one way or the other")
    return list(method.target)


def norms(model: PreTrainedModel) -> list[str]:
    """Last names of the layers that have one number a column, as norms have. Errors: ModelError where there is none."""
    found = [name for name, module in model.named_modules() if _is_layer(module) and _is_norm(module)]
    if not found:
        raise ModelError(f"method.kind: this {model.config.model_type} model has no norms that train; take lora")
    return last_names(found)


def factors(model: PreTrainedModel, method: MethodSection) -> tuple[list[str], list[str]]:
    """What IA3 scales: (all layers' last names, those among them whose input it scales: the feed-forwards' last).

    target auto: PEFT's table where it has the family; else keys, values and the last layer of each feed-forward,
    found by their names and shapes. Errors: ModelError where there are none.
    """
    kind = model.config.model_type
    ends = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind) or _feed_forward_ends(model)
    if method.target != "auto":
        chosen = unfused(model, targets(model, method))
        return chosen, [name for name in chosen if any(f".{name}".endswith(f".{end}") for end in ends)]
    targets(model, method.model_copy(update={"target": "all_linear"}))  # its errors
    chosen = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    if chosen is None:
        linear = [name for name, module in model.named_modules() if is_linear(module)]
        chosen = [*(name for name in last_names(linear) if KEYS_AND_VALUES.fullmatch(name)), *ends]
    if not chosen:
        raise ModelError(f"target: this {kind} model has no keys, values or feed-forwards known by name; name layers")
    return list(chosen), list(ends)


def _feed_forward_ends(model: PreTrainedModel) -> list[str]:
    """Last names of the last linear layer of each feed-forward: beside attention, back to the model's width."""
    width = model.config.get_text_config().hidden_size
    found = [
        name
        for layer in decoder_layers(model, "ia3").values()
        for part, child in layer.named_children()
        if "attn" not in part and "attention" not in part
        for name, module in child.named_modules(prefix=part)
        if is_linear(module) and getattr(module, "out_features", getattr(module, "nf", 0)) == width
    ]
    return last_names(found)


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and not quantize.is_quantised(module)


def is_linear(module: nn.Module) -> bool:
    """Does it give back what a linear layer does? Conv1D is one, stored transposed (GPT-2).

    Some that are called so do not: routers give back tuples, grouped layers other shapes; PEFT would break them.
    """
    if isinstance(module, Conv1D) or quantize.is_quantised(module):
        return True
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    given = torch.linspace(-1, 1, module.in_features).to(module.weight).expand(2, -1)
    try:
        with torch.no_grad():
            found, expected = module(given.clone()), nn.functional.linear(given, module.weight, module.bias)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    alike = isinstance(found, Tensor) and found.shape == expected.shape
    return alike and (found.is_meta or torch.allclose(found, expected, rtol=1e-2))


def is_transposed(model: nn.Module, targets: Sequence[str]) -> bool:
    """Does the first layer that the targets name store its weight transposed? PEFT wants to be told (and is, once)."""
    named = (module for name, module in model.named_modules() if any(f".{name}".endswith(f".{t}") for t in targets))
    first = next(named, None)
    return Conv1D in (type(first), getattr(first, "source_cls", None))  # transformers notes it where it quantises one


def _check_names(
    asked: Sequence[str], field: str, layers: Sequence[str], kind: str, shown: Sequence[str] | None = None
) -> None:
    """Each name must be a layer's, its last part or its last parts, as PEFT matches them."""
    known = shown or last_names(layers)
    for name in asked:
        if any(layer == name or layer.endswith(f".{name}") for layer in layers):
            continue
        close = sorted(difflib.get_close_matches(name, last_names(layers), n=3, cutoff=0.4))
        hint = f"close: {', '.join(close)}; " if close else ""
        kinds = "linear layers" if field == "target" else "layers"
        there = f"its {kinds} are {', '.join(known)}"
        raise ModelError(f"{field}: {name} matches no layer of this {kind} model; {hint}{there}")


def _refuse_quantised(model: PreTrainedModel, saved: Sequence[str]) -> None:
    quantised = [name for name, module in model.named_modules() if quantize.is_quantised(module)]
    for name in saved:
        if layer := next((layer for layer in quantised if f".{layer}".endswith(f".{name}")), None):
            raise ModelError(
                f"modules_to_save: {name}: {layer} is quantised and cannot be trained whole; "
                "give it an adapter (method.target), or set model.quantize: none"
            )


def last_names(layers: Iterable[str]) -> list[str]:
    """The last parts of layers' names, each once."""
    return list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))


def _is_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None
