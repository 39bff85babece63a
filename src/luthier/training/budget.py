"""How many tokens go through the model at once, where the recipe leaves it to us: measured on the longest rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from luthier.data.pack import Pass
from luthier.engine.memory import free_memory
from luthier.sections import TrainSection
from luthier.training.checkpoint import TrainState
from luthier.training.gradients import Gradients

if TYPE_CHECKING:
    from luthier.data.examples import Examples

TOKENS_PER_PASS = {"cuda": 16_384, "cpu": 4_096}
"""Never more: enough to keep the device busy, and the memory of the rest of a step stays small beside it."""
PROBE = 512
"""Tokens to measure with, if the longest row is not longer: few enough to cost little, more than the fixed costs."""
SHARE = 0.6
"""Of the free memory: the backward pass needs workspace beside what the forward pass keeps."""
GIB = 1024**3


def decide(
    state: TrainState,
    section: TrainSection,
    gradients: Gradients,
    examples: Examples,
    first: bool,
    say: Callable[[str], None],
) -> None:
    """Put the tokens of a pass into the run's state, once; a run that goes on keeps them, unless the recipe changed."""
    asked = section.tokens_per_pass
    if asked == "auto":
        if first:
            state.asked = "auto"
            state.tokens_per_pass, line = measure(gradients, examples)
            say(line)
    elif asked != state.asked:  # else memory may have run out meanwhile: what was decided holds
        if not first:
            then = "differ (train.base_dropout)" if section.base_dropout else "be equal only to rounding"
            say(f"resume: train.tokens_per_pass is {asked:,} now: numbers will {then}")
        state.asked = state.tokens_per_pass = asked
        for line in longer(asked, examples):
            say(line)


def measure(gradients: Gradients, examples: Examples) -> tuple[int, str]:
    """Tokens for a pass, and the line that says why: what memory and TOKENS_PER_PASS allow, and any row."""
    device, world = gradients.world.device, gradients.world
    by_length = np.argsort(-examples.lengths.astype(np.int64), kind="stable")
    longest = int(examples.lengths[by_length[0]])
    count = max(1, int((examples.lengths[by_length].cumsum() <= PROBE).sum()))
    part = gradients.cut(examples, by_length[:count], max(longest, PROBE) * count)[0]
    a_token = kept_bytes(gradients, part) / part.ids.size
    free = free_memory(device) / (world.size if device.type == "cpu" else 1)
    affordable = int(SHARE * free / max(a_token, 1))
    tokens = max(longest, min(TOKENS_PER_PASS[device.type], affordable))
    tokens = min(world.gather(tokens))
    kept = f"{a_token / 1024**2:.2f} MiB" if a_token >= 1024**2 else f"{a_token / 1024:.1f} KiB"
    reason = f"{kept} a token, {free / GIB:.1f} GiB free"
    return tokens, f"train.tokens_per_pass: auto is {tokens:,} (longest row {longest:,}; {reason})"


def longer(tokens: int, examples: Examples) -> list[str]:
    """The line, if it is due, that rows are longer than the pass that the recipe asks for."""
    longest = int(examples.lengths.max())
    if longest <= tokens:
        return []
    return [f"train.tokens_per_pass: {tokens:,}, but the longest row has {longest:,}: such a row is a pass of its own"]


def kept_bytes(gradients: Gradients, part: Pass) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights not counted.

    On a GPU: the allocator's peak of both. On a CPU, whose allocator tells nothing: the tensors that autograd saves.
    """
    device = gradients.world.device
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.autograd.backward(gradients.loss(part) * 0)
        peak = torch.cuda.max_memory_allocated(device)
        gradients.alone.zero_grad()
        return peak - before
    weights = {value.untyped_storage().data_ptr() for value in gradients.alone.parameters()}
    saved: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself it would be held by the operation that made it, and that one by it: for good

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = gradients.loss(part)
    del loss
    return sum(saved.values())
