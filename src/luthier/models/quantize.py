"""Linear layers in 8 or 4 bits: how they are loaded, what they compute, what they weigh. bitsandbytes stores them.

They compute x · Wᵀ with the dequantised W, which is never kept, and exactly the gradient of that; in training, in
evaluation and for answers alike. bitsandbytes' own functions are others. LLM.int8 rounds activations and picks outlier
columns over all tokens of a pass, so that a row depends on its neighbours, and its backward is not its gradient. NF4 in
eval mode repacks the weights in place on a CPU with AVX512-BF16, and what it unpacks afterwards is no longer the same.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig

from luthier.errors import ModelError
from luthier.models.weights import DTYPES, name_of
from luthier.sections import Quantization, Recipe


def quantization(value: Literal["none", "int8", "nf4"] | Quantization | None) -> Quantization | None:
    """What `model.quantize` says, spelt out; None for no quantisation."""
    if value is None or value == "none":
        return None
    return value if isinstance(value, Quantization) else Quantization(kind=value)


def check_installed(what: str) -> None:
    """Errors: ModelError where bitsandbytes, which `what` needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"{what} needs bitsandbytes, which is not installed: pip install luthier[quant]")


def check_extras(recipe: Recipe) -> None:
    """Errors: ModelError where a recipe asks for what is not installed."""
    for key, asked in (("model.quantize", recipe.model.quantize), ("generate.quantize", recipe.generate.quantize)):
        if found := quantization(asked):
            check_installed(f"{key}: {found.kind}")
    if recipe.train.optimizer != "adamw":
        check_installed(f"train.optimizer: {recipe.train.optimizer}")


def arithmetic(asked: Quantization, device: torch.device) -> torch.dtype | None:
    """What the layers compute in; None: in what the other weights do. Errors: ModelError where a GPU has no bf16."""
    if asked.compute_dtype == "auto":
        return None
    if asked.compute_dtype == "fp16" and device.type == "cpu":
        return torch.bfloat16
    if asked.compute_dtype == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise ModelError(f"quantize.compute_dtype: bf16: {name} cannot compute in it; take fp16 or fp32")
    return DTYPES[asked.compute_dtype]


def described(asked: Quantization, device: torch.device) -> str:
    """One line: "linear layers in nf4, double quantisation, computed in bf16; the head is not quantised"."""
    own = arithmetic(asked, device)
    computed = f"computed in {name_of(own)}" if own else "computed as the rest of the model"
    why = (
        " (fp16 as the recipe says, but a CPU computes in bf16)" if own and name_of(own) != asked.compute_dtype else ""
    )
    double = ", double quantisation" if asked.kind == "nf4" and asked.double_quant else ""
    return f"linear layers in {asked.kind}{double}, {computed}{why}; the head is not quantised"


def loading(asked: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """For `from_pretrained`, which quantises tensor by tensor; transformers leaves the head (or its twin) as it is."""
    if asked.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=asked.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def settle(model: Any, dtype: torch.dtype | None) -> None:
    """Right after loading: from here on the quantised layers compute as this module says, in `dtype` (`arithmetic`)."""
    model.luthier_arithmetic = dtype  # for the engine's proof: how much rounding is to be expected
    for module in model.modules():
        if is_quantised(module):
            module.support_avx512bf16_for_cpu = False  # nobody's call of bitsandbytes' own forward repacks them either
            module.forward = partial(_linear, module, dtype)
            module.luthier_dtype, module.luthier_weight = dtype, partial(dequantised, module)  # for engine/lora.py


def is_quantised(module: nn.Module) -> bool:
    """Is it a layer of bitsandbytes'? (PEFT's layer around one is not, though it shows its weight.)"""
    weight = module._parameters.get("weight")
    return weight is not None and format_of(weight) in ("int8", "nf4")


def dequantised(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight that a quantised layer stands for: [out, in], new memory. NF4 is rounded to the loading format first,
    as bitsandbytes does it."""
    weight = module.weight
    if format_of(weight) == "int8":
        return torch.mul(weight.data, (weight.SCB / 127).unsqueeze(1)).to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if state.shape[1] % state.blocksize:  # a block goes on in the next row: bitsandbytes' CPU kernel forgets that
        flat = copy.copy(state)
        flat.shape = (1, math.prod(state.shape))
        return dequantize_4bit(weight.data, flat).view(state.shape).to(dtype)  # type: ignore[no-any-return]
    return dequantize_4bit(weight.data, state).to(dtype)  # type: ignore[no-any-return]


def _linear(module: Any, dtype: torch.dtype | None, x: Tensor) -> Tensor:
    """A quantised layer's forward. `dtype` None: that of x, or of autocast."""
    if dtype is not None:
        return _product(x, module, dtype).to(x.dtype)
    cast = torch.is_autocast_enabled(x.device.type)
    return _product(x, module, torch.get_autocast_dtype(x.device.type) if cast else x.dtype)


def _product(x: Tensor, module: Any, dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _Product.apply(x, module, dtype)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    """x · Wᵀ + b in `dtype`. W is dequantised for the forward and again for the backward: only the layer is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any, dtype: torch.dtype) -> Tensor:
        ctx.module, ctx.dtype, ctx.given = module, dtype, x.dtype
        bias = None if module.bias is None else module.bias.to(dtype)
        return F.linear(x.to(dtype), dequantised(module, dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (gradient.to(ctx.dtype) @ dequantised(ctx.module, ctx.dtype)).to(ctx.given), None, None


# -- what they weigh ---------------------------------------------------------------------------------------------------


def format_of(parameter: Tensor) -> str:
    """nf4, int8, or the name of its number format."""
    if hasattr(parameter, "quant_state"):
        return "nf4"
    return "int8" if hasattr(parameter, "SCB") else name_of(parameter.dtype)


def numbers(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: 4 bits are stored by twos."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def bytes_of(parameters: list[nn.Parameter]) -> int:
    """Of all these, with the scales of those that are quantised, each tensor counted once."""
    tensors = [part for parameter in parameters for part in (parameter, *_scales(parameter))]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _scales(parameter: Any) -> list[Tensor]:
    """What dequantising takes beside the stored numbers: rows' or blocks' scales, and the tables of the codes."""
    if format_of(parameter) == "int8":
        return [parameter.SCB]
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    second = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *second]


def let_go(model: nn.Module) -> None:
    """Free the memory of a model's weights, whoever still holds it."""
    for module in cast(Iterable[Any], model.modules()):
        if is_quantised(module):
            module.weight = module.quant_state = None  # bitsandbytes' parameters cannot be moved to "meta"
    model.to("meta")


def widen(model: nn.Module) -> None:
    """Every floating number to fp32; the quantised weights stay as they are."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
