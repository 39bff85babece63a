"""Causal attention within each segment of a packed pass, registered with transformers under the name "luthier".

The Layout travels as a call argument and in no other way: with activation checkpointing a layer is computed again while
another pass may be current. Without a Layout the function is transformers' own SDPA, and so is its mask: a model in
training configuration generates as any other. (Without a registered mask function, transformers hands no mask to an
implementation that it does not know, and left-padded prompts are answered wrongly: 0.09 in the logits, measured.)

Shapes: B rows, H query heads, K key heads, L places, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from luthier.data.pack import Segment
from luthier.engine.cuda_attention import attend_cuda
from luthier.engine.stretches import attend_by_stretches, stretches

NAME = "luthier"
NOTHING_TO_ATTENTION = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "num_items_in_batch"}
)
"""Keywords that transformers passes along and that change nothing here. Any other is a reason not to pack."""
WHOLE = frozenset({"full_attention", "hybrid"})
"""Kinds of layers that attend to all that came before; a hybrid one has a state of its own besides (Yuan2's filter)."""


class CannotPackError(Exception):
    """The model's attention asks for something that is not honoured segment by segment."""


@dataclass(frozen=True)
class Layout:
    """What a pass is made of. segments: those of a packed pass, () where rows are padded.

    keys: int64 [B · L], what the dropout of each token depends on; None where there is none. fast: by the functions
    made for this, not by a call of SDPA a segment. prefix: keys and values [1, K, P, E] of each layer, which every row
    sees before its own tokens (prefix tuning); in a padded pass, too. prepared: what is worked out from the segments
    once a pass, by the sliding window.
    """

    segments: tuple[Segment, ...]
    keys: Tensor | None = None
    fast: bool = True
    prefix: tuple[tuple[Tensor, Tensor], ...] | None = None
    prepared: dict[int | None, Any] = field(default_factory=dict, compare=False)


class _Asked(NamedTuple):
    """What transformers asks of a layer's attention, as keywords."""

    scaling: float | None
    dropout: float
    sliding_window: int | None
    softcap: float | None
    s_aux: Tensor | None


def register() -> str:
    """Make `attn_implementation="luthier"` known to transformers; gives back the name."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it. query: [B, H, L, E]; key, value: [B, K, L, E]; result: [B, L, H, E].

    With a packed `layout` the mask is not looked at; `sliding_window`, `softcap` and `s_aux` (one attention sink a
    head) are honoured. A function that hangs on the module as `luthier_beside` adds what it makes of the query.
    Errors: CannotPackError for a keyword that is not known, or attention that is not causal.
    """
    asked = _Asked(scaling, dropout, sliding_window, softcap, s_aux)
    if layout is not None and (layout.segments or layout.prefix is not None):
        _refuse_unknown(module, others)
        _refuse_hidden_window(module, sliding_window)
        before = None
        if layout.prefix is not None:
            before = tuple(x.to(key.dtype) for x in layout.prefix[module.layer_idx])  # type: ignore[index]
        if layout.segments:
            out = _packed(query, key, value, layout, before, asked)
        else:
            out = _padded(query, key, value, attention_mask, before or (), asked)
    elif softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    else:
        allowed = _whole(query, key) if attention_mask is None else attention_mask
        out = _scores(query, key, value, allowed, asked).transpose(1, 2).contiguous()
    beside = module.__dict__.get("luthier_beside")
    return out if beside is None else out + beside(query, scaling), None


def _packed(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, before: tuple[Tensor, ...] | None, asked: _Asked
) -> Tensor:
    """A pass of segments. before: keys and values of what every row sees before its first token."""
    fast = layout.fast and asked.s_aux is None and not asked.dropout and value.shape[-1] == query.shape[-1]
    window = asked.sliding_window
    if fast and asked.softcap is None and query.device.type == "cpu":
        if window not in layout.prepared:
            layout.prepared[window] = stretches(layout.segments, window, 0 if before is None else before[0].shape[2])
        if before is not None:
            key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), before, strict=True))
        return attend_by_stretches(query, key, value, layout.prepared[window], asked.scaling)
    if fast and query.device.type == "cuda" and before is None:
        out = attend_cuda(query, key, value, layout.segments, asked.scaling, window, asked.softcap)
        if out is not None:
            return out
    parts = []
    for segment in layout.segments:
        q = query[:, :, segment.start : segment.stop]
        k, v = (_with_ancestors(x, layout.segments, segment) for x in (key, value))
        if before is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))
        parts.append(_by_sdpa(q, k, v, _window(q, k, window), asked))
    return torch.cat(parts, dim=1)  # contiguous, as some families' .view() needs it


def _padded(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, before: tuple[Tensor, ...], asked: _Asked
) -> Tensor:
    """Rows padded on the right, behind a prefix that transformers knows nothing of. mask: bool [B, 1, L, L]."""
    prefix = before[0].shape[2]
    key, value = (
        torch.cat((x.expand(len(query), -1, -1, -1), y), dim=2) for x, y in zip(before, (key, value), strict=True)
    )
    allowed = _window(query, key, asked.sliding_window)
    if mask is not None and allowed is not None:
        seen = allowed[:, :prefix].expand(len(query), 1, -1, -1)
        allowed = torch.cat((seen, mask.expand(len(query), -1, -1, -1)), dim=-1)
    return _by_sdpa(query, key, value, allowed, asked).contiguous()


def _by_sdpa(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, asked: _Asked) -> Tensor:
    """[B, L, H, E]. allowed: bool, which of the keys a query sees; None for plain causality."""
    if asked.softcap is None and asked.s_aux is None:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            allowed,
            asked.dropout,
            is_causal=allowed is None,
            scale=asked.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    else:
        out = _scores(query, key, value, _whole(query, key) if allowed is None else allowed, asked)
    return out.transpose(1, 2)


def _with_ancestors(x: Tensor, segments: Sequence[Segment], segment: Segment) -> Tensor:
    """x: [1, K, L, E] → the places that a segment's tokens may see, its own last."""
    parts = [x[:, :, segment.start : segment.stop]]
    while segment.parent >= 0:
        segment = segments[segment.parent]
        parts.append(x[:, :, segment.start : segment.stop])
    return parts[0] if len(parts) == 1 else torch.cat(parts[::-1], dim=2)


def _refuse_unknown(module: nn.Module, others: dict[str, Any]) -> None:
    causal = others.pop("is_causal", None)
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise CannotPackError(f"{type(module).__name__} is not causal")
    for name, value in others.items():
        if value is not None and value is not False and name not in NOTHING_TO_ATTENTION:
            raise CannotPackError(f"{type(module).__name__} passes {name}, which is not known here")


def _refuse_hidden_window(module: nn.Module, sliding_window: int | None) -> None:
    """A window that is in the mask alone (Qwen2-MoE, Phi-MoE, Llama 4's chunks) would be lost with it."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else "full_attention"
    if sliding_window is not None or (kind in WHOLE and (kinds or not _has_window(config))):
        return
    raise CannotPackError(f"{type(module).__name__} keeps its window in the mask")


def _has_window(config: Any) -> bool:
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def _window(query: Tensor, key: Tensor, sliding_window: int | None) -> Tensor | None:
    """bool [L of query, L of key]: the last `sliding_window` tokens, itself included; None where plain causality over
    as many keys as queries says it all."""
    rows, columns = query.shape[2], key.shape[2]
    if rows == columns and (sliding_window is None or columns <= sliding_window):
        return None
    allowed = _whole(query, key)
    return allowed if sliding_window is None else allowed.triu(columns - rows - sliding_window + 1)


def _whole(query: Tensor, key: Tensor) -> Tensor:
    """bool [L of query, L of key]: causal, the query's last token being the key's last."""
    rows, columns = query.shape[2], key.shape[2]
    return torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)


def _scores(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, asked: _Asked) -> Tensor:
    """Attention with its scores written out, which soft caps (Gemma 2) and sinks (gpt-oss) need: [B, H, L, E]."""
    scaling, dropout, _, softcap, sinks = asked
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ value
