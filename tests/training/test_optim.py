"""Learning rates and the optimizer's groups."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.errors import RecipeError
from luthier.methods import METHODS
from luthier.models.adapters import attach
from luthier.models.load import from_folder
from luthier.sections import MethodSection, Quantization, TrainSection
from luthier.training.checkpoint import latest
from luthier.training.optim import (
    default_lr,
    has_gradient,
    lr_factor,
    make_optimizer,
    peak_lr,
    recall,
    remembered,
    set_lr,
    warmup_steps,
)
from rows import VOCABULARY, fit, random_rows, tiny, trained

EIGHT_BITS = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit")


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


def wide(width: int) -> LlamaForCausalLM:
    """A Llama of that width, without numbers."""
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=4, vocab_size=8)
        )


def rate(kind: str, model: Any, optimizer: str = "adamw") -> float:
    return default_lr(kind, optimizer, model)[0]


def test_default_rates_fall_with_the_width_and_come_with_a_reason():
    """Schulman et al. 2025: by the power 0.78. 2,048 is half of 4,096, and 2 ** 0.78 is 1.717."""
    assert [rate("lora", wide(width)) for width in (4096, 2048, 896, 160)] == [2e-4, 3.43e-4, 6.54e-4, 2.51e-3]
    assert [rate("full", wide(width)) for width in (4096, 8192)] == [2e-5, 1.16e-5]
    assert rate("oft", wide(160)) == rate("oft", wide(4096)) == 5e-4
    assert default_lr("lora", "adamw", wide(160))[1] == (
        "adapters start without effect and bear ten times the rate of full fine-tuning "
        "(0.0002 for a width of 4,096; this model's is 160: × 12.5)"
    )
    assert peak_lr(TrainSection(), "full", wide(4096)) == 2e-5
    assert peak_lr(TrainSection(lr=3e-3), "full", wide(4096)) == 3e-3


def test_every_methods_rate_is_the_tables_at_its_width():
    model = wide(4096)
    widths = [kind for kind, method in METHODS.items() if method.scale == "width"]
    assert {kind: rate(kind, model) for kind in widths} == {kind: METHODS[kind].rate for kind in widths}
    assert [kind for kind, method in METHODS.items() if method.scale == "size"] == ["prompt"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_prompts_rate_is_a_share_of_the_embeddings_size():
    """Whatever the width; and the same before the prompt is there and behind it, on which a resumed run depends."""
    model = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.tensor([0.3, -0.5]).repeat(VOCABULARY, 16))
    root = math.sqrt((0.09 + 0.25) / 2)
    assert rate("prompt", model) == float(f"{0.75 * root:.3g}") == 0.309
    assert default_lr("prompt", "adamw", model)[1].endswith(
        "(0.75 × 0.412, the root mean square of this model's embeddings)"
    )
    adapted = attach(model, MethodSection(kind="prompt", virtual_tokens=4), 0, say=lambda _: None)
    with torch.no_grad():
        adapted.prompt_encoder["default"].embedding.weight.mul_(9)
    assert rate("prompt", adapted) == 0.309
    with torch.no_grad():
        model.get_input_embeddings().weight.div_(10)
    assert rate("prompt", adapted.bfloat16()) == pytest.approx(0.0309, rel=4e-3)


def test_without_numbers_a_prompts_rate_is_not_known_and_no_floor_is_judged_by_it():
    assert math.isnan(rate("prompt", wide(160)))
    assert math.isnan(peak_lr(TrainSection(min_lr=1e-3), "prompt", wide(160)))


def test_lion_takes_a_fifth_of_the_rate_and_its_own_betas():
    assert rate("lora", wide(4096), "lion_8bit") == 4e-5
    assert peak_lr(TrainSection(optimizer="lion_8bit"), "lora", wide(4096)) == 4e-5
    assert "a fifth of AdamW's 2e-05" in default_lr("full", "lion_8bit", wide(4096))[1]
    assert TrainSection(optimizer="lion_8bit").betas == (0.9, 0.99)
    assert TrainSection(optimizer="lion_8bit", betas=(0.5, 0.6)).betas == (0.5, 0.6)
    assert TrainSection(optimizer="adamw_8bit").betas == TrainSection().betas == (0.9, 0.999)


def test_a_floor_above_the_peak_is_refused():
    with pytest.raises(RecipeError) as error:
        peak_lr(TrainSection(min_lr=1e-3), "lora", wide(4096))
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


# -- in 8 bits ---------------------------------------------------------------------------------------------------------


def weights_and_gradients():
    """A matrix of 8-bit size, and one below it."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(n, 64, generator=generator)) for name, n in (("large", 64), ("b", 4))}
    for value in parameters.values():
        value.grad = torch.randn(value.shape, generator=generator)
    return parameters


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_what_is_small_is_remembered_in_32_bits_and_all_settings_arrive(name):
    said, parameters = [], weights_and_gradients()
    section = TrainSection(optimizer=name, weight_decay=0.5, betas=(0.8, 0.9))
    optimizer = make_optimizer(parameters, section, said.append)
    set_lr(optimizer, 0.1)
    optimizer.step()
    assert [(group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, (0.8, 0.9), 0.5)
    ]
    assert [optimizer.state[value]["state1"].dtype for value in parameters.values()] == [torch.uint8, torch.float32]
    paged = name == "paged_adamw_8bit"
    assert said == ["train.optimizer: a CPU has nothing to page to: paged_adamw_8bit is adamw_8bit"] * paged


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_the_steps_are_those_of_the_formula(name):
    """AdamW as PyTorch computes it; Lion (Chen et al. 2023): -lr · (sign(b1·m + (1-b1)·g) + decay · w)."""
    ours, theirs = weights_and_gradients(), weights_and_gradients()
    section = TrainSection(optimizer=name, weight_decay=0.1)
    optimizer = make_optimizer(ours, section)
    set_lr(optimizer, 0.01)
    reference = make_optimizer(theirs, section.model_copy(update={"optimizer": "adamw"}))
    set_lr(reference, 0.01)
    momentum = {key: torch.zeros_like(value) for key, value in theirs.items()}
    for _ in range(3):
        optimizer.step()
        if name == "adamw_8bit":
            reference.step()
            continue
        for key, value in theirs.items():
            step = torch.sign(0.9 * momentum[key] + 0.1 * value.grad)
            momentum[key] = 0.99 * momentum[key] + 0.01 * value.grad
            value.data = value.data * (1 - 0.01 * 0.1) - 0.01 * step
    assert (ours["b"] - theirs["b"]).abs().max() < 1e-6
    assert (ours["large"] - theirs["large"]).abs().mean() < 1e-3  # of 3e-2 that it moves: what 8 bits make of it


@pytest.mark.parametrize("name", ["adamw", *EIGHT_BITS])
def test_a_gradient_is_seen_in_what_is_remembered(name):
    parameters = weights_and_gradients()
    optimizer = make_optimizer(parameters, TrainSection(optimizer=name))
    set_lr(optimizer, 0.01)
    assert not any(has_gradient(optimizer, value) for value in parameters.values())
    gradients = [value.grad for value in parameters.values()]
    for value in parameters.values():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    assert not any(has_gradient(optimizer, value) for value in parameters.values())
    for value, gradient in zip(parameters.values(), gradients, strict=True):
        value.grad = gradient
    optimizer.step()
    assert all(has_gradient(optimizer, value) for value in parameters.values())


def test_paged_memory_is_paged_again_after_a_resume(monkeypatch):
    """Stands in for a GPU: the buffers that bitsandbytes makes are marked, and must be the ones that are filled."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    plain = Optimizer8bit.get_state_buffer

    def paged(self, value, dtype=torch.float32):
        buffer = plain(self, value, dtype)
        buffer.is_paged = True
        return buffer

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", paged)
    monkeypatch.setattr(Optimizer8bit, "prefetch_state", lambda self, value: None)
    parameters = weights_and_gradients()
    first, second = (make_optimizer(parameters, TrainSection(optimizer="paged_adamw_8bit")) for _ in range(2))
    set_lr(first, 0.01)
    first.step()
    for value in parameters.values():
        kept = {key: part.clone() for key, part in remembered(first, value).items()}
        assert not any(key.startswith("qmap") for key in kept)
        recall(second, value, kept)
        before, after = first.state[value], second.state[value]
        assert after["state1"].is_paged and after["state2"].is_paged and after["step"] == before["step"] == 1
        assert after.keys() == before.keys() and all(
            torch.equal(before[key], after[key]) for key in kept if key != "step"
        )


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_resumed_run_on_a_quantised_base_ends_bit_for_bit_as_one_that_never_stopped(tmp_path: Path, name):
    """And a checkpoint holds the adapter alone: rank 128 × 32 columns are 4,096 numbers, remembered in 8 bits."""
    tiny("qwen2").save_pretrained(tmp_path / "base")
    section = TrainSection(batch=4, steps=4, lr=1e-3, save_every=2, optimizer=name, tokens_per_pass=64)

    def run(folder: str, **options):
        asked = Quantization(double_quant=True)
        base = from_folder(tmp_path / "base", torch.float32, torch.device("cpu"), quantized=asked)[0]
        model = attach(base, MethodSection(r=128, target=["q_proj", "down_proj"], dropout=0.1), 0, say=lambda _: None)
        outcome = fit(tmp_path / folder, model, random_rows(8), section, proof=False, **options)
        return outcome.losses, trained(model)

    losses, straight = run("straight")
    (tmp_path / "again").mkdir()
    half = tmp_path / "straight" / "checkpoints" / "step-000002"
    (tmp_path / "again" / "metrics.jsonl").write_bytes((tmp_path / "straight" / "metrics.jsonl").read_bytes())
    again, resumed = run("again", resume=half)
    assert again == losses
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())
    newest = latest(tmp_path / "straight" / "checkpoints")
    trains = sum(value.nbytes for value in straight.values())
    assert sum(file.stat().st_size for file in newest.glob("*.safetensors")) < 3.5 * trains + 50_000
