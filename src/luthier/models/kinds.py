"""A recipe's method as PEFT's configuration: of every kind that adapts layers of the model by PEFT's own classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
)
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.lora import dora
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.methods import LOW_RANK
from luthier.models import quantize
from luthier.models.fused import unfused
from luthier.models.targets import factors, is_transposed, norms, targets
from luthier.sections import MethodSection

_PEFTS_OWN = dora.dequantize_module_weight


def config_of(model: PreTrainedModel, method: MethodSection) -> tuple[PeftConfig, list[str]]:
    """PEFT's configuration, and the names of the layers as the user knows them. Errors: ModelError (`targets`)."""
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "modules_to_save": method.modules_to_save or None}
    if method.kind == "ln_tuning":
        named = norms(model)
        return LNTuningConfig(target_modules=named, **common), named
    if method.kind == "ia3":
        named, ends = factors(model, method)
        flag = is_transposed(model, named)
        return IA3Config(target_modules=named, feedforward_modules=ends, fan_in_fan_out=flag, **common), named
    named = targets(model, method)
    common["target_modules"] = unfused(model, named)
    if method.kind in LOW_RANK:
        return _lora(model, method, named, common), named
    alpha = _plain(method.alpha)
    transposed = is_transposed(model, named)
    match method.kind:
        case "adalora":  # its rank stays: what would take ranks away, and what keeps A and B orthogonal for that,
            # runs in PEFT's own training alone (the latter as a part of transformers' loss, which is the reference)
            sizes = {
                "init_r": method.r,
                "target_r": method.r,
                "r": method.r,
                "lora_alpha": alpha,
                "total_step": 1,
                "orth_reg_weight": 0.0,
            }
            return AdaLoraConfig(**sizes, fan_in_fan_out=transposed, **common), named
        case "vera":
            return VeraConfig(r=method.r, fan_in_fan_out=transposed, **common), named
        case "oft":
            return OFTConfig(fan_in_fan_out=transposed, **common), named
        case "boft":
            return BOFTConfig(fan_in_fan_out=transposed, **common), named
        case "loha":
            return LoHaConfig(r=method.r, alpha=alpha, **common), named
        case "lokr":
            return LoKrConfig(r=method.r, alpha=alpha, **common), named
    raise AssertionError(method.kind)


def _lora(model: PreTrainedModel, method: MethodSection, named: Sequence[str], common: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        r=method.r,
        lora_alpha=_plain(method.alpha),
        lora_dropout=method.dropout,
        bias=method.bias,
        use_dora=method.kind == "dora",
        use_rslora=method.kind == "rslora",
        fan_in_fan_out=is_transposed(model, named),
        **common,
    )


def _plain(alpha: float) -> Any:
    return int(alpha) if alpha == int(alpha) else alpha


def _dequantised(module: Any) -> Tensor:
    """The weight that DoRA takes its magnitudes from, in fp32, or at first they were a bf16 rounding off.

    Of a layer in int8 PEFT's own way loses the scales on a CPU.
    """
    if not quantize.is_quantised(module):
        weight: Tensor = _PEFTS_OWN(module)
        return weight.float()
    if module.weight.is_meta:
        return torch.empty(module.out_features, module.in_features, device="meta")
    return quantize.dequantised(module, torch.float32)


dora.dequantize_module_weight = _dequantised


def settle(adapted: PeftModel) -> None:
    """Right after PEFT has put its layers in: what it leaves to chance in some kinds, over a base in 16 bits.

    Over quantised layers IA3 hands on fp32, and AdaLoRA gives back fp32: both are rounded to what the model computes
    in, so that IA3 begins as the base exactly. AdaLoRA's count of ranks is no parameter that anybody wants to train.
    """
    dtype = adapted.get_base_model().dtype
    for module in adapted.modules():
        if isinstance(module, IA3Layer) and quantize.is_quantised(module.get_base_layer()):
            module.get_base_layer().register_forward_pre_hook(partial(_rounded, dtype))
        if isinstance(module, AdaLoraLayer):
            module.ranknum.requires_grad_(False)
            if quantize.is_quantised(module.get_base_layer()):
                module.register_forward_hook(_as_given)


def _rounded(dtype: torch.dtype, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(dtype), *args[1:])


def _as_given(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
    return result.to(args[0].dtype)
