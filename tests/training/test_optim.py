"""Learning rates and the optimizer's groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from luthier.errors import RecipeError
from luthier.sections import TrainSection
from luthier.training.optim import default_lr, lr_factor, make_optimizer, peak_lr, set_lr, warmup_steps


def rates(steps, warmup, schedule, floor=0.0):
    return [lr_factor(step, steps, warmup, schedule, floor) for step in range(steps)]


def test_the_first_step_of_warm_up_is_no_lost_step():
    assert rates(8, 4, "constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_linear_starts_at_the_peak_and_reaches_0_only_after_the_last_step():
    assert rates(6, 2, "linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates(4, 0, "linear") == [1, 0.75, 0.5, 0.25]


def test_cosine():
    expected = [0.5, 1] + [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates(6, 2, "cosine") == pytest.approx(expected, abs=1e-15)


def test_the_schedule_does_not_fall_below_its_floor_and_warm_up_has_none():
    assert rates(6, 2, "linear", floor=0.6) == [0.5, 1, 1, 0.75, 0.6, 0.6]
    assert rates(4, 4, "linear", floor=0.6) == [0.25, 0.5, 0.75, 1]


def test_warm_up_longer_than_the_run():
    assert rates(2, 10, "cosine") == [0.1, 0.2]


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(7, 100, 7), (0, 100, 0), (0.03, 94, 3), (0.07, 100, 7), (0.0, 5, 0), (0.1, 30, 3)],
)
def test_warm_up_is_steps_or_a_share_rounded_up(warmup, steps, expected):
    assert warmup_steps(TrainSection(warmup=warmup), steps) == expected


def test_default_rates_come_with_a_reason():
    assert (default_lr("lora")[0], default_lr("full")[0]) == (2e-4, 2e-5)
    assert all(default_lr(kind)[1] for kind in ("lora", "full"))
    assert peak_lr(TrainSection(), "full") == 2e-5
    assert peak_lr(TrainSection(lr=3e-3), "full") == 3e-3


def test_a_floor_above_the_peak_is_refused():
    with pytest.raises(RecipeError) as error:
        peak_lr(TrainSection(min_lr=1e-3), "lora")
    assert str(error.value) == "train.min_lr: 0.001 is above the learning rate 0.0002; lower it or raise lr"


def test_only_matrices_decay():
    layers = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    parameters = dict(layers.named_parameters())
    optimizer = make_optimizer(parameters, TrainSection(weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6))
    set_lr(optimizer, 0.1)
    decay = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    assert {name: decay[id(value)] for name, value in parameters.items()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }
    assert {(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        (0.1, (0.8, 0.9), 1e-6)
    }


def test_matrices_alone_make_one_group():
    assert len(make_optimizer({"a": nn.Parameter(torch.zeros(2, 2))}, TrainSection()).param_groups) == 1
