"""Hidden states of the supervised places → their summed loss: only they meet the vocabulary, and a chunk at a time.

Shapes: S supervised places, n of them in a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from math import ceil
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from luthier.engine.dropout import set_keys

CHUNK = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits at once, by the type of the device: 2 bytes each in bf16 and 4 in fp32; on a GPU, which has no pieces, 6 in
bf16, and 4 more with a soft cap; about 14 where the head trains.

cpu: 110 places of a vocabulary of 151,936 words; 128, 256 and 512 take the same time within 4 hundredths, 64 takes 6
more than 128, and 32 takes 22. None should be smaller: glibc cuts blocks below 32 MiB (2**24 logits in bf16) out of a
heap, where the little that is kept of a chunk breaks up the room for the next: 128 of 4,000 places × 32,000 under a
head that trains came to 810 MiB, not 240. cuda: four times as many, so that the weight is read less often; a judgement,
not measured.
"""

IN_CACHE = 1 << 19
"""Logits of a piece of a chunk on the CPU: 2 MiB in fp32, three places of 151,936 words (one to eight take the same
time). The softmax of a whole chunk goes through memory ten times and takes three times as long, 0.99 ms a place for
0.32; the two products of 512 columns take 4.7 (one core)."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: softcap · tanh(scale · module(hidden) / softcap)."""

    module: nn.Module
    """Hidden size in, vocabulary out: a linear layer as it is, adapted, trained or quantised."""
    scale: float = 1.0
    softcap: float | None = None
    """Bound of the logits; None: no bound, no tanh."""


def head_of(base: Any) -> Head:
    """The head of a transformers causal model. `base`: the model inside a PeftModel, its adapters in place.

    What else a family does to its logits its configuration does not say: compare logits() with the model's own.
    """
    config = base.config.get_text_config()
    scale = 1.0
    if config.model_type.startswith("cohere"):  # MPT has a logit_scale as well, which transformers does not use
        scale = config.logit_scale or 1.0
    elif config.model_type == "hyperclovax":  # it multiplies by what Granite divides by
        scale = config.logits_scaling
    elif hasattr(config, "logits_scaling"):
        scale = 1 / config.logits_scaling
    return Head(base.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))


def logits(hidden: Tensor, head: Head) -> Tensor:
    """[n, D] → [n, V] in fp32, with a gradient. Scaled and capped in fp32, where transformers does it in bf16."""
    z: Tensor = head.module(hidden).float()
    if head.scale != 1.0:
        z = z * head.scale
    if head.softcap is not None:
        z = torch.tanh(z / head.softcap) * head.softcap
    return z


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, head: Head, keys: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Sum of the cross entropy over S places, a fp32 scalar; never S × V numbers in memory, now or for the backward.

    hidden: [S, D]; targets: [S] ids; keys: [S] dropout keys of the places, for KeyedDropout inside the head; weights:
    [S] in fp32, how often each place counts (once without). The sum over no places is 0 with gradients of 0, so that a
    process without any still takes part in the backward.
    """
    words = cast(int, head.module.out_features)
    rows = ceil(CHUNK[hidden.device.type] / words)
    if type(head.module) is nn.Linear and not any(weight.requires_grad for weight in head.module.parameters()):
        return _of_frozen_head(hidden, targets, weights, head, rows)
    optional = (repeat(None) if part is None else torch.split(part, rows) for part in (keys, weights))
    # S = 0 is one empty chunk.
    chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), *optional, strict=False)
    return torch.stack([checkpoint(_of_chunk, *chunk, head, use_reentrant=False) for chunk in chunks]).sum()


def _of_chunk(hidden: Tensor, targets: Tensor, keys: Tensor | None, weights: Tensor | None, head: Head) -> Tensor:
    """The summed loss of one chunk through the module itself. Under a checkpoint: the backward calls it again."""
    if keys is not None:
        set_keys(head.module, keys)
    device = hidden.device.type
    # Autocast's cache would make all chunks share one bf16 copy of a weight that trains: gradients summed in bf16.
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
        losses = F.cross_entropy(logits(hidden, head), targets, reduction="none")
    return (losses if weights is None else losses * weights).sum()


def _of_frozen_head(hidden: Tensor, targets: Tensor, weights: Tensor | None, head: Head, rows: int) -> Tensor:
    linear, device = cast(nn.Linear, head.module), hidden.device.type
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if torch.is_autocast_enabled(device):  # cast once: autocast caches only weights that train
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    wanted = hidden.requires_grad and torch.is_grad_enabled()
    frozen = _Frozen(weight, bias, head.scale, head.softcap)
    return _FrozenHead.apply(hidden, targets, weights, frozen, rows, wanted)  # type: ignore[no-any-return, no-untyped-call]


class _Frozen(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


class _FrozenHead(torch.autograd.Function):
    """The summed loss and, while a chunk's probabilities are there, the gradient of its hidden states: it is all that
    the backward needs, and S × D is all that is kept. Not to be differentiated twice.

    The memory of one chunk's logits serves them all, and then their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weights: Tensor | None, head: _Frozen, rows: int, wanted: bool
    ) -> Tensor:
        places, words = len(hidden), len(head.weight)
        losses = torch.empty(places, device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        chunk = hidden.new_empty(min(rows, places), words)
        few = min(len(chunk), max(1, IN_CACHE // words) if hidden.device.type == "cpu" else rows)
        spare = [torch.empty(few, words, device=hidden.device) for _ in range(_spares(head, hidden.dtype))]
        for start in range(0, places, rows):
            h = hidden[start : start + rows]
            z = chunk[: len(h)]
            if head.bias is None:
                torch.mm(h, head.weight.t(), out=z)
            else:
                torch.addmm(head.bias, h, head.weight.t(), out=z)
            for first in range(0, len(h), few):
                piece = slice(start + first, min(start + first + few, start + len(h)))
                weight = None if weights is None else weights[piece]
                _losses(z[first : first + few], targets[piece], weight, head, losses[piece], spare, wanted)
            if gradient is not None:
                torch.mm(z, head.weight, out=gradient[start : start + rows])
        if wanted:
            ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None, None


def _spares(head: _Frozen, dtype: torch.dtype) -> int:
    """How many times a piece is there in fp32 beside the chunk: where that is not fp32 itself; and for the soft cap."""
    return (dtype != torch.float32) + (head.softcap is not None)


def _losses(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    head: _Frozen,
    losses: Tensor,
    spare: list[Tensor],
    wanted: bool,
) -> None:
    """Of one piece, r places: their losses into `losses` [r], and where it is wanted the gradient of what the head
    gave, `logits` [r, V], into its place. All in fp32, in `spare` [≥ r, V] or where the logits are; no new memory."""
    buffers = [buffer[: len(logits)] for buffer in spare]
    z = logits if logits.dtype == torch.float32 else buffers.pop().copy_(logits)
    targets = targets.unsqueeze(1)
    if head.scale != 1.0:
        z.mul_(head.scale)
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        if wanted:
            slope = torch.mul(z, z, out=buffers.pop()).neg_().add_(1)
        z.mul_(head.softcap)
    z.sub_(z.amax(1, keepdim=True))
    at_target = z.gather(1, targets)
    total = z.exp_().sum(1, keepdim=True)
    each = total.log() - at_target
    losses.copy_((each if weights is None else each * weights.unsqueeze(1)).squeeze(1))
    if not wanted:
        return
    counted = total.new_full((), head.scale) if weights is None else weights.unsqueeze(1) * head.scale
    z.mul_(counted / total)
    z.scatter_(1, targets, z.gather(1, targets) - counted)
    if head.softcap is not None:
        z.mul_(slope)
    if z is not logits:
        logits.copy_(z)
