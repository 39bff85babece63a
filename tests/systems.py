"""The seven systems, small: a random model of the family in its vendor's layout, a tokenizer, some rows.

The tokenizer and the rows are the real ones where the shared folder is there, else stand-ins; `System.begin` tells.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import REPOSITORY
from tiny import tiny_tokenizer

RECIPES = REPOSITORY / "recipes"
ROWS = 24
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2500,
    "initializer_range": 0.2,
}
LLAMA = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": False}


@dataclass(frozen=True)
class System:
    """One of the seven. `model`: model_type and configuration; None where it is a folder of the oracle."""

    name: str
    recipe: str
    data: str
    rows: Callable[[], Iterator[dict[str, str]]]
    tokenizer: str
    model: tuple[str, dict[str, Any]] | None = None
    changes: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()  # special tokens that the stand-in for the tokenizer needs
    quantised: bool = False

    def begin(self, folder: Path, shared: Path | None) -> tuple[list[str], list[str]]:
        """Put model and data into `folder`; the overrides that machine and clock ask for, and what is no real thing."""
        real = shared is not None and (shared / self.tokenizer).is_dir()
        _model(self, folder / "model.v1", shared if real else None)
        name = self.data.removesuffix(".gz")
        _data(self, folder / name, shared)
        stands_in = [] if real else ["tokenizer"]
        stands_in += [] if shared else ["data"]
        return ["model.name=./model.v1", f"data.train={name}", *self.changes], stands_in


def _model(system: System, path: Path, shared: Path | None) -> None:
    """A dot in the folder's name, as the tutorials' folders have one."""
    if system.model is None:
        tiny = shared / system.tokenizer if shared else REPOSITORY / "tests/assets" / system.tokenizer.split("/")[1]
        source = tiny if shared else tiny.with_name(tiny.name.replace("tiny", "mini"))
        shutil.copytree(source, path, ignore=shutil.ignore_patterns("expected*"))
        for file in [path, *path.iterdir()]:
            file.chmod(0o755 if file.is_dir() else 0o644)
    tokenizer = None
    if shared is None:
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": list(system.marks)})
        if system.model is None:
            _grow(path, len(tokenizer))
    elif system.model is not None:
        path.mkdir()
        for file in (shared / system.tokenizer).iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    if system.model is not None:
        kind, config = system.model
        words = len(tokenizer) if tokenizer else {"llama": 32000, "opt": 50272, "qwen2": 151936, "gemma": 32000}[kind]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=words, **config))
        model.to(torch.bfloat16 if kind in ("qwen2", "gemma") else torch.float16).save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _grow(path: Path, words: int) -> None:
    """The small fixtures know 256 tokens: their rows again for those beyond."""
    config = json.loads((path / "config.json").read_text())
    key = "padded_vocab_size" if "padded_vocab_size" in config else "vocab_size"
    tensors = load_file(path / "model.safetensors")
    grown = {name: torch.cat([t, t])[:words] if t.shape[0] == config[key] else t for name, t in tensors.items()}
    save_file(grown, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config | {key: words}))


def _data(system: System, path: Path, shared: Path | None) -> None:
    if shared is not None:
        _beginning(shared / "data" / system.data, path)
    elif path.suffix == ".csv":
        rows = list(system.rows())
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(system.rows()), ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in system.rows()), encoding="utf-8")


def _beginning(source: Path, path: Path) -> None:
    """The first of the rows: all of them would be encoded, which takes longer than the rest of a journey."""
    text = (gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()).decode()
    if path.suffix == ".json":
        text = json.dumps(json.loads(text)[: 10 * ROWS], ensure_ascii=False, indent=0)
    else:
        text = "".join(text.splitlines(keepends=True)[: 10 * ROWS])
    path.write_text(text, encoding="utf-8")


def _instructions() -> Iterator[dict[str, str]]:
    for i in range(6 * ROWS):
        yield {"instruction": f"Where is {i}?", "input": "In town?" if i % 3 else "", "output": f"By the river {i}."}


def _quotes() -> Iterator[dict[str, str]]:
    for i in range(6 * ROWS):
        yield {"quote": f"“Imagination {i} is more.”", "author": f"Albert {i}", "tags": "[]"}


def _pairs() -> Iterator[dict[str, str]]:
    for i in range(6 * ROWS):
        yield {"source_set": "town", "en": f"The river {i} is old.", "zh": f"第{i}条河很老。"}


def _adverts() -> Iterator[dict[str, str]]:
    for i in range(6 * ROWS):
        yield {"content": f"类型#上衣*号{i}", "summary": f"这件上衣是第{i}号。"}


FEW = f"data.sample={ROWS}"
SHORT = ("train.steps=4", "train.epochs=null")
SYSTEMS = [
    System(
        "S1", "s1_llama2_7b_int8.yaml", "alpaca_52k.json.gz", _instructions, "tokenizers/llama2",
        ("llama", LLAMA), (FEW, "data.max_length=256", "generate.max_new_tokens=12", *SHORT), quantised=True,
    ),
    System(
        "S2", "s2_gemma_2b_nf4.yaml", "english_quotes.jsonl", _quotes, "tokenizers/none",
        ("gemma", LLAMA | {"head_dim": 16, "tie_word_embeddings": True}), 
        (FEW, "generate.max_new_tokens=8"), quantised=True,
    ),
    System(
        "S3", "s3_llama2_13b_chinese_nf4.yaml", "alpaca_zh_17k.json.gz", _instructions, "tokenizers/llama2",
        ("llama", LLAMA),
        (FEW, "train.devices=cpu", "track=[]", "train.steps=4", "generate.prompts=[你好]", "generate.max_new_tokens=8"),
        quantised=True,
    ),
    System(
        "S4", "s4_qwen2_1_5b_huanhuan.yaml", "huanhuan.json", _instructions, "tokenizers/qwen2",
        ("qwen2", LLAMA | {"hidden_size": 16}), ("data.sample=49", "train.epochs=2", "generate.max_length=100"),
    ),
    System(
        "S5", "s5_yuan2_2b_medical.yaml", "medical_zh_en.csv", _pairs, "oracle/yuan2-tiny", None,
        (FEW, "data.max_length=256", "generate.max_new_tokens=8"), ("<eod>", "<sep>"),
    ),
    System(
        "S6", "s6_opt_6_7b_int8.yaml", "english_quotes.jsonl", _quotes, "tokenizers/opt",
        ("opt", SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 64, "init_std": 0.2}), (FEW, "train.steps=5"),
        quantised=True,
    ),
    System(
        "S7", "s7_chatglm3_6b_adgen.yaml", "advertisegen.jsonl", _adverts, "oracle/chatglm3-tiny", None,
        (f"data.sample={6 * ROWS}", "data.max_prompt=60", "data.max_answer=60", "data.max_length=126",
         "generate.max_new_tokens=8"),
        ("[gMASK]", "sop", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"), quantised=True,
    ),
]  # fmt: skip
