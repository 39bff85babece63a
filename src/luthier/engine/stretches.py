"""Attention of a packed pass on the CPU: segments of like length in one call, and what several share attended to once.

SDPA for one segment after the other costs a call each, and autograd, which undoes each slice by a tensor of zeros as
large as the whole pass, half a layer's time. Here a pass is one function of its own: its backward writes every part of
the gradient where it belongs. A segment's own tokens and those of its ancestors are attended to apart and merged by
their log-sum-exps, as in ring attention (Liu et al. 2023, arXiv:2310.01889): no shared key is copied for a segment.

Shapes: H query heads, K key heads, L places, E head size; n segments of a batch, m their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.data.pack import Segment

WASTE = 1.25
"""Longest by shortest segment of a batch: what fills up the shorter ones costs less than calls of their own."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Stretch:
    """Places that one call attends from and to: of segments to themselves, or of segments to their ancestors.

    queries: int64 [n · m], the shorter segments filled up with their last place; real: int64, those of n · m that are
    no filling, None for all. keys: int64, the ancestors' places; None where the queries are the keys, causally. mask:
    fp32, 0 or -inf: [m, m or keys]; None where every key (of a causal call: every earlier one) is seen.
    """

    count: int
    queries: Tensor
    real: Tensor | None
    keys: Tensor | None
    mask: Tensor | None

    @property
    def causal(self) -> bool:
        return self.keys is None and self.mask is None


def stretches(segments: Sequence[Segment], window: int | None, prefix: int = 0) -> list[Stretch]:
    """What a pass is attended for by: every place once for its own segment, then for its ancestors, if it has any.

    `window`: the sliding one, the last so many tokens of a row, itself included. `prefix`: tokens before each row whose
    keys and values stand behind those of the pass.
    """
    children: dict[int, list[Segment]] = {}
    for segment in segments:
        children.setdefault(segment.parent, []).append(segment)
    own = [_own(batch, window) for batch in _alike(segments)]
    shared = [_ancestors(segments, parent, of, window) for parent, of in children.items() if parent >= 0]
    if prefix:
        shared.append(_prefix(segments, prefix, window))
    return own + [part for part in shared if len(part.queries)]  # none where a window is one token


def _own(batch: Sequence[Segment], window: int | None) -> Stretch:
    longest = batch[-1].stop - batch[-1].start
    places = torch.stack([torch.arange(s.start, s.start + longest).clamp_(max=s.stop - 1) for s in batch])
    real = torch.cat([i * longest + torch.arange(s.stop - s.start) for i, s in enumerate(batch)])
    mask = None
    if window is not None and longest > window:
        mask = _as_numbers(torch.ones(longest, longest, dtype=torch.bool).tril_().triu_(1 - window))
    return Stretch(len(batch), places.flatten(), None if len(real) == places.numel() else real, None, mask)


def _ancestors(segments: Sequence[Segment], parent: int, children: Sequence[Segment], window: int | None) -> Stretch:
    """With a window: only those queries and keys between which anything is seen, so that each query sees a key."""
    places, number = list[Tensor](), parent
    while number >= 0:
        start, stop, number = segments[number]
        places.append(torch.arange(start, stop))
    keys, most = torch.cat(places[::-1]), None if window is None else window - 1
    own = [torch.arange(stop - start)[:most] for start, stop, _ in children]
    queries = torch.cat([at + child.start for at, child in zip(own, children, strict=True)])
    mask = None
    if window is not None:
        keys = keys[max(0, len(keys) - window + 1) :]
        behind = len(keys) - torch.arange(len(keys))  # 1 for the last: how far it is from a segment's first token
        mask = _as_numbers(torch.cat(own)[:, None] + behind < window)
    return Stretch(1, queries, None, keys, mask)


def _prefix(segments: Sequence[Segment], prefix: int, window: int | None) -> Stretch:
    """All places of a pass, or those that a window reaches the prefix from."""
    places, depths, begins = segments[-1].stop, list[Tensor](), list[int]()
    keys = torch.arange(places, places + prefix)
    if window is None:
        return Stretch(1, torch.arange(places), None, keys, None)
    for start, stop, parent in segments:
        begins.append(0 if parent < 0 else begins[parent] + segments[parent].stop - segments[parent].start)
        depths.append(begins[-1] + torch.arange(stop - start))
    depth = torch.cat(depths)
    queries, keys = (depth < window - 1).nonzero().flatten(), keys[max(0, prefix - window + 1) :]
    behind = len(keys) - torch.arange(len(keys))
    return Stretch(1, queries, None, keys, _as_numbers(depth[queries][:, None] + behind < window))


def attend_by_stretches(
    query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Stretch], scaling: float | None
) -> Tensor:
    """query: [1, H, L, E]; key, value: [1, K, L, E], a prefix's behind them → [1, L, H, E]."""
    if torch.is_autocast_enabled("cpu"):  # as it does with SDPA's own
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    out: Tensor = _Attention.apply(query, key, value, parts, scaling)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    """Keeps query, key, value, the output and its log-sum-exps [L, H]; what is gathered from them is gathered again.

    It computes in fp32 at least: torch's function for the CPU takes two to eight times as long for bf16's backward.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Stretch], scaling: float | None
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        out = torch.empty(query.shape[2], query.shape[1], query.shape[3], dtype=wide)
        sums = torch.empty(query.shape[2], query.shape[1], dtype=wide)
        for part in parts:
            q, k, v = _gathered(part, query, key, value)
            found, lse = _forward(q, k, v, 0.0, part.causal, attn_mask=_like(part.mask, q), scale=scaling)
            places, found, lse = _real(part, found.transpose(1, 2), lse.transpose(1, 2))
            if part.keys is not None:
                before = sums.index_select(0, places)
                both = torch.logaddexp(before, lse)
                found = found * (lse - both).exp_().unsqueeze(-1)
                found += out.index_select(0, places) * (before - both).exp_().unsqueeze(-1)
                lse = both
            out.index_copy_(0, places, found)
            sums.index_copy_(0, places, lse)
        given = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, given, sums)
        ctx.parts, ctx.scaling, ctx.wide = parts, scaling, wide
        return given.unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, sums = ctx.saved_tensors
        found = [torch.zeros(x.shape[2], x.shape[1], x.shape[3], dtype=ctx.wide) for x in (query, key, value)]
        for part in ctx.parts:
            q, k, v = _gathered(part, query, key, value)
            g, o = (_taken(x.transpose(0, 1).unsqueeze(0), part, part.queries) for x in (gradient[0], out))
            lse = sums.index_select(0, part.queries).view(part.count, -1, sums.shape[1]).transpose(1, 2).contiguous()
            g = _without_filling(g, part)
            mask = _like(part.mask, q)
            changes = _backward(g, q, k, v, o, lse, 0.0, part.causal, attn_mask=mask, scale=ctx.scaling)
            of_query, of_key, of_value = (x.transpose(1, 2) for x in changes)
            places, of_query = _real(part, of_query)
            found[0].index_add_(0, places, of_query)
            if part.keys is None:
                places, of_key, of_value = _real(part, of_key, of_value)
            else:
                places, of_key, of_value = part.keys, of_key[0], of_value[0]
            found[1].index_add_(0, places, of_key)
            found[2].index_add_(0, places, of_value)
        return *(x.to(query.dtype).transpose(0, 1).unsqueeze(0) for x in found), None, None


def _gathered(part: Stretch, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
    yield _taken(query, part, part.queries)
    for x in (key, value):
        yield _taken(x, part, part.queries if part.keys is None else part.keys)


def _taken(x: Tensor, part: Stretch, places: Tensor) -> Tensor:
    """x: [1, H, L, E] → its places, [n, H, m, E], in fp32 at least."""
    taken = x.squeeze(0).transpose(0, 1).index_select(0, places)  # [n · m, H, E]
    taken = taken.to(torch.promote_types(x.dtype, torch.float32))
    return taken.view(part.count, -1, *taken.shape[1:]).transpose(1, 2)


def _real(part: Stretch, *tensors: Tensor) -> list[Tensor]:
    """The places that are no filling, and of each tensor [n, m, …] what belongs to them."""
    flat = [x.flatten(0, 1) for x in tensors]
    if part.real is None:
        return [part.queries, *flat]
    return [x.index_select(0, part.real) for x in (part.queries, *flat)]


def _without_filling(gradient: Tensor, part: Stretch) -> Tensor:
    """The gradient [n, H, m, E] with zeros where nothing but filling is. (No real query sees a key that is filling.)"""
    if part.real is None:
        return gradient
    keep = gradient.new_zeros(part.queries.shape[0], 1).index_fill_(0, part.real, 1)
    return gradient * keep.view(part.count, 1, -1, 1)


def _as_numbers(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))


def _like(mask: Tensor | None, x: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(x.dtype)


def _alike(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments by length, the shortest first, in batches in which none is much longer than another."""
    batches: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: s.stop - s.start):
        if batches and segment.stop - segment.start <= WASTE * (batches[-1][0].stop - batches[-1][0].start):
            batches[-1].append(segment)
        else:
            batches.append([segment])
    return batches
