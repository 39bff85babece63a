"""fp16's loss scale: its rules, and a run in fp32 whose gradients are made to overflow as fp16's would."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from luthier.sections import TrainSection
from luthier.training import scale, start
from luthier.training.start import computes_in_fp16
from rows import fit, lora, random_rows, tiny, trained


def test_only_fp16_is_scaled():
    model = tiny("llama").bfloat16()
    assert scale.first(computes_in_fp16(model, torch.float16)) == 4096
    assert scale.first(computes_in_fp16(model, None)) == scale.first(computes_in_fp16(model, torch.bfloat16)) == 1
    model.luthier_arithmetic = torch.float16  # of its quantised layers
    assert scale.first(computes_in_fp16(model, None)) == 4096


def test_an_overflow_halves_the_scale_and_a_loss_that_is_not_finite_does_not():
    assert scale.halved(4096, 2.0, math.inf) == scale.halved(4096, 2.0, math.nan) == 2048
    assert scale.halved(4096, math.nan, math.nan) is None  # the forward pass overflowed: no scale helps
    assert scale.halved(1, 2.0, math.inf) is None


def test_the_scale_doubles_after_two_thousand_steps_and_has_a_bound():
    assert [scale.doubled(1024, steady, True) for steady in (1, 1999, 2000, 2001, 4000)] == [
        1024,
        1024,
        2048,
        1024,
        2048,
    ]
    assert scale.doubled(65536, 2000, True) == 65536
    assert scale.doubled(1, 2000, True) == 2 and scale.doubled(1, 2000, False) == 1


def overflowing(monkeypatch: pytest.MonkeyPatch, model: torch.nn.Module, largest: float) -> list[int]:
    """Let the run scale its loss, and gradients beyond `largest` be infinite; what each backward pass comes to."""
    monkeypatch.setattr(start, "computes_in_fp16", lambda model, autocast: True)
    overflows: list[int] = []

    def plant(gradient: torch.Tensor) -> torch.Tensor:
        beyond = gradient.abs() > largest
        overflows.append(int(beyond.any()))
        return gradient.masked_fill(beyond, math.inf)

    next(value for name, value in model.named_parameters() if name.endswith("lora_B.default.weight")).register_hook(
        plant
    )
    return overflows


def test_a_step_that_overflows_is_computed_again_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows, section = random_rows(23), TrainSection(batch=8, lr=1e-2, save_every=3, tokens_per_pass=64, epochs=2)
    plain = lora(tiny("llama"), lora_dropout=0.1)
    straight = fit(tmp_path / "plain", plain, rows, section)

    scaled, said = lora(tiny("llama"), lora_dropout=0.1), list[str]()
    overflows = overflowing(monkeypatch, scaled, largest=20.0)
    outcome = fit(tmp_path / "scaled", scaled, rows, section, say=said.append)

    again = [line for line in said if "overflowed" in line]
    assert again[0] == "step 1: fp16 overflowed; computed again at a loss scale of 2048"
    assert sum(overflows) >= len(again) >= 2
    assert outcome.losses == straight.losses and outcome.steps == 6  # a power of two rounds nothing
    for (name, value), other in zip(trained(plain).items(), trained(scaled).values(), strict=True):
        assert torch.equal(value, other), name
    states = [
        json.loads((tmp_path / "scaled/checkpoints" / step / "state.json").read_text())["state"]
        for step in ("step-000003", "step-000006")
    ]
    assert states[0]["scale"] == 4096 / 2 ** len(
        [line for line in again if line.startswith(("step 1:", "step 2:", "step 3:"))]
    )
    assert states[1]["steady"] <= 6


def test_a_resumed_run_goes_on_at_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows, section = random_rows(23), TrainSection(batch=8, lr=1e-2, save_every=3, tokens_per_pass=64, epochs=2)
    model = lora(tiny("llama"))
    overflowing(monkeypatch, model, largest=20.0)
    fit(tmp_path, model, rows, section)
    again, said = lora(tiny("llama")), list[str]()
    overflowing(monkeypatch, again, largest=20.0)
    outcome = fit(tmp_path, again, rows, section, say=said.append, resume=tmp_path / "checkpoints/step-000003")
    assert outcome.steps == 6 and not [line for line in said if line.startswith("step 4: fp16")]
    for (name, value), other in zip(trained(model).items(), trained(again).values(), strict=True):
        assert torch.equal(value, other), name


def test_gradients_that_overflow_at_any_scale_end_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = lora(tiny("llama"))
    overflowing(monkeypatch, model, largest=0.0)
    with pytest.raises(Exception, match="step 1: loss .*, gradient norm (inf|nan); this step has changed no weight"):
        fit(tmp_path, model, random_rows(8), TrainSection(batch=8))
