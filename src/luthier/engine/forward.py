"""A pass → the summed loss of its supervised tokens: one module, head included, which is what several processes wrap.

Shapes: B rows, L places, S supervised places, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from luthier.data.pack import Pass
from luthier.engine import attention, dropout
from luthier.engine.attention import CannotPackError, Layout
from luthier.engine.loss import Head, head_of, summed_cross_entropy
from luthier.engine.soft import prefix_of, prompts_of, virtual_of
from luthier.errors import ModelError

Route = Literal["engine", "own_logits", "plain"]
"""engine: packed passes, the head chunk by chunk; own_logits: packed, the logits by transformers itself (where they are
more than the head's output scaled and capped); plain: padded passes through transformers, the engine's twin."""


@dataclass(frozen=True)
class DevicePass:
    """A pass where the model is. ids, positions, mask: [B, L]; supervised: [S] places in B · L; targets: [S] ids;
    weights: fp32 [S], None for 1 each. Virtual tokens, where the model has any, are in it (`data.pack.behind`)."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    supervised: Tensor
    targets: Tensor
    weights: Tensor | None
    layout: Layout


def on_device(
    pass_: Pass, device: torch.device, seed: int | None = None, step: int = 0, fast_attention: bool = True
) -> DevicePass:
    """Move a pass; the device is never waited for.

    `seed`: that of the dropout, whose masks belong to `step`; None where there is none.
    """

    def moved(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    keys = None
    if seed is not None:
        keys = moved(dropout.token_keys(seed, step, pass_.ids, pass_.positions, pass_.segments).reshape(-1))
    return DevicePass(
        ids=moved(pass_.ids),
        positions=moved(pass_.positions),
        mask=moved(pass_.mask),
        supervised=moved(pass_.places),
        targets=moved(pass_.targets),
        weights=None if pass_.weights is None else moved(pass_.weights),
        layout=Layout(pass_.segments, keys, fast_attention),
    )


def base_of(model: Any) -> Any:
    """The transformers model inside a PeftModel, its adapters in place; any other model is its own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class SummedLoss(nn.Module):
    """Sum of the cross entropy over the supervised tokens of a pass: a fp32 scalar.

    `model` is a transformers causal model or a PeftModel around one. A packed pass needs the route "engine" or
    "own_logits"; a padded one goes any of the three.
    """

    def __init__(self, model: Any, route: Route) -> None:
        super().__init__()
        self.model, self.route = model, route

    def forward(self, pass_: DevicePass) -> Tensor:
        base = base_of(self.model)
        head = head_of(base)
        # For what gets no Layout: layers outside the decoder's, a padded pass through a model that takes no such
        # argument. Each backward pass, which computes again, follows its own forward pass.
        dropout.set_keys(self.model, pass_.layout.keys)
        keys = None if pass_.layout.keys is None else pass_.layout.keys[pass_.supervised]
        if self.route == "engine":
            hidden = base.get_decoder()(**inputs_of(self.model, pass_)).last_hidden_state  # [B, L, D]
            chosen = hidden.flatten(0, 1).index_select(0, pass_.supervised)
            return summed_cross_entropy(chosen, pass_.targets, head, keys, pass_.weights)
        losses = F.cross_entropy(own_logits(self.model, head, pass_).float(), pass_.targets, reduction="none")
        return (losses if pass_.weights is None else losses * pass_.weights).sum()


def inputs(pass_: DevicePass) -> dict[str, Any]:
    """A pass as transformers takes it. A packed one carries a 4-D mask without content: such a mask is handed on as
    it is, where none at all would be made up from the positions, as a square of the whole pass."""
    packed = bool(pass_.layout.segments)
    return {
        "input_ids": pass_.ids,
        "attention_mask": pass_.mask.new_empty(1, 1, 1, 0) if packed else pass_.mask,
        "position_ids": pass_.positions,
        "use_cache": False,
        **({"layout": pass_.layout} if packed else {}),
    }


def inputs_of(model: Any, pass_: DevicePass) -> dict[str, Any]:
    """The same as the base of `model` takes it, its virtual tokens filled in; behind a prefix its attention must take a
    Layout (`adopt`), packed or not."""
    given, virtual = inputs(pass_), virtual_of(model)
    if virtual.columns:
        embedded = base_of(model).get_input_embeddings()(given.pop("input_ids")[:, virtual.tokens :])
        prompts = prompts_of(model).to(embedded.dtype).expand(len(embedded), -1, -1)
        given["inputs_embeds"] = torch.cat((prompts, embedded), dim=1)
    elif virtual.tokens:
        given["layout"] = replace(pass_.layout, prefix=prefix_of(model))
    return given


def own_logits(model: Any, head: Head, pass_: DevicePass) -> Tensor:
    """The logits of the supervised places as transformers computes them: [S, V], with a gradient."""
    base = base_of(model)
    if pass_.layout.segments:
        if pass_.layout.keys is not None:
            dropout.set_keys(head.module, pass_.layout.keys[pass_.supervised])
        logits = base(**inputs_of(model, pass_), logits_to_keep=pass_.supervised).logits
        return logits.flatten(0, 1)  # type: ignore[no-any-return]
    virtual = virtual_of(model)
    if virtual.tokens and not virtual.columns and base.config._attn_implementation != attention.NAME:
        if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
            raise ModelError(
                "prefix tuning of padded rows is PEFT's own, which cannot compute activations again: set "
                "train.activation_checkpointing: false, or leave engine.packed on"
            )
        out = model(input_ids=pass_.ids, attention_mask=pass_.mask, use_cache=True)
    else:
        out = base(**inputs_of(model, pass_))
    return out.logits.flatten(0, 1)[pass_.supervised]  # type: ignore[no-any-return]


def adopt(model: Any) -> None:
    """Let the model's attention take a Layout. Errors: CannotPackError where it has no such interface."""
    base = base_of(model)
    if not base._can_set_attn_implementation():
        raise CannotPackError(f"{type(base).__name__} has an attention of its own")
    base.set_attn_implementation(attention.register())


def rotary_border(model: Any) -> int | None:
    """Tokens above which a row's rotary frequencies are others, chosen by the longest row of a pass (longrope).

    Rows on either side of it share no pass. Virtual tokens count as tokens of each row. ("dynamic" scaling looks at the
    longest row as well, but acts only on rows beyond the model's window, which are refused.)
    """
    config = base_of(model).config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if isinstance(rope, dict)]
    borders = {int(r["original_max_position_embeddings"]) for r in kinds if r.get("rope_type") == "longrope"}
    return min(borders) - virtual_of(model).tokens if borders else None
