"""What `luthier plan` foretells of a step's memory, and what the step takes: python benchmarks/plan.py (Linux).

A random Qwen2 of 102 M parameters (8 layers × 512 × 1,536, 151,936 words, tied) in bf16 on the CPU, LoRA r 8 on all
linear layers, rows of 256 tokens: the increase over the process that has loaded the model, for three sizes of the pass,
with and without activation checkpointing. Each figure is a process of its own; medians, as no heap is the same twice.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from luthier.data.pack import Pass, pack
from luthier.engine.forward import adopt
from luthier.engine.rungs import rungs
from luthier.models.adapters import attach
from luthier.plan import Bare, _Assumed, memory
from luthier.sections import DataSection, EngineSection, MethodSection, ModelSection, Recipe, TrainSection
from luthier.training.distributed import World
from luthier.training.gradients import Gradients
from luthier.training.optim import make_optimizer, set_lr
from luthier.training.start import recompute_activations

ROW, STEPS, REPETITIONS = 256, 3, 3
SHAPE = Qwen2Config(
    vocab_size=151_936,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


class Cell(NamedTuple):
    tokens: int
    checkpointing: bool


CELLS = [Cell(tokens, again) for again in (False, True) for tokens in (512, 1024, 2048)]


def main() -> None:
    print("tokens  recomputed  foretold  measured")
    found = {}
    for cell in CELLS:
        predicted, taken = found[cell] = compared(cell, REPETITIONS)
        again, off = "yes" if cell.checkpointing else "no", predicted / taken - 1
        print(f"{cell.tokens:6,}  {again:10}  {predicted:4.0f} MiB  {taken:4.0f} MiB  {off:+.0%}", flush=True)
    orders = [sorted(CELLS, key=lambda cell: found[cell][column]) for column in (0, 1)]
    print("order right" if orders[0] == orders[1] else f"order: foretold {orders[0]}, measured {orders[1]}")


def compared(cell: Cell, repetitions: int) -> tuple[float, float]:
    """Medians of what is foretold and what is measured, in MiB."""
    both = []
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16).save_pretrained(folder)
        for what in ("foretold", "measured"):
            command = [sys.executable, __file__, what, folder, str(cell.tokens), str(int(cell.checkpointing))]
            runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repetitions)]
            both.append(statistics.median(json.loads(run.stdout.splitlines()[-1]) for run in runs))
    return both[0], both[1]


def one(what: str, folder: Path, cell: Cell) -> float:
    section = TrainSection(activation_checkpointing=cell.checkpointing)
    part = pack(_Assumed(ROW), range(cell.tokens // ROW))
    if what == "measured":
        return measured(folder, part, section)
    recipe = Recipe(model=ModelSection(name=str(folder)), data=DataSection(train="-"), train=section)
    return memory(Bare(recipe, folder, torch.bfloat16, "cpu"), part).increase / 2**20


def measured(folder: Path, part: Pass, section: TrainSection) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the mapped file, whose pages come and go
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    model = attach(model, MethodSection(), 42, say=lambda _: None)
    adopt(model)
    if section.activation_checkpointing:
        recompute_activations(model)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = make_optimizer(parameters, section)
    world = World.alone(torch.device("cpu"))
    gradients = Gradients(model.train(), "engine", world, None, pad_id=0, autocast=None, beat=lambda: None)
    with rungs(model, EngineSection()):
        for step in range(STEPS):
            torch.autograd.backward(gradients.loss(part, step) / part.ids.size)
            set_lr(optimizer, 1e-4)
            optimizer.step()
            optimizer.zero_grad()
    return status("VmHWM") - before


def status(key: str) -> float:
    """Of this process, in MiB."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one(sys.argv[1], Path(sys.argv[2]), Cell(int(sys.argv[3]), sys.argv[4] == "1"))))
    else:
        main()
