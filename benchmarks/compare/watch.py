"""The callback by which transformers' Trainer, and everything derived from it, is timed. An epoch is one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from probe import Probe
from safetensors.torch import load_file
from transformers import TrainerCallback

WARM = 16
"""Tokens of the forward and backward pass that goes before the first step: it starts threads and loads kernels."""


class Watch(TrainerCallback):
    """Starts the adapters where all contestants' start, times the steps and notes their losses."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        model = others["model"]
        start = load_file(Path(self.probe.job["folder"]) / "adapter.safetensors")
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        for name, value in trained.items():
            value.data.copy_(start.pop(name[name.index("layers.") :].replace("._orig_mod", "")))
        assert not start, f"no such adapters here: {sorted(start)[:3]}"
        kinds = sorted({str(value.dtype).removeprefix("torch.") for value in trained.values()})
        weights = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if not p.requires_grad})
        self.probe.facts |= {"adapters": kinds, "weights": weights}
        ids = torch.arange(WARM).unsqueeze(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(args.bf16)):
            torch.autograd.backward(model(input_ids=ids, labels=ids).loss)
        model.zero_grad()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.probe.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.probe.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        if logs and "loss" in logs:
            self.probe.losses.append(float(logs["loss"]))
            self.probe.norms.append(float(logs["grad_norm"]))


def arguments(job: dict[str, Any], batch: int, accumulation: int) -> dict[str, Any]:
    """What all Trainers are told: S4's rate at a constant value, no dropout, no files."""
    return {
        "output_dir": str(Path(job["work"]) / "out"),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": job["steps"],
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 42,
    }


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
