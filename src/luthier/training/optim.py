"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from luthier.data.batches import exact
from luthier.errors import RecipeError
from luthier.sections import TrainSection

DEFAULT_LR = {
    "lora": (2e-4, "adapters start without effect and bear ten times the rate of full fine-tuning"),
    "full": (2e-5, "every weight moves, and a higher rate forgets what the model knew"),
}


def default_lr(kind: str) -> tuple[float, str]:
    """The method's learning rate where the recipe says auto, and the reason to print."""
    return DEFAULT_LR[kind]


def peak_lr(section: TrainSection, kind: str) -> float:
    """The highest learning rate of the run. Errors: RecipeError where min_lr lies above it."""
    peak = default_lr(kind)[0] if section.lr == "auto" else section.lr
    if section.min_lr > peak:
        raise RecipeError(f"train.min_lr: {section.min_lr:g} is above the learning rate {peak:g}; lower it or raise lr")
    return peak


def warmup_steps(section: TrainSection, steps: int) -> int:
    """Steps of warm-up: an integer as it is, a share of all steps rounded up."""
    if isinstance(section.warmup, int):
        return section.warmup
    return math.ceil(exact(section.warmup) * steps)


def lr_factor(
    step: int, steps: int, warmup: int, schedule: Literal["linear", "cosine", "constant"], floor: float = 0.0
) -> float:
    """Learning rate of step `step` = 0 … steps - 1 as a share of the peak.

    (step + 1) / warmup while it warms up; then the schedule, which does not fall below `floor` and reaches 0 only
    after the last step, so that no step is lost.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    factor = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[schedule]
    return max(factor, floor)


def make_optimizer(parameters: dict[str, nn.Parameter], section: TrainSection) -> torch.optim.AdamW:
    """AdamW over named parameters; only matrices decay. Its rate is set before each step (`set_lr`)."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=section.betas, eps=section.eps)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Put the step's learning rate into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
