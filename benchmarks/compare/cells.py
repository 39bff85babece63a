"""What is measured: a model's shape, a data set, so many of its rows; and their useful work.

A cell's folder holds everything that the contestants share: `model` (random bf16 weights, the tokenizer), `rows.jsonl`
(the raw rows of one optimizer step), `tokens.json` (the same rows as token ids and labels) and `adapter.safetensors`
(where every contestant's adapters start).
"""

from __future__ import annotations

import gzip
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

IGNORE = -100
"""The label of a token that is not taught."""
MORE = 4
"""Times as many rows are drawn as a step takes, since those longer than the cell's limit are left out."""


@dataclass(frozen=True)
class Shape:
    """A Qwen2 of random weights: it computes as fast as a trained one. Its head is its embedding."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    words: int = 151_936

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a layer's seven matrices."""
        kv = self.hidden // self.heads * self.kv_heads
        names = {"q": (self.hidden, self.hidden), "k": (self.hidden, kv), "v": (self.hidden, kv)}
        names |= {"o": (self.hidden, self.hidden), "gate": (self.hidden, self.ffn), "up": (self.hidden, self.ffn)}
        return names | {"down": (self.ffn, self.hidden)}

    @property
    def decoder(self) -> int:
        """Parameters of the decoder's matrices."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.hidden * self.words


@dataclass(frozen=True)
class Data:
    """A data set: the file's name, the recipe's `data:` keys for it, and how many rows make a step of each shape."""

    file: str
    keys: dict[str, Any]
    rows: dict[str, int]
    max_length: int


@dataclass(frozen=True)
class Cell:
    """One table: a shape by its name, a data set by its name."""

    shape: str
    data: str

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.data}"


SHAPES = {"100m": Shape(512, 1536, 8, 8, 2), "0.5b": Shape(896, 4864, 24, 14, 2)}
S4 = "现在你要扮演皇帝身边的女人--甄嬛"
DATA = {
    "huanhuan": Data(
        "huanhuan.json",
        {"columns": {"prompt": ["instruction", "input"], "response": "output"}, "join": "", "system": S4},
        {"100m": 40, "0.5b": 12},
        384,
    ),
    "alpaca": Data("alpaca_52k.json.gz", {}, {"100m": 24, "0.5b": 8}, 384),
    "sharegpt_zh": Data("sharegpt_zh.jsonl", {}, {"100m": 8, "0.5b": 4}, 1024),
    "advertisegen": Data(
        "advertisegen.jsonl", {"columns": {"prompt": "content", "response": "summary"}}, {"100m": 16, "0.5b": 6}, 384
    ),
}
USUAL = [Cell("100m", "huanhuan"), Cell("0.5b", "alpaca")]
FEWER = {cell.name: rows for cell, rows in zip(USUAL, (20, 6), strict=True)}
"""Rows a step of the usual cells, which have minutes only."""
ALL = [Cell(shape, data) for shape in SHAPES for data in DATA]


def useful_work(shape: Shape, rows: Sequence[tuple[int, int]]) -> float:
    """Floating-point operations that a step with a frozen base cannot do without: Σ 4·P·t + 4·H·s + 6·L·d·t².

    rows: (t tokens, s of them supervised). P: the decoder's matrices, H: the head's, L layers of width d. Forward and
    the gradient of the inputs are two products of 2 operations each; attention has t²/2 pairs, two products forward
    and four backward. Recomputation, padding and the optimizer count nothing.
    """
    attention = 6 * shape.layers * shape.hidden
    return float(sum(4 * shape.decoder * t + 4 * shape.head * s + attention * t * t for t, s in rows))


def shared_work(shape: Shape, rows: Sequence[tuple[int, int]], spared: int, prefix: int) -> float:
    """useful_work of the same rows where `spared` of their tokens are not computed again: copies of a beginning of
    `prefix` tokens, each of which takes prefix² pairs of attention with it."""
    attention = 6 * shape.layers * shape.hidden
    return useful_work(shape, rows) - spared * (4.0 * shape.decoder + attention * prefix)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with; at least the last of every row is its own."""
    first = rows[0]
    for length in range(min(map(len, rows))):
        if any(row[length] != first[length] for row in rows):
            return length
    return min(map(len, rows)) - 1


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Raw rows of a JSON array or of JSON lines, gzipped or not."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    if text.lstrip().startswith("["):
        rows: list[dict[str, Any]] = json.loads(text)
        return rows
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make(cell: Cell, folder: Path, data: Path, tokenizer: Path, count: int) -> dict[str, Any]:
    """Fill a cell's folder with `count` rows; gives back the facts of its rows.

    data: the folder of data files; tokenizer: a Qwen2 tokenizer's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "model.safetensors").is_file():
        make_model(SHAPES[cell.shape], folder / "model", tokenizer)
    write_json(folder / "recipe.yaml", recipe(cell, folder, count))
    raw = read_rows(data / DATA[cell.data].file)
    drawn = np.random.default_rng(0).permutation(len(raw))[: MORE * count]
    write_rows(folder / "rows.jsonl", [raw[number] for number in drawn])
    kept = [number for number, _, _ in encoded(folder / "recipe.yaml")][:count]
    write_rows(folder / "rows.jsonl", [raw[drawn[number]] for number in kept])
    found = encoded(folder / "recipe.yaml")
    assert len(found) == count, f"{cell.name}: {len(found)} rows of at most {DATA[cell.data].max_length} tokens"
    tokens = [{"input_ids": ids, "labels": labels} for _, ids, labels in found]
    write_json(folder / "tokens.json", tokens)
    start_adapter(folder)
    lengths = [(len(row["input_ids"]), sum(label != IGNORE for label in row["labels"])) for row in tokens]
    prefix = common_prefix([row["input_ids"] for row in tokens])
    return {"rows": count, "lengths": lengths, "common_prefix": prefix}


def recipe(cell: Cell, folder: Path, count: int) -> dict[str, Any]:
    """The run as Luthier takes it: S4's figures, without dropout, at a constant rate."""
    limit = DATA[cell.data].max_length
    rows = {"train": str(folder / "rows.jsonl"), "max_length": limit, "bad_rows": "skip"}  # one with an empty answer
    return {
        "run": "bench",
        "model": {"name": str(folder / "model"), "dtype": "bf16"},
        "data": rows | DATA[cell.data].keys,
        "method": {"kind": "lora", "r": 8, "alpha": 32, "dropout": 0.0, "target": "all_linear"},
        "train": {"batch": count, "steps": 1, "lr": 1e-4, "schedule": "constant", "warmup": 0, "devices": "cpu"},
    }


def make_model(shape: Shape, folder: Path, tokenizer: Path) -> None:
    """Random bf16 weights, always the same, in a Hugging Face folder."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    known = AutoTokenizer.from_pretrained(tokenizer)
    config = Qwen2Config(
        vocab_size=shape.words,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=known.eos_token_id,
        pad_token_id=known.pad_token_id,
        dtype="bfloat16",
    )
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def encoded(path: Path) -> list[tuple[int, list[int], list[int]]]:
    """The recipe's rows as Luthier encodes them: (number in the file, ids, labels)."""
    from luthier.loaded import load_data, load_encoder
    from luthier.recipe import load_recipe

    chosen = load_recipe(path, [])
    _, _, encoder = load_encoder(chosen, lambda line: None, date(2026, 1, 1))
    examples = load_data(chosen, encoder, lambda line: None).train
    found = []
    for row in range(len(examples)):
        example = examples[row]
        labels = np.where(example.supervised, example.ids, IGNORE)
        found.append((int(examples.origin(row).rpartition(":")[2]) - 1, example.ids.tolist(), labels.tolist()))
    return found


def start_adapter(folder: Path) -> None:
    """Write the adapters that Luthier starts from, for the others to start from as well."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from luthier.models.adapters import attach
    from luthier.recipe import load_recipe

    chosen = load_recipe(folder / "recipe.yaml", [])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that it is giving up
        adapted = attach(model, chosen.method, chosen.train.seed, say=lambda line: None)
    parts = {name: value.detach() for name, value in adapted.named_parameters() if value.requires_grad}
    save_file({short(name): value.contiguous() for name, value in parts.items()}, folder / "adapter.safetensors")


def conversation(cell: Cell, row: dict[str, Any]) -> list[dict[str, str]]:
    """A raw row as messages, for those who read nothing else."""
    keys = DATA[cell.data].keys
    if "conversations" in row:
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    columns = keys.get("columns", {"prompt": ["instruction", "input"], "response": "output"})
    names = columns["prompt"] if isinstance(columns["prompt"], list) else [columns["prompt"]]
    asked = keys.get("join", "\n").join(row[name] for name in names if row.get(name))
    system = [{"role": "system", "content": keys["system"]}] if "system" in keys else []
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row[columns["response"]]}]
    return [*system, *turns]


def short(name: str) -> str:
    """A parameter's name from its layer on: wrappers put other things before it."""
    return name[name.index("layers.") :].replace("._orig_mod", "")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=None), encoding="utf-8")
