"""Families that transformers knows only through code of their vendors: recognised here, loaded and saved natively.

Each is one module with the functions below; a folder belongs to it by the model_type in its config.json.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from luthier.models import chatglm3, yuan2
from luthier.models.weights import Weights

FAMILIES: dict[str, ModuleType] = {"chatglm": chatglm3, "yuan": yuan2}


def family_of(config: dict[str, Any]) -> ModuleType | None:
    """The module for a folder's config.json, None where transformers knows the model itself."""
    return FAMILIES.get(config.get("model_type", ""))


def register() -> None:
    """Let transformers' AutoConfig and AutoModelForCausalLM open the vendors' folders. May be called again."""
    for family in FAMILIES.values():
        family.register()


def check(path: Path, config: dict[str, Any]) -> None:
    """Errors: ModelError where the folder is a variant of its family that is not computed as this one is."""
    if family := family_of(config):
        family.check(path, config)


def settle(model: PreTrainedModel, config: dict[str, Any]) -> None:
    """Right after loading: from here on the model saves itself as `saved_config` says."""
    if family := family_of(config):
        family.settle(model)


def as_model(weights: Weights, config: dict[str, Any]) -> Weights:
    """A folder's tensors by the names and in the shapes of the model that is computed with, still on disk."""
    family = family_of(config)
    named: Weights = family.as_model(weights, config) if family else weights
    return named


def saved_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of a folder that holds the tensors of `as_model`."""
    family = family_of(config)
    saved: dict[str, Any] = family.saved_config(config) if family else config
    return saved


def opened_by(config: dict[str, Any]) -> str | None:
    """What a user must know to open a merged folder, where plain transformers does not do it."""
    family = family_of(config)
    return family.OPENED_BY if family else None
