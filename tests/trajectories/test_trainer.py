"""One step's gradient is that of transformers' Trainer over the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FAMILIES
from reference import padded
from transformers import Trainer, TrainerCallback, TrainingArguments

from luthier.sections import TrainSection
from rows import fit, lora, random_rows, tiny

ROWS = random_rows(11, longest=30)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Filled with each trained tensor's gradient as it is accumulated: what is there after one step is that step's."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            value.register_post_accumulate_grad_hook(
                lambda value, name=name: found.__setitem__(name, value.grad.clone())
            )
    return found


def trainers(model: Any, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of one optimizer step over ROWS: four batches of at most three rows, padded each for itself."""
    found: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            found.update({n: v.grad.clone() for n, v in given["model"].named_parameters() if v.grad is not None})

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=4,
        max_steps=1,
        max_grad_norm=0,  # no clipping
        learning_rate=1e-3,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(range(len(ROWS))),
        data_collator=lambda numbers: padded(ROWS, numbers),
        callbacks=[Keep()],
    )
    return trainer.train().training_loss, found


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_gradient_is_that_of_transformers_trainer(tmp_path: Path, family: str, kind: str) -> None:
    """Sabotage, each by itself: the mean of the passes' means; the mask dropped; position ids not restarted (OPT)."""

    def model() -> Any:  # adapters that already do something: all of their gradients differ from 0
        return lora(tiny(family), init_lora_weights=False) if kind == "lora" else tiny(family)

    expected_loss, expected = trainers(model(), tmp_path / "trainer")
    ours = model()
    found = gradients(ours)
    section = TrainSection(batch=len(ROWS), steps=1, lr=1e-3, clip=None, tokens_per_pass=64)
    outcome = fit(tmp_path / "run", ours, ROWS, section, kind=kind)
    assert json.loads((tmp_path / "run" / "proof.json").read_text(encoding="utf-8"))["path"] == "engine"
    assert outcome.losses == pytest.approx([expected_loss], rel=1e-5)
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        # 0 but for rounding is the gradient of OPT's key biases, which change no softmax
        scale = max(value.abs().max(), 0.01 * largest)
        assert (found[name] - value).abs().max() < 1e-5 * scale, name
