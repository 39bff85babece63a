"""Hidden states of the supervised places → their summed loss: only they meet the vocabulary, and a chunk at a time.

Shapes: S supervised places, n of them in a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from math import ceil
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from luthier.engine.dropout import set_keys

CHUNK = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits at once, by the type of the device: 6 bytes each and 4 more with a soft cap, about 14 where the head trains.

cpu: 110 places of a vocabulary of 151,936 words; 64 to 512 take the same time within a tenth, 32 a quarter more. None
should be smaller: glibc cuts blocks below 32 MiB (2**24 logits in bf16) out of a heap, where the little that is kept of
a chunk breaks up the room for the next: 128 of 4,000 places × 32,000 under a head that trains came to 810 MiB, not 240.
cuda: four times as many, so that the weight is read less often; a judgement, not measured.
"""


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


def summed_cross_entropy(hidden: Tensor, targets: Tensor, head: Head, keys: Tensor | None = None) -> Tensor:
    """Sum of the cross entropy over S places, a fp32 scalar; never S × V numbers in memory, now or for the backward.

    hidden: [S, D]; targets: [S] ids; keys: [S] dropout keys of the places, for KeyedDropout inside the head. The sum
    over no places is 0 with gradients of 0, so that a process without any still takes part in the backward.
    """
    words = cast(int, head.module.out_features)
    rows = ceil(CHUNK[hidden.device.type] / words)
    if type(head.module) is nn.Linear and not any(weight.requires_grad for weight in head.module.parameters()):
        return _of_frozen_head(hidden, targets, head, rows)
    keys_of_chunks = repeat(None) if keys is None else torch.split(keys, rows)
    # S = 0 is one empty chunk.
    chunks = zip(torch.split(hidden, rows), torch.split(targets, rows), keys_of_chunks, strict=False)
    return torch.stack([checkpoint(_of_chunk, *chunk, head, use_reentrant=False) for chunk in chunks]).sum()


def _of_chunk(hidden: Tensor, targets: Tensor, keys: Tensor | None, head: Head) -> Tensor:
    """The summed loss of one chunk through the module itself. Under a checkpoint: the backward calls it again."""
    if keys is not None:
        set_keys(head.module, keys)
    device = hidden.device.type
    # Autocast's cache would make all chunks share one bf16 copy of a weight that trains: gradients summed in bf16.
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
        return F.cross_entropy(logits(hidden, head), targets, reduction="sum")


def _of_frozen_head(hidden: Tensor, targets: Tensor, head: Head, rows: int) -> Tensor:
    linear, device = cast(nn.Linear, head.module), hidden.device.type
    weight: Tensor = linear.weight
    bias: Tensor | None = linear.bias
    if torch.is_autocast_enabled(device):  # cast once: autocast caches only weights that train
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    wanted = hidden.requires_grad and torch.is_grad_enabled()
    return _FrozenHead.apply(hidden, targets, weight, bias, head.scale, head.softcap, rows, wanted)  # type: ignore[no-any-return, no-untyped-call]


class _FrozenHead(torch.autograd.Function):
    """The summed loss and, while a chunk's probabilities are there, the gradient of its hidden states: it is all that
    the backward needs, and S × D is all that is kept. Not to be differentiated twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        rows: int,
        wanted: bool,
    ) -> Tensor:
        losses, gradients = [], []
        for h, target in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            loss, gradient = _loss_and_gradient(h, target, weight, bias, scale, softcap, wanted)
            losses.append(loss)
            gradients.append(gradient)
        if wanted:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None, None, None, None


def _loss_and_gradient(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Of one chunk: losses [n, 1], and where it is wanted the gradient of the hidden states [n, D].

    In place wherever it can be: n × V numbers of fp32 are the memory of this module, half of that again in bf16.
    """
    targets = targets.unsqueeze(1)
    z = F.linear(hidden, weight, bias).float()
    slope: Tensor | float = scale
    if scale != 1.0:
        z.mul_(scale)
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = z.square().mul_(-scale).add_(scale)
        z.mul_(softcap)
    z.sub_(z.amax(1, keepdim=True))
    at_target = z.gather(1, targets)
    total = z.exp_().sum(1, keepdim=True)
    losses = total.log() - at_target
    if not wanted:
        return losses, hidden[:0]
    z.div_(total)
    z.scatter_(1, targets, z.gather(1, targets) - 1)
    if softcap is not None or scale != 1.0:
        z.mul_(slope)
    return losses, z.to(hidden.dtype) @ weight
