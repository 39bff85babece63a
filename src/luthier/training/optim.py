"""The optimizer with what it remembers, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.data.batches import exact
from luthier.errors import RecipeError
from luthier.methods import METHODS
from luthier.sections import TrainSection

LION = 5
"""By how much Lion's rate is below AdamW's: its steps are all of one size (Chen et al. 2023 take 3 to 10)."""
WIDTH, FALL = 4096, 0.78
"""The hidden size that the table's rates are for, and the power by which the best rate falls with the width: Schulman
et al. 2025 ("LoRA Without Regret") measured 0.781 over Llamas, and much less over Qwens; for weights trained from
nothing theory has 1 (Yang et al. 2021). QLoRA's 2e-4 for widths up to 5,120 and 1e-4 beyond (Dettmers et al. 2023) fit
it."""
CONSTANT = ("qmap1", "qmap2")
"""The tables of bitsandbytes' 8-bit codes: no part of a run's state."""
SECOND_MOMENTS = ("exp_avg_sq", "absmax2", "state2", "absmax1", "state1")
"""What is 0 until a gradient has come, the first that an optimizer has: PyTorch's; scales of 8 bits, or 32; Lion's."""


def default_lr(kind: str, optimizer: str, model: Any) -> tuple[float, str]:
    """The method's learning rate on this model where the recipe says auto, to three digits, and the reason to print.

    model: the base, or what the method made of it. Without numbers ("meta") a rate that goes by their size is nan.
    """
    method = METHODS[kind]
    if method.scale == "width":
        width = int(model.config.get_text_config().hidden_size)
        factor = (WIDTH / width) ** FALL
        how = f"{method.rate:g} for a width of {WIDTH:,}; this model's is {width:,}: × {factor:.3g}"
    elif method.scale == "size":
        from luthier.models.soft_prompts import embedding_size

        factor = embedding_size(model)
        how = f"{method.rate:g} × {factor:.3g}, the root mean square of this model's embeddings"
    else:
        factor, how = 1.0, "for any width"
    rate = float(f"{method.rate * factor:.3g}")
    if optimizer == "lion_8bit":
        rate, how = float(f"{rate / LION:.3g}"), f"{how}; a fifth of AdamW's {rate:g}, as Lion's steps are of one size"
    return rate, f"{method.why} ({how})"


def peak_lr(section: TrainSection, kind: str, model: Any) -> float:
    """The highest learning rate of the run. Errors: RecipeError where min_lr lies above it."""
    peak = default_lr(kind, section.optimizer, model)[0] if section.lr == "auto" else section.lr
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


def make_optimizer(
    parameters: dict[str, nn.Parameter], section: TrainSection, say: Callable[[str], None] = lambda _: None
) -> torch.optim.Optimizer:
    """The section's optimizer over named parameters; only matrices decay. Its rate is set before each step (`set_lr`).

    Says where it pages nothing.
    """
    matrices = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if section.optimizer == "adamw":
        # fused: one kernel for all tensors; one after the other takes a dozen passes over each
        return torch.optim.AdamW(groups, betas=section.betas, eps=section.eps, fused=True)
    from bitsandbytes import optim

    if section.optimizer == "lion_8bit":
        return optim.Lion8bit(groups, betas=section.betas)  # type: ignore[no-any-return]
    paged = section.optimizer == "paged_adamw_8bit"
    if paged and next(iter(parameters.values())).device.type == "cpu":
        say("train.optimizer: a CPU has nothing to page to: paged_adamw_8bit is adamw_8bit")
        paged = False
    return optim.AdamW8bit(groups, betas=section.betas, eps=section.eps, is_paged=paged)  # type: ignore[no-any-return]


def remembered(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer's next step depends on, for one parameter; as it is held, in 8 bits too."""
    state = optimizer.state[parameter]
    return {key: torch.as_tensor(value).contiguous() for key, value in state.items() if key not in CONSTANT}


def recall(optimizer: Any, parameter: nn.Parameter, kept: dict[str, Tensor]) -> None:
    """Put back what was `remembered`. Paged memory stays paged: bitsandbytes makes its own buffers, to be filled."""
    state = optimizer.state[parameter]
    if not hasattr(optimizer, "init_state"):
        state |= {key: value.to(parameter.device) for key, value in kept.items()}
        return
    at = (
        (g, i)
        for g, group in enumerate(optimizer.param_groups)
        for i, p in enumerate(group["params"])
        if p is parameter
    )
    number, index = next(at)
    optimizer.init_state(optimizer.param_groups[number], parameter, number, index)
    for key, value in kept.items():
        if key == "step":
            state[key] = int(value)
        else:
            state[key].copy_(value)


def has_gradient(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    """Whether any gradient but 0 has come to a parameter so far."""
    state = optimizer.state[parameter]
    moment = next((state[key] for key in SECOND_MOMENTS if key in state), None)
    return moment is not None and bool(moment.any())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Put the step's learning rate into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
