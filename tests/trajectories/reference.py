"""The plain reference: all rows of a step padded into one batch through transformers and PEFT, by their own loss.

Nothing of luthier is in it but the order of the rows, and the keys and masks of the keyed dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from cases import Trajectory

from luthier.data.batches import order_of
from luthier.engine.attention import Layout
from luthier.engine.dropout import keyed, token_keys
from luthier.sections import TrainSection
from rows import Rows


def padded(rows: Rows, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels of the given rows, padded on the right: int64 [rows, longest]."""
    shape = (len(numbers), int(rows.lengths[list(numbers)].max()))
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for place, number in enumerate(numbers):
        tokens, supervised = (torch.from_numpy(part) for part in rows[number])
        ids[place, : len(tokens)], mask[place, : len(tokens)] = tokens, 1
        labels[place, : len(tokens)] = torch.where(supervised, tokens.long(), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reference(model: Any, rows: Rows, section: TrainSection, *, dropout: bool) -> Trajectory:
    """Train `model` as the section says (cosine, an integer warm-up, clipping), in the order of data seed 7."""
    assert section.steps and isinstance(section.lr, float) and isinstance(section.warmup, int) and section.clip
    order = order_of([(0, len(rows), 1.0)], seed=7, batch=section.batch)
    trained = [value for value in model.parameters() if value.requires_grad]
    decays = {"params": [value for value in trained if value.ndim > 1], "weight_decay": section.weight_decay}
    others = {"params": [value for value in trained if value.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([decays, others], lr=section.lr, betas=section.betas, eps=section.eps)
    warmup, falling = section.warmup, section.steps - section.warmup
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: (k + 1) / warmup if k < warmup else 0.5 + 0.5 * math.cos(math.pi * (k - warmup) / falling)
    )
    found = Trajectory([], [], [], [])
    model.set_attn_implementation("eager")
    model.train()
    with keyed(model, section.seed) if dropout else nullcontext():
        for step in range(section.steps):
            numbers = order.rows(step).tolist()
            batch = padded(rows, numbers)
            layout = {"layout": _layout(section.seed, step, batch["input_ids"])} if dropout else {}
            supervised = (batch["labels"] != -100).sum()
            loss = model(**batch, num_items_in_batch=supervised, use_cache=False, **layout).loss
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, section.clip)
            optimizer.step()
            rate.step()
            for values, value in zip(found, (loss.item(), norm.item(), 1, len(numbers)), strict=True):
                values.append(value)
    return found


def _layout(seed: int, step: int, ids: torch.Tensor) -> Layout:
    """Of a padded pass, ids: [B, L]: nothing of it but the keys of the dropout."""
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return Layout(segments=(), keys=torch.from_numpy(token_keys(seed, step, ids.numpy(), positions)).flatten())
