"""What a cell of the matrix is tried with: a family's tiny model in a format, a method on it, steps of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.pack import Pass, behind, pack
from luthier.engine.forward import SummedLoss, adopt, base_of, inputs_of, on_device
from luthier.engine.rungs import rungs
from luthier.engine.soft import virtual_of
from luthier.generate import generate
from luthier.models.adapters import attach, save_adapter
from luthier.models.load import load_model
from luthier.sections import EngineSection, GenerateSection, MethodSection, ModelSection, TrainSection
from luthier.training import checkpoint
from luthier.training.optim import make_optimizer, set_lr
from rows import random_rows, tiny
from tiny import tiny_tokenizer
from vendorglm import vendor_folder

CPU = torch.device("cpu")
ROWS = random_rows(4, longest=16)
EVERY = np.arange(4)
SUPERVISED = int(ROWS.supervised.sum())
PROMPTS = [[5, 9, 20, 31, 7], [14, 8, 6]]
RATE, GATES = 0.01, 0.05
"""AdamW's: a tensor moves by about this at each step, and weights spread by 0.2; gates begin at 0 and open with it."""
TOKENIZER = tiny_tokenizer()
ANSWER = GenerateSection(max_new_tokens=4)
VIRTUAL = 4
SMALL: dict[str, dict[str, Any]] = {
    "bottleneck": {"size": 6},
    "llama_adapter": {"virtual_tokens": VIRTUAL, "layers": 2},
    **{kind: {"virtual_tokens": VIRTUAL} for kind in ("prompt", "prefix", "p_tuning")},
}
"""Keys of a kind whose default is for larger models."""
TYPES = {"yuan2": "yuan"}
"""A family's model_type, where it has another name."""


def silent(line: str) -> None:
    """Nobody listens."""


def write_base(family: str, folder: Path) -> Path:
    """A tiny model of the family with a tokenizer; ChatGLM3 in its vendor's layout."""
    if family == "chatglm3":
        vendor_folder(folder, words=61, num_layers=2)
    else:
        tiny(TYPES.get(family, family)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def load(folder: Path, held: str) -> Any:
    """held: fp32, bf16, or int8 and nf4 over bf16."""
    dtype: Any = held if held in ("fp32", "bf16") else "bf16"
    quantize: Any = "none" if dtype == held else held
    model = load_model(folder, ModelSection(name="tiny", dtype=dtype, quantize=quantize), CPU, say=silent)
    model.generation_config.eos_token_id = None
    return model


def attached(base: Any, kind: str) -> Any:
    return attach(base, MethodSection(kind=kind, **SMALL.get(kind, {})), 1, say=silent, tokenizer=None)


def trainable(model: Any) -> dict[str, Any]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def loss_of(model: Any, part: Pass, route: Any = "engine") -> Tensor:
    found: Tensor = SummedLoss(model.train(), route)(on_device(behind(part, virtual_of(model)), CPU))
    return found


def with_gradients(model: Any, part: Pass, route: Any = "engine") -> tuple[float, dict[str, Tensor]]:
    """The summed loss of a pass, and of everything that trains its gradient."""
    loss, values = loss_of(model, part, route), trainable(model)
    return loss.item(), dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """fp32 [places, V]: the rows in one packed pass, in evaluation."""
    adopt(model)
    pass_ = on_device(behind(pack(ROWS, EVERY), virtual_of(model)), CPU)
    found: Tensor = base_of(model.eval())(**inputs_of(model, pass_)).logits[0].float()
    return found


def answers(model: Any) -> list[list[int]]:
    return [reply.ids for reply in generate(model, TOKENIZER, PROMPTS, ANSWER, [])]


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """Steps of AdamW on the packed rows, through the engine with every function of its."""

    model: Any

    def __post_init__(self) -> None:
        self.values = trainable(self.model)
        self.optimizer = make_optimizer(self.values, TrainSection(), silent)
        set_lr(self.optimizer, GATES if any("attention_gate" in name for name in self.values) else RATE)

    def step(self) -> float:
        """The mean loss before it."""
        with rungs(self.model, EngineSection()):
            loss = loss_of(self.model, pack(ROWS, EVERY)) / SUPERVISED
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def loss(self) -> float:
        """The mean loss as it stands."""
        return loss_of(self.model, pack(ROWS, EVERY)).item() / SUPERVISED

    def save(self, folder: Path) -> Path:
        def write(target: Path) -> None:
            save_adapter(self.model, target)

        state = checkpoint.TrainState(0, step=2)
        return checkpoint.save(folder, write, self.values, self.optimizer, state, 1, [checkpoint.generators(CPU)])

    def resume(self, folder: Path) -> None:
        checkpoint.load(folder, self.values, self.optimizer, silent)


def copies(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainable(model).items()}
