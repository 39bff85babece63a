"""`target: [query_key_value]` on a GLM: its vendor's one projection, of which transformers makes three layers.

An adapter on the vendor's layer has one A, and its B has the rows of query, key and value. So PEFT adapts the three
layers, and then they share an A and its dropout: the same function with the same number of parameters. On disk it is
a plain PEFT folder, with A three times; `export.py` writes the vendor's form of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from luthier.errors import ModelError

FUSED = "query_key_value"
PARTS = ("q_proj", "k_proj", "v_proj")
"""In the order of the vendor's rows."""


def fused_names(model: PreTrainedModel) -> list[str]:
    """Where query_key_value would be in a GLM, as model.layers.0.self_attn.query_key_value; none in other models."""
    layers = [name for name, _ in model.named_modules() if name.endswith(f".{PARTS[0]}")]
    return [name.removesuffix(PARTS[0]) + FUSED for name in layers if model.config.model_type == "glm"]


def unfused(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """The layers that PEFT adapts: query_key_value is its three parts. Errors: ModelError where both are named.

    (Falcon has a layer of that name.)
    """
    if not fused_names(model):
        return list(targets)
    parts = [part for name in targets if _is_fused(name) for part in _parts(name)]
    for name in targets:
        if any(_matches(part, [name]) or _matches(name, [part]) for part in parts):
            raise ModelError(f"target: {FUSED} contains {name}; name one or the other")
    return [*(name for name in targets if not _is_fused(name)), *parts]


def tie(adapted: PeftModel, targets: Sequence[str]) -> None:
    """Let k_proj and v_proj use q_proj's A and dropout wherever the targets say query_key_value."""
    base: Any = adapted.get_base_model()
    for name in fused_names(base):
        if _matches(name, targets):
            query, *others = [base.get_submodule(part) for part in _parts(name)]
            for other in others:
                other.lora_A["default"] = query.lora_A["default"]
                other.lora_dropout["default"] = query.lora_dropout["default"]


def difference(model: PreTrainedModel, targets: Sequence[str], r: int) -> str | None:
    """What one A for q, k and v comes to against three, for the user; None where the targets are neither."""
    one = three = fused = 0
    for name in fused_names(model):
        query, key, value = (model.get_submodule(part) for part in _parts(name))
        if not (_matches(name, targets) or all(_matches(part, targets) for part in _parts(name))):
            continue
        fused += _matches(name, targets)
        rows = query.out_features + key.out_features + value.out_features
        one += r * (query.in_features + rows)
        three += r * (3 * query.in_features + rows)
    if not one:
        return None
    if fused:
        return (
            f"{FUSED}: q_proj, k_proj and v_proj share one A, {one:,} parameters; "
            f"target: [{', '.join(PARTS)}] has an A for each, {three:,}"
        )
    return (
        f"q_proj, k_proj and v_proj have an A each, {three:,} parameters; target: [{FUSED}], "
        f"the vendor's one projection, has one for the three, {one:,}"
    )


def _parts(name: str) -> list[str]:
    return [name.removesuffix(FUSED) + part for part in PARTS]


def _is_fused(name: str) -> bool:
    return f".{name}".endswith(f".{FUSED}")


def _matches(layer: str, targets: Sequence[str]) -> bool:
    return any(f".{layer}".endswith(f".{target}") for target in targets)
