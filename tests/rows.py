"""Encoded rows without a data path: what luthier.data.examples.Examples offers, over lists."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.data.batches import order_of
from luthier.folder import RunFolder
from luthier.models import families
from luthier.sections import EngineSection, TrainSection
from luthier.training.distributed import World
from luthier.training.loop import train
from luthier.training.monitor import Monitor
from luthier.training.outcome import Outcome

VOCABULARY = 61
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
ROTARY: dict[str, Any] = {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # ten times the usual: what attention does, matters
}
OWN: dict[str, dict[str, Any]] = {
    "gemma": {**ROTARY, "tie_word_embeddings": True},
    "gemma2": {
        **ROTARY,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 4,
        "sliding_window": 8,  # in the first of the two layers
        "attn_logit_softcapping": 2.0,  # Google's 50 and 30 would bend nothing in so small a model
        "final_logit_softcapping": 3.0,
    },
    "glm": {
        **ROTARY,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    "mistral": {**ROTARY, "sliding_window": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2},
    "yuan": {"intermediate_size": 48, "initializer_range": 0.2},
}
"""What a family's configuration needs beside SIZE; llama, phi3, qwen2 and qwen3 need ROTARY."""


class Row(NamedTuple):
    ids: np.ndarray
    supervised: np.ndarray


class Rows:
    """`rows`: (ids, number of leading tokens that are not supervised)."""

    def __init__(self, rows: Sequence[tuple[list[int], int]]) -> None:
        self.rows = rows
        self.lengths = np.array([len(ids) for ids, _ in rows], np.int32)
        self.supervised = np.array([len(ids) - prompt for ids, prompt in rows], np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Row:
        ids, prompt = self.rows[row]
        return Row(np.array(ids, np.int32), np.arange(len(ids)) >= prompt)

    def origin(self, row: int) -> str:
        return f"rows.jsonl:{row + 1}"


def random_rows(count: int, seed: int = 0, shortest: int = 4, longest: int = 20) -> Rows:
    """Rows of unlike lengths, a third or so of each a prompt."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, longest + 1, count)
    return Rows([(generator.integers(3, VOCABULARY, n).tolist(), int(max(1, n // 3))) for n in lengths])


def tiny(family: str, *, tied: bool = False, dropout: float = 0.0) -> Any:
    """A 2-layer model of random weights in fp32; the same at every call. `dropout` is OPT's own; Gemmas are tied."""
    families.register()  # yuan is Luthier's own
    config = {**SIZE, "tie_word_embeddings": tied, **OWN.get(family, ROTARY)}
    if family == "opt":
        config["dropout"] = dropout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
        for parameter in model.parameters():
            if not parameter.any():  # transformers starts biases (and Gemma's norms) at 0, which would hide mistakes
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def lora(model: Any, **config: Any) -> Any:
    """The model with rank-4 adapters on all linear layers but the head, the same at every call."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that it is giving up
        torch.manual_seed(2)
        return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **config))


def fit(
    path: Path,
    model: Any,
    train_rows: Rows,
    section: TrainSection,
    *,
    eval_rows: Rows | None = None,
    kind: str = "lora",
    say: Callable[[str], None] = lambda line: None,
    resume: Path | None = None,
    write: Callable[[Path], None] | None = None,
    world: World | None = None,
    proof: bool = True,
    ask: Any = None,
    engine: EngineSection | None = None,
) -> Outcome:
    """Train in the run folder `path`, in the order of data seed 7."""
    world = world or World.alone(torch.device("cpu"))
    path.mkdir(exist_ok=True)
    folder = RunFolder(path)
    return train(
        model,
        SimpleNamespace(train=train_rows, eval=eval_rows),  # type: ignore[arg-type]
        order_of([(0, len(train_rows), 1.0)], seed=7, batch=section.batch),
        section,
        kind,
        folder,
        pad_id=0,
        write=write or model.save_pretrained,
        monitor=Monitor(folder, section, say, writes=world.leads),
        say=say,
        world=world,
        resume=resume,
        proof=proof,
        ask=ask and (lambda most: ask(most) or []),
        engine=engine or EngineSection(),
    )


def trained(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the trainable tensors."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
