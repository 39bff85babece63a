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
from torch.utils.checkpoint import checkpoint

from luthier.engine import frozen_head, products
from luthier.engine.dropout import set_keys
from luthier.engine.frozen_head import FrozenHead

CHUNK = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits at once under a head that trains or is adapted, by the type of the device: about 14 bytes each.

cpu: 110 places of a vocabulary of 151,936 words; 128, 256 and 512 take the same time within 4 hundredths, 64 takes 6
more than 128, and 32 takes 22. None should be smaller: glibc cuts blocks below 32 MiB out of a heap, where the little
that is kept of a chunk breaks up the room for the next: 128 of 4,000 places × 32,000 came to 810 MiB, not 240. cuda:
four times as many, so that the weight is read less often; a judgement, not measured.
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
        return frozen_head.summed(hidden, targets, weights, _frozen(hidden, head))
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


def _frozen(hidden: Tensor, head: Head) -> FrozenHead:
    linear, device = cast(nn.Linear, head.module), hidden.device.type
    wide = products.in_fp32(linear, len(hidden))
    own = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return FrozenHead(linear, head.scale, head.softcap, torch.float32 if wide else own)
