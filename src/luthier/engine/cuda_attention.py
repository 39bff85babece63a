"""Attention of a packed pass on a CUDA device, by one kernel: flash over rows of any lengths, or flex over a tree.

Rows that share nothing go through torch's variable-length flash attention. Rows that share a beginning are a tree of
segments, and so is a soft cap's pass: flex attention, with a mask of four numbers a token and the list of its blocks
made from the segments on the CPU, once a pass. Nothing here waits for the device. What cannot be done says so with
None, and the caller goes segment by segment.

Shapes: H query heads, K key heads, L places, E head size, S segments, N blocks of 128 places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from threading import Thread
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Segments = tuple[tuple[int, int, int], ...]
"""(start, stop, parent) each, as in a Layout: parent is the number of the segment that comes before, -1 for none."""
Way = Literal["flash", "flex"]


class Case(NamedTuple):
    """What a kernel may not be there for."""

    way: Way
    device: torch.device
    dtype: torch.dtype
    heads: int
    keys: int
    size: int
    softcap: float | None

    def __str__(self) -> str:
        cap = "" if self.softcap is None else ", capped"
        return (
            f"{self.way}, {str(self.dtype).removeprefix('torch.')}, {self.heads}/{self.keys} heads of {self.size}"
            f"{cap}, {self.device}"
        )


BLOCK = 128
"""Places of a side of flex attention's blocks: torch's own choice."""
LARGEST_HEAD = 256
"""Head size up to which torch's flash attention goes; it takes multiples of 8."""
PASSES = 4
"""Passes whose masks are kept. One is computed, forward and backward, before the next; a few for the proof's sake."""
TRIAL = ((0, 130, -1), (130, 140, 0), (140, 300, 0))
"""Segments of a trial: three blocks, as torch compiles one block by itself."""

_failed: dict[Case, str] = {}


def attend_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None = None,
) -> Tensor | None:
    """Causal attention in each segment, and to the whole of its ancestors.

    query: [1, H, L, E]; key, value: [1, K, L, E]. Gives [1, L, H, E], or None where no kernel does it: old cards, no
    Triton, formats and head sizes (see `why`). `sliding_window`: how many tokens back along the row a token sees,
    itself included. Under autocast the inputs are cast as SDPA's would be.
    """
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    way: Way = "flex" if softcap is not None or any(parent >= 0 for *_, parent in segments) else "flash"
    if way == "flex" and query.shape[2] <= BLOCK:
        return None  # one block is another kernel for torch's compiler, and soon done segment by segment
    case = Case(way, query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], softcap)
    if not _works(case):
        return None
    try:
        return _by(way, query, key, value, segments, scaling, sliding_window, softcap)
    except Exception as error:
        # Trouble with another shape than the trial's. Anything else is not ours: memory that is full, and what a
        # checkpoint around us raises in the midst of attention, once it has computed again all that it needs.
        if not any(kind.__module__ == "torch._dynamo.exc" for kind in type(error).__mro__):
            raise
        _failed[case] = _said(error)
        return None


def why() -> dict[str, str]:
    """What was asked for and does not work here, as "flash, float32, 12/2 heads of 96, cuda:0", and the reason."""
    return {str(case): said for case, said in _failed.items()}


def _works(case: Case) -> bool:
    """Whether such a kernel is there, forward and backward: tried once, in a thread of its own (seconds for flex).

    A backward that fails would be past catching. The thread has none of this one's states: a checkpoint around us
    would count what the trial saves, and a computation without gradients has no backward to try.
    """
    _tried(case)
    return case not in _failed


@cache
def _tried(case: Case) -> None:
    refusal = _refused_by_flash(case.dtype, case.size) if case.way == "flash" else None
    if refusal is not None:
        _failed[case] = refusal
        return
    thread = Thread(target=_try, args=(case,))
    thread.start()
    thread.join()


def _refused_by_flash(dtype: torch.dtype, size: int) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash attention is for bf16 and fp16"
    if size % 8 or size > LARGEST_HEAD:
        return f"flash attention is for head sizes in steps of 8 up to {LARGEST_HEAD}"
    return None


def _try(case: Case) -> None:
    way, device, dtype, heads, keys, size, softcap = case
    segments: Segments = TRIAL if way == "flex" else tuple((start, stop, -1) for start, stop, _ in TRIAL)
    try:
        with torch.cuda.device(device):  # a thread begins on the first
            # Strided as a model's: heads are split from the width, then moved before the places.
            query, key, value = (
                torch.zeros(1, segments[-1][1], n, size, dtype=dtype, device=device).transpose(1, 2).requires_grad_()
                for n in (heads, keys, keys)
            )
            out = _by(way, query, key, value, segments, None, None, softcap)
            torch.autograd.grad(out, (query, key, value), torch.zeros_like(out))
    except torch.OutOfMemoryError:  # says nothing of the kernel, and the pass itself will not fit either
        pass
    except Exception as error:  # torch and its compiler raise what they like
        _failed[case] = _said(error)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _by(
    way: Way,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    if way == "flash":
        return _flash(query, key, value, segments, scaling, sliding_window)
    return _flex(query, key, value, segments, scaling, sliding_window, softcap)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, sliding_window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x.transpose(1, 2)[0] for x in (query, key, value))  # [L, H or K, E]
    further: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.12
            further["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    edges, longest = _edges(segments, query.device)
    # (-1, 0) is torch's word for causal; a window counts the tokens to the left, without the token itself.
    left = -1 if sliding_window is None or sliding_window >= longest else sliding_window - 1
    out = varlen_attn(
        query, key, value, edges, edges, longest, longest, scale=scaling, window_size=(left, 0), **further
    )
    return out.unsqueeze(0)  # type: ignore[union-attr]


@lru_cache(PASSES)
def _edges(segments: Segments, device: torch.device) -> tuple[Tensor, int]:
    """Where segments begin and the last one ends, int32 [S + 1] on the device; the length of the longest."""
    starts, stops, _ = np.array(segments).T
    return _sent(np.append(starts, stops[-1]), device), int((stops - starts).max())


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    out = _compiled_flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap, query.device),
        block_mask=_mask(segments, sliding_window, query.device),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """One kernel for passes of all lengths. fullgraph: never torch's own way out, which holds all scores at once."""
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=True, fullgraph=True))


@cache
def _capped(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    with torch.inference_mode(False):
        cap = torch.full((), softcap, device=device)  # as a float, dynamic shapes make torch 2.13's compiler give up

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


@lru_cache(PASSES)
def _mask(segments: Segments, sliding_window: int | None, device: torch.device) -> Any:
    """The BlockMask of a pass: what is seen from where, and which blocks are seen in part, whole or not at all."""
    from torch.nn.attention.flex_attention import BlockMask

    numbers = family(segments, sliding_window)
    counts, indices, whole_counts, whole_indices = (
        _sent(part[None, None], device)  # the same for all rows of a batch and all heads
        for some in blocks(segments, numbers.first)
        for part in _listed(some)
    )
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        whole_counts,
        whole_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=_seen(*(_sent(part, device) for part in numbers)),
        seq_lengths=(len(numbers.first), len(numbers.first)),
    )


def _seen(entered: Tensor, left: Tensor, positions: Tensor, first: Tensor) -> Callable[..., Tensor]:
    """Whether the token `at` sees the token `seen`, from the numbers of `family`, each [L].

    Tensors alone, with a window or without: another number would be another kernel for torch's compiler.
    """

    def mask_mod(batch: Tensor, head: Tensor, at: Tensor, seen: Tensor) -> Tensor:
        above = (entered[seen] <= entered[at]) & (entered[at] < left[seen])
        return above & (first[at] <= positions[seen]) & (positions[seen] <= positions[at])

    return mask_mod


class Family(NamedTuple):
    """A number of each kind a token, int32 [L] each.

    entered, left: when a walk through the tree, children after their parent, comes to the token's segment, and when it
    has seen all that hangs from it; a segment is above another (or the same) where it was entered before and is not yet
    left. positions: in the row, the ancestors' tokens counted. first: the first position that the token sees.
    """

    entered: NDArray[np.int32]
    left: NDArray[np.int32]
    positions: NDArray[np.int32]
    first: NDArray[np.int32]


def family(segments: Segments, sliding_window: int | None) -> Family:
    """Who sees whom, token by token."""
    count = len(segments)
    sizes = [1] * count  # segments from here downwards
    for number in reversed(range(count)):
        if (parent := segments[number][2]) >= 0:
            sizes[parent] += sizes[number]
    entered, following, roots = [0] * count, [0] * count, 0
    for number, (_, _, parent) in enumerate(segments):
        if parent < 0:
            entered[number], roots = roots, roots + sizes[number]
        else:
            entered[number] = following[parent]
            following[parent] += sizes[number]
        following[number] = entered[number] + 1
    lengths = np.array([stop - start for start, stop, _ in segments])
    positions = np.arange(lengths.sum()) + np.repeat(np.array(_begins(segments)) - lengths.cumsum() + lengths, lengths)
    first = np.zeros_like(positions) if sliding_window is None else np.maximum(positions - sliding_window + 1, 0)
    numbers = (np.repeat(entered, lengths), np.repeat(np.add(entered, sizes), lengths), positions, first)
    return Family(*(part.astype(np.int32) for part in numbers))


def _begins(segments: Segments) -> list[int]:
    """The position in its row of each segment's first token."""
    begins: list[int] = []
    for _, _, parent in segments:
        begins.append(0 if parent < 0 else begins[parent] + segments[parent][1] - segments[parent][0])
    return begins


def blocks(segments: Segments, first: NDArray[np.int32]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which blocks of keys a block of queries sees in part, and which wholly: bool [N, N] each. first: as in Family.

    Counted from intervals, N numbers a token: torch's create_block_mask looks at L × L, on the device.
    """
    count = -(-len(first) // BLOCK)
    edges = np.arange(count, dtype=np.int32) * BLOCK
    starts, stops, parents = np.array(segments, np.int32).T
    begins = np.array(_begins(segments), np.int32)
    seen = np.zeros((count * BLOCK, count), np.int32)  # tokens of a block that a token sees
    tokens = np.arange(len(first), dtype=np.int32)
    above = np.repeat(np.arange(len(segments)), stops - starts)  # first the token's own segment, then one up each time
    highs = tokens + 1
    while len(tokens):
        lows = starts[above] + np.maximum(first[tokens] - begins[above], 0)
        seen[tokens] += np.maximum(np.minimum(highs[:, None], edges + BLOCK) - np.maximum(lows[:, None], edges), 0)
        further = parents[above] >= 0
        tokens, above = tokens[further], parents[above[further]]
        highs = stops[above]
    sums = seen.reshape(count, BLOCK, count).sum(1)
    whole = sums == BLOCK * BLOCK
    return (sums > 0) & ~whole, whole


def _listed(some: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How many blocks of a row, [N], and the row's blocks with those first, [N, N]."""
    return some.sum(1).astype(np.int32), np.argsort(~some, axis=1, kind="stable").astype(np.int32)


def _sent(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """int32 on the device, which is not waited for: the copy is from pinned memory."""
    with torch.inference_mode(False):  # it is kept, and a later pass may have a backward
        here = torch.from_numpy(np.ascontiguousarray(numbers, np.int32))
        return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here
