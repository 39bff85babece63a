"""A pass → the summed loss of its supervised tokens.

Shapes: B rows, L places, S supervised places, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from luthier.data.pack import NO_TARGET, Pass

HEAD_IS_LAST = frozenset({"llama", "qwen2"})
"""Families whose logits are head(decoder(ids)) and nothing else: no scale, no soft cap, no projection."""


@dataclass(frozen=True)
class DevicePass:
    """A pass where the model is. ids, mask, positions: [B, L]; supervised: [S] places in B × L; targets: [S]."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    supervised: Tensor
    targets: Tensor


def on_device(pass_: Pass, device: torch.device) -> DevicePass:
    """Move a pass. The supervised places are found before, so that the device is never waited for."""
    targets = torch.from_numpy(pass_.targets).flatten()
    supervised = (targets != NO_TARGET).nonzero().squeeze(1)
    rows, length = pass_.ids.shape
    return DevicePass(
        ids=torch.from_numpy(pass_.ids).to(device),
        mask=torch.from_numpy(pass_.mask).to(device),
        positions=torch.arange(length, device=device).expand(rows, length),
        supervised=supervised.to(device),
        targets=targets[supervised].to(device),
    )


def base_of(model: Any) -> Any:
    """The transformers model inside a PeftModel, its adapters in place; any other model is its own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def summed_loss(model: Any, pass_: DevicePass) -> Tensor:
    """Sum of the cross entropy over the supervised tokens of a pass: a fp32 scalar.

    `model` is a transformers causal model or a PeftModel around one. Only supervised places meet the vocabulary, in
    HEAD_IS_LAST families; others make all their logits themselves.
    """
    base = base_of(model)
    inputs = {"input_ids": pass_.ids, "attention_mask": pass_.mask, "position_ids": pass_.positions, "use_cache": False}
    if base.config.model_type in HEAD_IS_LAST:
        hidden = base.get_decoder()(**inputs).last_hidden_state  # [B, L, D]
        logits = base.get_output_embeddings()(hidden.flatten(0, 1)[pass_.supervised])  # [S, V]
    else:
        logits = base(**inputs).logits.flatten(0, 1)[pass_.supervised]
    return F.cross_entropy(logits.float(), pass_.targets, reduction="sum")
