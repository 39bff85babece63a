"""PiSSA and OLoRA: LoRA whose A and B start as parts of the weight itself, y = W·x + s·(B·A − B₀·A₀)·x.

PEFT takes s·B₀·A₀ off the base's weights. Here it is taken off in the forward pass: the base stays what it is, in bf16
without a digit lost and in 8 or 4 bits too; switched off it is the base; and the difference, a LoRA of twice the rank
([B, −B₀] and [A; A₀]), is what is saved, so that the folder fits the base as it was downloaded.

Shapes: O rows and D columns of a weight, r the rank. Sources: Meng et al. 2024 (PiSSA), Büyükakyüz 2024 (OLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.errors import ModelError
from luthier.models import quantize

ITERATIONS = 8
"""Of the subspace that holds the largest singular vectors; 4 to 16 in PiSSA's own fast version."""
SPARE = 8
"""Columns of that subspace beside 2 r: what is not needed, but makes it settle."""


def begin(model: PeftModel, kind: str) -> None:
    """Give every A and B of a fresh LoRA their start. Draws numbers from torch's generator of the CPU.

    Errors: ModelError where a layer is no linear one, or the rank is above that of a weight.
    """
    for name, layer in _layers(model).items():
        at = name.removeprefix("base_model.model.")
        if "default" not in layer.lora_A:
            raise ModelError(f"target: {at}: {kind} starts from a linear layer's weight; take lora for embeddings")
        a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        r = len(a)
        if r > min(b.shape[0], a.shape[1]):
            raise ModelError(
                f"method.r: {r} is more than a weight of {at} has parts ({min(b.shape[0], a.shape[1])}); lower it"
            )
        if not a.is_meta:
            weight = _weight(layer).to(a.device)
            first_b, first_a = _largest(weight, r, scale) if kind == "pissa" else _first_columns(weight, r)
            with torch.no_grad():
                a.copy_(first_a)
                b.copy_(first_b)
        layer.luthier_start_a = a.luthier_start = a.detach().clone()  # `recall` goes by the parameter
        layer.luthier_start_b = b.luthier_start = b.detach().clone()
        layer.lora_variant["default"] = _FromStart()


def as_lora(model: PeftModel, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """What was trained as a LoRA of the base itself: every A becomes [A; A₀], every B [B, −B₀]. Nothing elsewhere."""
    begun = _begun(model)
    for name, layer in begun.items():
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[a] = torch.cat((tensors[a], layer.luthier_start_a.to(tensors[a])))
        tensors[b] = torch.cat((tensors[b], -layer.luthier_start_b.to(tensors[b])), dim=1)
    if begun:
        config["r"], config["lora_alpha"] = 2 * config["r"], 2 * config["lora_alpha"]


def as_trained(model: PeftModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `as_lora` made, taken back for the model that trains: the half that is not its start."""
    found = dict(tensors)
    for name, layer in _begun(model).items():
        a, b, r = f"{name}.lora_A.weight", f"{name}.lora_B.weight", len(layer.luthier_start_a)
        if a in found and b in found and len(found[a]) == 2 * r == found[b].shape[1]:
            found[a], found[b] = found[a][:r], found[b][:, :r]
    return found


def recall(parameters: Mapping[str, nn.Parameter], file: Path) -> None:
    """Put back where the trainable parameters, by name, started, out of the tensors that `as_lora` made of them.

    A run that goes on must: a decomposition that is computed anew, on another processor or with another number of
    threads, differs in its last bits, and at times in its signs. Errors: OSError, SafetensorError, KeyError, ValueError
    where the file is damaged or does not fit.
    """
    begun = {name: value.luthier_start for name, value in parameters.items() if hasattr(value, "luthier_start")}
    tensors = load_file(file) if begun else {}
    for name, start in begun.items():
        stored = tensors[name.replace(".default.", ".")]
        half = stored[len(start) :] if ".lora_A." in name else -stored[:, start.shape[1] :]
        if half.shape != start.shape:
            raise ValueError(f"{name} started from {list(half.shape)} there and from {list(start.shape)} in the model")
        start.copy_(half)


class _FromStart(LoraVariant):  # type: ignore[misc]
    """A layer's forward; PEFT hands x in the adapter's format, and rounds the result to the base's."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        now = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        start = F.linear(F.linear(x, module.luthier_start_a), module.luthier_start_b)
        return result + (now - start) * module.scaling[active_adapter]  # type: ignore[no-any-return]


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _begun(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in _layers(model).items() if hasattr(layer, "luthier_start_a")}


def _weight(layer: Any) -> Tensor:
    """[O, D] in fp32."""
    base = layer.get_base_layer()
    if quantize.is_quantised(base):
        return quantize.dequantised(base, torch.float32)
    weight: Tensor = base.weight.detach().float()
    return weight.t() if layer.fan_in_fan_out else weight


def _largest(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """B [O, r] and A [r, D] with s·B·A = the r largest parts of W's singular value decomposition, shared evenly."""
    width = min(2 * r + SPARE, *weight.shape)
    subspace = weight @ torch.randn(weight.shape[1], width).to(weight)
    for _ in range(ITERATIONS):
        subspace = weight @ torch.linalg.qr(weight.t() @ torch.linalg.qr(subspace).Q).Q
    subspace = torch.linalg.qr(subspace).Q
    u, sizes, v = torch.linalg.svd(subspace.t() @ weight, full_matrices=False)
    roots = (sizes[:r] / scale).sqrt()
    return (subspace @ u[:, :r]) * roots, roots[:, None] * v[:r]


def _first_columns(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B [O, r] orthonormal and A [r, D]: the first of W = Q·R, as PEFT's OLoRA takes them."""
    q, upper = torch.linalg.qr(weight)
    return q[:, :r], upper[:r]
