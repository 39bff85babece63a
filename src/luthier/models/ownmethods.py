"""What PEFT does not have becomes a PEFT method: registered by its name, placed by what a model's layers compute.

From then on `get_peft_model`, `disable_adapter`, `add_adapter`, `save_pretrained` and `PeftModel.from_pretrained` know
it as any other. A process that has not imported the method's module cannot open its folder: plain PEFT ends with a
KeyError on its peft_type.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.utils import PeftType, register_peft_method
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from luthier.errors import ModelError


def register(name: str, config: type, tuner: type) -> None:
    """Make `name` a method of PEFT's; its peft_type is the name in capitals. May be called again.

    PEFT registers only names of its enumeration PeftType, which is closed: the member is added by hand, as enum itself
    does it.
    """
    title = name.upper()
    if title in PeftType.__members__:
        return
    kind: Any = PeftType
    member = str.__new__(kind, title)
    member._name_ = member._value_ = title
    kind._member_names_.append(title)
    kind._member_map_[title] = kind._value2member_map_[title] = member
    type.__setattr__(kind, title, member)
    register_peft_method(name=name, config_cls=config, model_cls=tuner)


def decoder_layers(model: PreTrainedModel, kind: str) -> dict[str, nn.Module]:
    """The model's decoder layers by their names. Errors: ModelError where transformers marks none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = set(decoder.modules())
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and module in inside
    }
    if not layers:
        raise refused(model, kind, "it has no decoder layers that can be told apart")
    return layers


def refused(model: PreTrainedModel, kind: str, why: str) -> ModelError:
    """The error for a model that a method cannot change."""
    return ModelError(f"method.kind: {kind} does not fit this {model.config.model_type} model: {why}; take lora")


def shortest(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The modules as PEFT's target_modules name them: by their last names where no other module is called so."""
    wanted = list(names)
    last = {name.rpartition(".")[2] for name in wanted}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last) if matched == set(wanted) else wanted
