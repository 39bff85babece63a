"""What benchmarks/gpu.py measures: rows, models, the engine with so many of its rungs, and the usual ways beside it.

Needs torch, transformers, PEFT and accelerate; bitsandbytes, TRL and datasets where they are used.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

FLAGS = [
    "packed",
    "chunked_loss",
    "fast_attention",
    "shared_prefixes",
    "fused_lora",
    "fused_layers",
    "fp32_products",
    "prefetch",
]
LADDER = {"packed": 2, "+ fast attention": 3, "+ shared prefixes": 4, "+ fused LoRA": 5, "+ fused layers": 6}
"""Rungs added one by one: so many of FLAGS are on. (Prefetch, and compile, are the training loop's.)"""


def make_sections() -> None:
    """Where pydantic is missing, a stand-in for the recipe's vocabulary: the engine looks at its flags alone."""
    if importlib.util.find_spec("pydantic"):
        return

    class Section(types.SimpleNamespace):
        def model_copy(self, update: dict[str, Any]) -> Section:
            return Section(**{**vars(self), **update})

    module: Any = types.ModuleType("luthier.sections")
    module.EngineSection = module.TrainSection = module.Section = Section
    module.Devices = module.Quantization = module.Recipe = Any
    sys.modules["luthier.sections"] = module


make_sections()
from luthier.engine import dropout  # noqa: E402 - the stand-in comes before
from luthier.engine.forward import adopt, base_of  # noqa: E402
from luthier.engine.rungs import rungs  # noqa: E402
from luthier.sections import EngineSection  # noqa: E402
from luthier.training.distributed import World  # noqa: E402
from luthier.training.gradients import Gradients  # noqa: E402

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = 16_384  # of a pass at most


class Cell(NamedTuple):
    """name, configuration, rows (as `draw` knows them), rows at once in the usual ways, whether the base is in NF4."""

    name: str
    config: PretrainedConfig
    rows: str
    at_once: int
    nf4: bool


class Row(NamedTuple):
    ids: np.ndarray
    supervised: np.ndarray


class Rows:
    """What luthier.data.examples.Examples offers, over a list."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.lengths = np.array([len(row.ids) for row in rows], np.int32)
        self.supervised = np.array([row.supervised.sum() for row in rows], np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Row:
        return self.rows[row]


def draw(kind: str, words: int) -> Rows:
    """huanhuan: 40 rows of 32 to 120 tokens, a quarter taught; alpaca: 16 of 50 to 400, half. Each begins alike."""
    random = np.random.default_rng(0)
    count, shared, taught = {"huanhuan": (40, 25, 0.25), "alpaca": (16, 32, 0.5)}[kind]
    begins, rows = random.integers(3, words, shared), []
    for _ in range(count):
        length = int(random.integers(32, 121) if kind == "huanhuan" else 50 + 350 * random.beta(1, 3))
        ids = np.concatenate([begins, random.integers(3, words, length - shared)]).astype(np.int32)
        rows.append(Row(ids, np.arange(length) >= length - max(2, round(taught * (length - shared)))))
    return Rows(rows)


# -- models and ways ---------------------------------------------------------------------------------------------------


def adapted(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, nf4: bool, drop: float = 0.0) -> Any:
    """Random weights with LoRA r 8 on the seven projections; B is not 0, so that it matters."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to(device)
    if nf4:
        quantise(model, dtype, device)
    model.is_loaded_in_4bit = nf4  # PEFT asks for it, and accelerate would ask for more
    made = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=drop, target_modules=SEVEN)
    )
    del model.is_loaded_in_4bit
    for parameter in trained(made).values():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return made.train()


def quantise(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """The decoder's linear layers in NF4, as transformers would load them."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.get_decoder().modules()):
        for name, old in list(parent.named_children()):
            if type(old) is nn.Linear:
                options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
                new = Linear4bit(
                    old.in_features,
                    old.out_features,
                    old.bias is not None,
                    compute_dtype=dtype,
                    device="meta",
                    **options,
                )
                new.weight = Params4bit(old.weight.data, requires_grad=False, module=new, **options).to(device)
                new.bias = old.bias
                setattr(parent, name, new)


def trained(model: Any) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def section(on: int) -> Any:
    return EngineSection(**{name: number < on for number, name in enumerate(FLAGS)})


@contextmanager
def engine(model: Any, on: int, seed: int | None = None, route: Any = "engine") -> Iterator[Gradients]:
    """The one place that knows how the engine is called: its first `on` flags, or its plain twin."""
    base, device = base_of(model), next(model.parameters()).device
    before = base.config._attn_implementation
    with settled(model), nullcontext() if seed is None else dropout.keyed(model, seed):
        if route == "engine":
            adopt(model)
        try:
            with rungs(model, section(on)) if route == "engine" else nullcontext():
                yield Gradients(
                    model,
                    route,
                    World.alone(device),
                    seed,
                    pad_id=0,
                    autocast=None,
                    beat=lambda: None,
                    engine=section(on),
                )
        finally:
            base.set_attn_implementation(before)


@contextmanager
def settled(model: Any) -> Iterator[None]:
    """Quantised layers compute as Luthier's do; afterwards as bitsandbytes' own."""
    from luthier.models.quantize import is_quantised, settle

    layers = [module for module in model.modules() if is_quantised(module)]
    if layers:
        settle(base_of(model), None)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


Way = Callable[[int], tuple[list[float], float]]
"""Steps → the seconds of each and the loss of the first."""


def of_engine(model: Any, rows: Rows, on: int, recompute: bool = False) -> Way:
    def way(steps: int) -> tuple[list[float], float]:
        base, parameters = base_of(model), list(trained(model).values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)
        seconds, losses = [], []
        if recompute:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        try:
            with engine(model, on) as gradients:
                for step in range(steps):
                    began = now()
                    found = gradients.of_step(rows, np.arange(len(rows)), step, TOKENS, None)  # type: ignore[arg-type]
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    seconds.append(now() - began)
                    losses.append(found.loss)
        finally:
            if recompute:
                base.gradient_checkpointing_disable()
                base.disable_input_require_grads()
        return seconds, losses[0].item()

    return way


def of_trainer(model: Any, rows: Rows, at_once: int, trl: str | None = None) -> Way:
    """transformers' Trainer as the tutorials use it: padded, full logits, checkpointing; or TRL's, padded or packed.

    One epoch is one step of all rows.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    seconds: list[float] = []

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            seconds.append(-now())

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            seconds[-1] += now()

    data = [{"input_ids": r.ids.tolist(), "labels": np.where(r.supervised, r.ids, -100).tolist()} for r in rows.rows]

    def way(steps: int) -> tuple[list[float], float]:
        seconds.clear()
        base = base_of(model)
        base.enable_input_require_grads()
        parts = len(rows) // at_once
        try:
            with tempfile.TemporaryDirectory() as folder:
                told: dict[str, Any] = {
                    "output_dir": folder, "per_device_train_batch_size": at_once, "gradient_accumulation_steps": parts,
                    "num_train_epochs": steps, "learning_rate": 1e-4, "logging_steps": 1, "save_strategy": "no",
                    "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": True,
                    "use_cpu": not next(model.parameters()).is_cuda,
                }  # fmt: skip
                if trl is None:
                    args = TrainingArguments(**told, remove_unused_columns=False)
                    trainer: Any = Trainer(model, args, data_collator=padded, train_dataset=data, callbacks=[Watch()])
                else:
                    trainer = of_trl(model, data, told, trl == "packed", Watch())
                trainer.remove_callback(PrinterCallback)
                trainer.train()
        finally:
            base.gradient_checkpointing_disable()
            base.disable_input_require_grads()
        return list(seconds), float(trainer.state.log_history[0]["loss"])

    return way


def of_trl(model: Any, data: list[dict[str, Any]], told: dict[str, Any], packed: bool, watch: Any) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    words = {"<pad>": 0, "<eos>": 1}  # it asks for a tokenizer, though the rows are tokens already
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    dataset = Dataset.from_list(data)
    if packed:
        parts = len(pack_dataset(dataset, 1024, "bfd"))
        told = told | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": parts}
    args = SFTConfig(**told, max_length=1024, packing=packed)
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[watch])


def padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[i < len(row["input_ids"]) for i in range(longest)] for row in rows]).long()
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


def now() -> float:
    """Seconds, when the card has done all that it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def gradients_of(model: Any, rows: Rows, on: int, route: str) -> list[Tensor]:
    with engine(model, on, seed=7, route=route) as gradients:
        found = gradients.of_step(rows, np.arange(len(rows)), 0, 2048, None)  # type: ignore[arg-type]
    values = [parameter.grad.detach().clone() for parameter in trained(model).values()]  # type: ignore[union-attr]
    model.zero_grad()
    return [found.loss, *values]
