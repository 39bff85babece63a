"""A tuned model at part of its strength: every weight goes the fraction s of its way, W + s·(W′ − W).

s = 0 is the base, 1 the tuned model, above 1 goes on in the same direction. What trains and is no weight of the base's
layers (a soft prompt) has no way to go: nothing lies between virtual tokens and none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from luthier.errors import ModelError, RecipeError
from luthier.models.adapters import adapter_off
from luthier.models.zero_attention import ZeroAttention

MOST = 2.0
"""Beyond it a tuned model is far outside of what was trained: answers fall apart long before."""
ADAPTER = "default"
SUMS = (True, False, "gaussian", "orthogonal", "eva")
"""LoRA's beginnings that leave the base's own weights alone: base + adapter is a sum, and the base is the base."""


def strength_of(value: object) -> float:
    """A strength as a user gives it. Errors: RecipeError for what is no number from 0 to 2."""
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not 0 <= number <= MOST:
        raise RecipeError(f"--strength {value}: it is a number from 0 (the base) over 1 (as trained) to {MOST:g}")
    return number


@contextmanager
def at_strength(model: PeftModel, strength: float) -> Iterator[PeftModel]:
    """The adapted model inside the block at `strength`; behind it, it is as it was, to the last bit.

    At 1 nothing is touched, at 0 the adapter is off, so that both are exactly what they are elsewhere.
    Errors: ModelError where the adapter is not one of layers.
    """
    check_scales(model)
    with adapter_off(model) if strength == 0 else set_strength(model, strength):
        yield model


def set_strength(model: PeftModel, strength: float) -> ExitStack:
    """The adapted model at `strength` from now on; to close what is given undoes it.

    A LoRA layer has its factor scaled, a LLaMA-Adapter its gate. Any other kind of PEFT's layers (DoRA, IA3, LoHa,
    bottlenecks …) gives base + s·(adapted − base), which for a linear layer is the same weights. Biases and copies that
    train go the fraction of their way.
    """
    undo = ExitStack()
    if strength != 1:
        for put in (_scale_layers, _scale_copies, _scale_biases):
            put(model, strength, undo.callback)
    return undo


def check_scales(model: PeftModel) -> None:
    """Errors: ModelError where the adapter has no strength: it changes no layer, or moved the base's own weights."""
    config = model.peft_config[ADAPTER]
    if getattr(config, "init_lora_weights", True) not in SUMS:
        raise ModelError(f"strength: an adapter that began as {config.init_lora_weights} moved the base's own weights")
    if not any(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in model.modules()):
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
        raise ModelError(f"strength: a {kind} adapter changes no layer's weights; there is nothing to scale")


def check_kind(kind: str) -> None:
    """Errors: RecipeError for a method without a strength, before anything is loaded."""
    if kind in ("prompt", "prefix", "p_tuning"):
        raise RecipeError(
            f"strength: {kind} trains virtual tokens, and the model sees them or does not: nothing lies between base "
            "and tuned; a kind that trains layers (lora, ia3, bottleneck, full) has a strength"
        )


Undo = Callable[[Callable[[], None]], object]


def _scale_layers(model: nn.Module, strength: float, undo: Undo) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            before = module.scaling[ADAPTER]
            undo(partial(module.scaling.__setitem__, ADAPTER, before))
            module.scaling[ADAPTER] = before * strength
        elif isinstance(module, ZeroAttention):
            gate = module.zero_attention_gate[ADAPTER]
            _move(gate, torch.zeros_like(gate), strength, undo)
        elif isinstance(module, BaseTunerLayer):
            undo(module.register_forward_hook(partial(_towards_base, strength), with_kwargs=True).remove)


def _towards_base(strength: float, layer: Any, given: Any, options: Any, adapted: Tensor) -> Tensor:
    """A forward hook: what a layer gives, the fraction of its way from what its base gives."""
    base: Tensor = layer.base_layer(*given, **options)
    return base + strength * (adapted - base)


def _scale_copies(model: nn.Module, strength: float, undo: Undo) -> None:
    """modules_to_save: PEFT keeps the base's own module beside the one that trained."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            originals = dict(module.original_module.named_parameters())
            for name, trained in module.modules_to_save[ADAPTER].named_parameters():
                _move(trained, originals[name].data, strength, undo)


def _scale_biases(model: nn.Module, strength: float, undo: Undo) -> None:
    """method.bias: PEFT trains the base's biases in place; `adapters` keeps what they were."""
    originals: dict[str, Tensor] = getattr(model, "luthier_biases", {})
    parameters = dict(model.named_parameters())
    for name, original in originals.items():
        _move(parameters[name], original, strength, undo)


def _move(parameter: nn.Parameter, base: Tensor, strength: float, undo: Undo) -> None:
    undo(partial(setattr, parameter, "data", parameter.data))
    parameter.data = part_way(base.to(parameter.device), parameter.data, strength)


# -- whole models ----------------------------------------------------------------------------------------------------


def part_way(base: Tensor, tuned: Tensor, strength: float) -> Tensor:
    """base + s·(tuned − base) in fp32, rounded once to the tuned one's format; at 1 the tuned tensor itself."""
    if strength == 1 or not tuned.is_floating_point():
        return tuned
    return (base.float() + strength * (tuned.float() - base.float())).to(tuned.dtype)


def differing(base: nn.Module, tuned: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(base, tuned) of every weight that full fine-tuning moved, by name, on the CPU.

    Errors: ModelError where the two are not one model before and after.
    """
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    if not all(value.is_floating_point() for value in before.values()):
        raise ModelError("strength: nothing lies between quantised weights; set generate.quantize: none")
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        raise ModelError("strength: base and tuned model have other weights; nothing lies between them")
    pairs = ((name, before[name].data.cpu(), after[name].data.cpu()) for name in before)
    return {name: (one.clone(), other.clone()) for name, one, other in pairs if not torch.equal(one, other.to(one))}


def set_whole(model: nn.Module, moved: dict[str, tuple[Tensor, Tensor]], strength: float) -> None:
    """A model that trained whole at `strength` from now on: `moved` is `differing`'s, `model` at any strength."""
    parameters = dict(model.named_parameters())
    for name, (base, tuned) in moved.items():
        parameter = parameters[name]
        parameter.data = (base if strength == 0 else part_way(base, tuned, strength)).to(parameter)
