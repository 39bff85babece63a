"""Every key and value by itself: what is wrong is told in plain words, with the bound and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import RecipeError
from luthier.methods import METHODS
from luthier.recipe import load_recipe
from luthier.vocabulary import all_keys
from reading import MINIMAL, problem, problems

KINDS = ", ".join(list(METHODS)[:-1]) + " or ln_tuning"
BATCH = "train.batch (rows in one optimizer step: batch size × accumulation)"


def test_every_problem_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = """\
model: {name: hf:a/b}
data:
  train: hf:c/d
  evl: 0.1
  template: chatml
  text: "Quote: {quote}\\nAuthor: {author}"
train:
  batchsize: 4
  per_device_train_batch_size: 4
  lr: fast
  epochs: 3
  steps: 4
  early_stop: 2
"""
    assert problems(tmp_path, text, "train.clip=0", "r=8") == [
        "recipe.yaml:4: data.evl: unknown key; did you mean data.eval?",
        "recipe.yaml:5: data.template: data.text is given as well and stands in its place; keep one",
        "recipe.yaml:8: train.batchsize: unknown key; did you mean train.batch?",
        f"recipe.yaml:9: train.per_device_train_batch_size: a key of transformers; here: {BATCH}",
        "recipe.yaml:10: train.lr: must be a number > 0 or auto, is 'fast'",
        "recipe.yaml:12: train.steps: train.epochs is given as well; keep one (on the command line: train.epochs=null)",
        "override: r: unknown key; r belongs to method: method.r",
        "override: train.clip: must be a number > 0 or null, is 0",
    ]


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("train", "batchsize: 3", "train.batchsize: unknown key; did you mean train.batch?"),
        ("train", "Batch: 3", "train.Batch: unknown key; did you mean train.batch?"),
        ("train", "save-every: 3", "train.save-every: unknown key; did you mean train.save_every?"),
        ("train", "r: 3", "train.r: unknown key; r belongs to method: method.r"),
        (
            "method",
            "weight_decay: 0",
            "method.weight_decay: unknown key; weight_decay belongs to train: train.weight_decay",
        ),
        (
            "model",
            "seed: 0",
            "model.seed: unknown key; seed belongs to data, train or generate: data.seed, train.seed, generate.seed",
        ),
        ("data", "prompt: x", "data.prompt: unknown key; prompt belongs to data.columns: data.columns.prompt"),
        ("data", "columns: {promt: x}", "data.columns.promt: unknown key; did you mean data.columns.prompt?"),
        (
            "data",
            "columns: {instruction: x}",
            "data.columns.instruction: unknown key; data.columns has prompt, response, system, history, messages",
        ),
        ("merge", "maxx_new_tokens: 3", "merge.maxx_new_tokens: unknown key; did you mean generate.max_new_tokens?"),
        ("merge", "zzz: 3", "merge.zzz: unknown key; merge has dtype"),
        (
            "merge",
            "generate: {sample: x}",
            "merge.generate: unknown key; generate belongs to the top of the recipe: generate",
        ),
        ("model", "quantise: nf4", "model.quantise: unknown key; did you mean model.quantize?"),
        (
            "model",
            "quantize: {double: true}",
            "model.quantize.double: unknown key; did you mean model.quantize.double_quant?",
        ),
        (
            "train",
            "virtual_tokens: 20",
            "train.virtual_tokens: unknown key; virtual_tokens belongs to method: method.virtual_tokens",
        ),
        ("data", "replay: {share: 0.1}", "data.replay: not in this version yet"),
        (
            "method",
            "lora-alpha: 3",
            "method.lora-alpha: a key of PEFT; here: method.alpha (the adapter's output is scaled by alpha / r)",
        ),
        (
            "merge",
            "learning_rat: 3",
            "merge.learning_rat: unknown key; did you mean learning_rate? Here: train.lr (peak learning rate)",
        ),
        (
            "train",
            "bf16: true",
            "train.bf16: a key of transformers; here: train.precision (fp32, bf16 or fp16)",
        ),
    ],
)
def test_unknown_keys(tmp_path: Path, section: str, line: str, message: str) -> None:
    assert problem(tmp_path, section, line) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian: {batch: 4}", "trian: unknown key; did you mean train?"),
        ("batch: 4", "batch: unknown key; batch belongs to train: train.batch"),
        ("train.lr: 1e-4", "train.lr: unknown key; write it nested, as in train: {lr: …}"),
        ("track: [wandb, wandb]", "track: [wandb, wandb] names a tracker twice"),
        ("track: [comet]", "track[0]: must be wandb, mlflow, swanlab or tensorboard, is 'comet'"),
        (
            "track: wandb",
            "track: must be a list of wandb, mlflow, swanlab or tensorboard, is 'wandb'; write [wandb]",
        ),
        (
            "wandb_project: town",
            "wandb_project: a key of axolotl, alpaca-lora; here: track (wandb in its list; the environment: "
            "WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME)",
        ),
        ("demo: {title: x}", "demo: not in this version yet"),
        ("qqq: 1", "qqq: unknown key; a recipe has run, model, data, method, train, engine, generate, merge, track"),
        (
            "lora_rank: 8",
            "lora_rank: a key of LLaMA-Factory, torchtune, ms-swift; here: method.r (rank of the adapters)",
        ),
    ],
)
def test_unknown_keys_at_the_top(tmp_path: Path, line: str, message: str) -> None:
    assert problems(tmp_path, f"{MINIMAL}{line}\n") == [f"recipe.yaml:3: {message}"]


def test_a_key_of_a_data_file_is_looked_up_too(tmp_path: Path) -> None:
    text = (
        "model: {name: hf:a/b}\ndata:\n  train:\n    - hf:c/d\n    - path: hf:e/f\n      wieght: 2\n    - weight: 2\n"
    )
    assert problems(tmp_path, text) == [
        "recipe.yaml:6: data.train[1].wieght: unknown key; did you mean data.train[1].weight?",
        "recipe.yaml:7: data.train[2].path: missing: A file, a folder, `hf:owner/name[split]` or "
        "`modelscope:owner/name[split]`",
    ]


# -- values ------------------------------------------------------------------------------------------------------------


def test_what_a_recipe_must_have(tmp_path: Path) -> None:
    assert problems(tmp_path, "run: x\ndata:\n") == [
        "recipe.yaml: model.name: missing: `hf:owner/name` (the default prefix), `modelscope:owner/name`, or a folder "
        "(relative to the recipe's file)",
        "recipe.yaml:2: data.train: missing: A file (json jsonl csv tsv parquet txt; gzip zstd), a folder, "
        "`hf:id[split]`, `modelscope:id[split]`, or a list of these and of {path, weight, columns}",
    ]


@pytest.mark.parametrize(
    ("section", "line", "message"),
    [
        ("train", "batch: 0", "train.batch: must be a whole number ≥ 1, is 0"),
        ("train", "batch: 4.0", "train.batch: must be a whole number ≥ 1, is 4.0"),
        ("train", 'batch: "16"', "train.batch: must be a whole number ≥ 1, is '16'; a number has no quotes"),
        ("train", "batch: true", "train.batch: must be a whole number ≥ 1, is true"),
        ("train", "batch:", "train.batch: has no value; it must be a whole number ≥ 1"),
        ("train", "batch: [1, 2]", "train.batch: must be a whole number ≥ 1, is [1, 2]"),
        ("train", "lr: 0", "train.lr: must be a number > 0 or auto, is 0"),
        ("train", "lr: .inf", "train.lr: must be a number > 0 or auto, is .inf"),
        ("train", "lr: atuo", "train.lr: must be a number > 0 or auto, is 'atuo'; did you mean auto?"),
        ("train", "warmup: 1.5", "train.warmup: must be a whole number ≥ 0 or a number ≥ 0 and < 1, is 1.5"),
        ("train", "warmup: -3", "train.warmup: must be a whole number ≥ 0 or a number ≥ 0 and < 1, is -3"),
        ("train", "betas: [0.9]", "train.betas: must be a list of 2 numbers ≥ 0 and < 1, is [0.9]"),
        ("train", "betas: [0.9, 1]", "train.betas[1]: must be a number ≥ 0 and < 1, is 1"),
        ("train", "devices: [0, x]", "train.devices[1]: must be cpu or a whole number ≥ 0, is 'x'"),
        ("train", "devices: []", "train.devices: must be auto, cpu or a list of cpu or of whole numbers ≥ 0, is []"),
        (
            "train",
            "devices: cuda",
            "train.devices: must be auto, cpu or a list of cpu or of whole numbers ≥ 0, is 'cuda'; here that is auto",
        ),
        ("train", "devices: [cpu, 0]", "train.devices: [cpu, 0] mixes the CPU with GPUs; name one kind"),
        ("train", "devices: [1, 1]", "train.devices: [1, 1] names a GPU twice; a GPU takes one process"),
        (
            "train",
            "precision: bfloat16",
            "train.precision: must be auto, fp32, bf16 or fp16, is 'bfloat16'; here that is bf16",
        ),
        (
            "train",
            "precision: half",
            "train.precision: must be auto, fp32, bf16 or fp16, is 'half'; here that is fp16",
        ),
        (
            "train",
            "optimizer: sgd",
            "train.optimizer: must be adamw, adamw_8bit, paged_adamw_8bit or lion_8bit, is 'sgd'",
        ),
        (
            "train",
            "optimizer: adamw_bnb_8bit",
            "train.optimizer: must be adamw, adamw_8bit, paged_adamw_8bit or lion_8bit, is 'adamw_bnb_8bit'; "
            "here that is adamw_8bit",
        ),
        (
            "model",
            "quantize: 4bit",
            "model.quantize: must be none, int8, nf4 or keys (kind, double_quant, compute_dtype), is '4bit'; "
            "here that is nf4",
        ),
        (
            "model",
            "quantize: {kind: nf4, compute_dtype: bfloat16}",
            "model.quantize.compute_dtype: must be auto, fp32, bf16 or fp16, is 'bfloat16'; here that is bf16",
        ),
        (
            "train",
            "schedule: cosin",
            "train.schedule: must be linear, cosine or constant, is 'cosin'; did you mean cosine?",
        ),
        ("train", "seed: -1", "train.seed: must be a whole number ≥ 0, is -1"),
        (
            "method",
            "kind: lorra",
            f"method.kind: must be {KINDS}, is 'lorra'; did you mean lora?",
        ),
        (
            "method",
            "kind: qlora",
            f"method.kind: must be {KINDS}, is 'qlora'; here that is lora, with model.quantize: nf4",
        ),
        ("method", "dropout: 1", "method.dropout: must be a number ≥ 0 and < 1, is 1"),
        (
            "method",
            "target: all-linear",
            "method.target: must be auto, all_linear or a list of texts, is 'all-linear'; here that is all_linear",
        ),
        (
            "method",
            "target: q_proj,v_proj",
            "method.target: must be auto, all_linear or a list of texts, is 'q_proj,v_proj'; write [q_proj, v_proj]",
        ),
        ("method", "target: [q_proj, 3]", 'method.target[1]: must be a text, is 3; a text is in quotes: "3"'),
        ("method", "modules_to_save: [a, '']", "method.modules_to_save[1]: must be a text, is empty"),
        ("data", "eval: 1.0", "data.eval: must be a number > 0 and < 1, a whole number ≥ 1, a text or null, is 1.0"),
        ("data", "eval: 0", "data.eval: must be a number > 0 and < 1, a whole number ≥ 1, a text or null, is 0"),
        ("data", "eval: true", "data.eval: must be a number > 0 and < 1, a whole number ≥ 1, a text or null, is true"),
        ("data", "max_length: 7", "data.max_length: must be a whole number ≥ 8, is 7"),
        ("data", "join: 3", 'data.join: must be a text, is 3; a text is in quotes: "3"'),
        ("data", "system: true", 'data.system: must be a text or null, is true; a text is in quotes: "true"'),
        (
            "data",
            "template: chatlm",
            "data.template: must be auto, chatml, llama2, glm3, glm3_pair, yuan2, plain or a .jinja file, is "
            "'chatlm'; did "
            "you mean chatml?",
        ),
        (
            "data",
            "format: openai",
            "data.format: must be auto, messages, sharegpt, alpaca, prompt or text, is 'openai'; here that is messages",
        ),
        (
            "data",
            "text: {quote}",
            'data.text: must be a text or null, is {quote: null}; a text with braces or ": " in it is in quotes',
        ),
        ("data", "text: quote", "data.text: 'quote' names no column; write at least one as {column}"),
        (
            "data",
            'text: "{quote"',
            "data.text: '{quote' is no pattern (expected '}' before end of string); write {{ and }} for braces "
            "that are text",
        ),
        (
            "data",
            'text: "{quote.x}"',
            "data.text: '{quote.x}' is no pattern: braces hold a column's name and nothing else; write {{ and }} "
            "for braces "
            "that are text",
        ),
        (
            "data",
            "columns: output",
            "data.columns: must be keys (prompt, response, system, history, messages) or null, is 'output'",
        ),
        ("generate", "sample: yes", "generate.sample: must be true or false, is 'yes'; write true"),
        ("generate", "sample: 1", "generate.sample: must be true or false, is 1"),
        ("generate", "raw: off", "generate.raw: must be true or false or null, is 'off'; write false"),
        ("generate", "top_p: 3", "generate.top_p: must be a number > 0 and ≤ 1 or null, is 3"),
        (
            "generate",
            "prompts: 你好",
            "generate.prompts: must be a list of texts or a .txt or .jsonl file, is '你好'; write [你好]",
        ),
        ("generate", "stop: '###'", "generate.stop: must be a list of texts, is '###'; write ['###']"),
        (
            "model",
            "dtype: torch.float16",
            "model.dtype: must be auto, fp32, bf16 or fp16, is 'torch.float16'; here that is fp16",
        ),
    ],
)
def test_wrong_values(tmp_path: Path, section: str, line: str, message: str) -> None:
    assert problem(tmp_path, section, line) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: Qwen/Qwen2-1.5B\ndata: {train: hf:c/d}\n",
            "recipe.yaml:1: model: is 'Qwen/Qwen2-1.5B', not a section; write model: {name: Qwen/Qwen2-1.5B}",
        ),
        (
            "model:\n  name:hf:a/b\ndata: {train: hf:c/d}\n",
            "recipe.yaml:1: model: is 'name:hf:a/b', not a section; write name: with a ':' and a blank behind it",
        ),
        (
            MINIMAL + "train:\n  batch：16\n",
            "recipe.yaml:3: train: is 'batch：16', not a section; write batch: with a ':' and a blank behind it",
        ),
        (MINIMAL + "method: lora\n", "recipe.yaml:3: method: is 'lora', not a section; write method: {kind: lora}"),
        (MINIMAL + "merge: [x]\n", "recipe.yaml:3: merge: is [x], not a section; its keys are dtype"),
        (MINIMAL + "run: 5\n", 'recipe.yaml:3: run: must be a text or null, is 5; a text is in quotes: "5"'),
    ],
)
def test_sections_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    assert problems(tmp_path, text) == [message]


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    assert problem(tmp_path, "method", f"kind: {'x' * 100}") == f"method.kind: must be {KINDS}, is '{'x' * 58}…"


ODD = (
    "null",
    "[]",
    "{}",
    "''",
    "-1",
    "0",
    "1.5",
    ".nan",
    "true",
    "text",
    "[[x]]",
    "{x: {y: 1}}",
    "[{x: 1}]",
    "../x",
    "~",
    "!!set {a}",
)


@pytest.mark.parametrize("name", all_keys())
def test_no_value_of_any_key_ends_in_a_traceback(tmp_path: Path, name: str) -> None:
    (tmp_path / "recipe.yaml").write_text(MINIMAL, encoding="utf-8")
    for key in all_keys()[name]:
        for value in ODD:
            try:
                load_recipe(tmp_path / "recipe.yaml", [f"{key}={value}"])
            except RecipeError as error:
                assert "override: " in str(error) or f"{key}: " in str(error)
                assert "Input should" not in str(error)
