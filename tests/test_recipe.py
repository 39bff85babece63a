"""A recipe is read strictly, complained of all at once and in plain words, and saved as it was understood."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from luthier.conflicts import idle
from luthier.errors import RecipeError
from luthier.methods import METHODS
from luthier.recipe import (
    load_recipe,
    new_recipe,
    recipe_difference,
    recipe_schema,
    run_name,
    save_recipe,
    show_recipe,
)
from luthier.sections import Columns, DataFile, Recipe, TrainSection
from luthier.vocabulary import all_keys, find
from reading import MINIMAL, problems, read


def test_a_minimal_recipe_is_all_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, MINIMAL)
    assert recipe == Recipe.model_validate({"model": {"name": "hf:a/b"}, "data": {"train": "hf:c/d"}})
    assert (recipe.train.batch, recipe.train.epochs, recipe.train.steps) == (16, 1.0, None)
    assert run_name(recipe, "there/huanhuan.yaml") == "huanhuan"
    assert run_name(read(tmp_path, MINIMAL, "run=mine"), "there/huanhuan.yaml") == "mine"


def test_epochs_default_to_one_only_without_steps() -> None:
    assert TrainSection().epochs == 1.0
    assert TrainSection(steps=10).epochs is None
    assert TrainSection(epochs=3).epochs == 3.0


def test_a_share_and_a_number_are_told_apart(tmp_path: Path) -> None:
    recipe = read(tmp_path, MINIMAL, "data.eval=0.02", "train.warmup=2")
    assert (recipe.data.eval, recipe.train.warmup) == (0.02, 2)
    assert isinstance(recipe.train.warmup, int)
    recipe = read(tmp_path, MINIMAL, "data.eval=50", "train.warmup=0.1")
    assert (recipe.data.eval, recipe.train.warmup) == (50, 0.1)
    assert isinstance(recipe.data.eval, int)


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        MINIMAL + "train:\n  # batch: 4\n",
        "train.lr=1e-3",
        "train.lr=1e-4",
        "generate.prompts=[a, 你是谁]",
        "data.columns.prompt=[instruction, input]",
        "data.columns.response=output",
        'data.join="\\n\\n"',
        "train.epochs=null",
        "train.steps=5",
        "data.system=a=b",
    )
    assert recipe.train.lr == 1e-4
    assert recipe.generate.prompts == ["a", "你是谁"]
    assert recipe.data.columns == Columns(prompt=["instruction", "input"], response="output")
    assert recipe.data.join == "\n\n"
    assert (recipe.train.steps, recipe.train.epochs) == (5, None)
    assert recipe.data.system == "a=b"


SYSTEMS = {
    "S2": """
model: {name: alpindale/gemma-2b}
data: {train: hf:Abirate/english_quotes, text: "Quote: {quote}\\nAuthor: {author}", supervise: all, max_length: 1024}
method: {kind: lora, r: 8, alpha: 8, dropout: 0, target: all_linear}
train: {batch: 4, steps: 10, lr: 2e-4, schedule: linear, warmup: 2, weight_decay: 0, clip: 1.0, log_every: 1, seed: 42}
generate: {prompts: ["Quote: Imagination is more"], raw: true, max_new_tokens: 20}
""",
    "S3": """
model: {name: hf:a/b}
data: {train: hf:c/d, columns: {prompt: [instruction, input], response: output},
       text: "### Human: {prompt} ### Assistant: {response}", supervise: answers, sample: 1000,
       write_text: belle_1000.jsonl, max_length: 512}
method: {kind: lora, r: 64, alpha: 16, dropout: 0.1, bias: none, target: [q_proj, v_proj]}
train: {batch: 16, steps: 100, lr: 2e-4, schedule: linear, warmup: 0, log_every: 10, seed: 42, devices: [0]}
merge: {dtype: fp16}
""",
    "S4": """
model: {name: modelscope:qwen/Qwen2-1.5B-Instruct, dtype: bf16}
data: {train: hf:c/d, columns: {prompt: [instruction, input], response: output}, join: "",
       system: 现在你要扮演皇帝身边的女人--甄嬛, max_length: 384}
method: {kind: lora, r: 8, alpha: 32, dropout: 0.1, target: all_linear}
train: {batch: 40, epochs: 3, lr: 1e-4, schedule: linear, warmup: 0, log_every: 10, save_every: 100,
        activation_checkpointing: true}
generate: {prompts: [你是谁, 1.11 和 1.9 那个大], max_length: 2500, sample: true, top_k: 1}
""",
    "S7": """
model: {name: zai-org/chatglm3-6b}
data: {train: hf:HasturOfficial/adgen, columns: {prompt: [content, input], response: summary}, join: "\\n",
       before_prompt: "", template: glm3_pair, max_prompt: 510, max_answer: 1535, too_long: cut, seed: 8}
method: {kind: lora, r: 4, alpha: 32, dropout: 0.05, target: [query_key_value]}
train: {batch: 48, epochs: 1, lr: 1e-3, schedule: linear, warmup: 0.1, optimizer: adamw, log_every: 100, seed: 42}
""",
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_systems_recipes_load_and_come_back_equal(tmp_path: Path, name: str) -> None:
    recipe = read(tmp_path, SYSTEMS[name])
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


# -- paths -------------------------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_recipe_and_come_back_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "recipes"
    for folder in (here / "tiny", tmp_path / "data" / "rows"):
        folder.mkdir(parents=True)
    for file in ("data/a.jsonl", "data/b.csv", "recipes/t.jinja", "recipes/p.txt"):
        (tmp_path / file).write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = """\
model: {name: tiny}
data:
  train: [../data/a.jsonl, {path: ~/data/b.csv, weight: 0.5}, hf:x/y, ../data/rows/, {path: modelscope:x/y}]
  eval: ../data/b.csv
  template: t.jinja
  write_text: ../data/out.jsonl
generate: {prompts: p.txt}
"""
    (here / "r.yaml").write_text(text)
    recipe = load_recipe("recipes/r.yaml")
    assert recipe.model.name == f"{here}/tiny"
    assert recipe.data.train == [
        f"{tmp_path}/data/a.jsonl",
        DataFile(path=f"{tmp_path}/data/b.csv", weight=0.5),
        "hf:x/y",
        f"{tmp_path}/data/rows",
        DataFile(path="modelscope:x/y"),
    ]
    assert recipe.data.eval == f"{tmp_path}/data/b.csv"
    assert recipe.data.template == f"{here}/t.jinja"
    assert recipe.data.write_text == f"{tmp_path}/data/out.jsonl"
    assert recipe.generate.prompts == f"{here}/p.txt"


@pytest.mark.parametrize(
    ("name", "absolute"),
    [("gpt2", False), ("owner/name", False), ("hf:owner/name", False), (".", True), ("../models", True), ("/", True)],
)
def test_a_model_is_a_folder_by_its_looks_or_where_there_is_one(tmp_path: Path, name: str, absolute: bool) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "recipes").mkdir()
    read_name = read(tmp_path / "recipes", MINIMAL, f"model.name={name}").model.name
    assert Path(read_name).is_absolute() is absolute
    assert absolute or read_name == name


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "recipes"
    here.mkdir()
    (here / "huanhuan.json").write_text("[]")
    (tmp_path / "mine.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    text = """\
model: {name: ./tiny}
data:
  train: [huanhan.json, mine.jsonl, Abirate/english_quotes, huanhuan.json]
  eval: other.csv
  template: t.jinja
  write_text: out/rows.jsonl
generate: {prompts: p.txt}
"""
    assert problems(here, text) == [
        "recipe.yaml:1: model.name: there is no tiny",
        "recipe.yaml:3: data.train[0]: there is no huanhan.json; did you mean huanhuan.json?",
        "recipe.yaml:3: data.train[1]: there is no mine.jsonl; a path is relative to the recipe's file",
        "recipe.yaml:3: data.train[2]: there is no Abirate/english_quotes; a data set on the hub is written "
        "hf:Abirate/english_quotes",
        "recipe.yaml:4: data.eval: there is no other.csv",
        "recipe.yaml:5: data.template: there is no t.jinja",
        f"recipe.yaml:6: data.write_text: there is no folder {here}/out".replace(f"{here}/", ""),
        "recipe.yaml:7: generate.prompts: there is no p.txt",
    ]
    recipe = load_recipe(here / "recipe.yaml", check_files=False)
    assert recipe.model.name == f"{here}/tiny"
    assert problems(here, MINIMAL, "model.name=./huanhuan.json") == [
        "override: model.name: huanhuan.json is a file; a model is a folder"
    ]


def test_the_data_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    told = problems(tmp_path, MINIMAL, "data.train=[rows.jsonl]", "data.write_text=./rows.jsonl")
    assert told == ["override: data.write_text: would overwrite the data in rows.jsonl"]


# -- saved, shown, compared, begun -------------------------------------------------------------------------------------


def test_the_saved_recipe_is_complete_readable_and_equal(tmp_path: Path) -> None:
    text = """\
run: 甄嬛
model: {name: hf:a/b}
data:
  train: [hf:a/b, {path: hf:c/d, weight: 2}]
  columns: {prompt: [instruction, input], response: output}
  text: "问：{prompt}\\n答：{response}"
train: {steps: 5, lr: 2e-5}
generate:
  prompts: [是谁, "yes", "2e-4", "a long prompt that goes on and on, so that the list does not fit on one line"]
  sample: true
  top_k: 1
"""
    recipe = read(tmp_path, text)
    save_recipe(recipe, tmp_path / "saved.yaml")
    saved = (tmp_path / "saved.yaml").read_text(encoding="utf-8")
    assert (
        saved
        == """\
run: 甄嬛
model:
  name: hf:a/b
  revision: null
  dtype: auto
  quantize: none
  trust_vendor_code: false
data:
  train: ['hf:a/b', {path: 'hf:c/d', weight: 2.0}]
  eval: null
  format: auto
  columns: {prompt: [instruction, input], response: output}
  join: "\\n"
  before_prompt: ''
  template: auto
  text: "问：{prompt}\\n答：{response}"
  system: null
  supervise: answers
  max_length: 2048
  max_prompt: null
  max_answer: null
  too_long: drop
  sample: null
  bad_rows: error
  write_text: null
  seed: 42
method:
  kind: lora
  r: 8
  alpha: 16.0
  dropout: 0.0
  bias: none
  target: auto
  modules_to_save: []
train:
  batch: 16
  steps: 5
  epochs: null
  lr: 2.0e-05
  schedule: cosine
  min_lr: 0.0
  warmup: 0.03
  optimizer: adamw
  betas: [0.9, 0.999]
  eps: 1.0e-08
  weight_decay: 0.0
  clip: 1.0
  precision: auto
  activation_checkpointing: false
  base_dropout: false
  tokens_per_pass: auto
  devices: auto
  log_every: 1
  eval_every: epoch
  save_every: epoch
  keep: 3
  early_stop: null
  seed: 42
engine:
  packed: true
  chunked_loss: true
  fused_lora: true
  fused_layers: true
  fp32_products: true
  fast_attention: true
  shared_prefixes: true
  prefetch: true
  compile: false
generate:
  prompts:
    - 是谁
    - 'yes'
    - '2e-4'
    - a long prompt that goes on and on, so that the list does not fit on one line
  raw: null
  max_new_tokens: 256
  max_length: null
  sample: true
  temperature: 1.0
  top_k: 1
  top_p: null
  stop: []
  quantize: null
  seed: 42
merge:
  dtype: auto
track: []
"""
    )
    again = load_recipe(tmp_path / "saved.yaml")
    assert again == recipe
    save_recipe(again, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "saved.yaml").read_bytes()


def test_keys_without_effect_are_not_saved(tmp_path: Path) -> None:
    recipe = read(tmp_path, MINIMAL, "method.kind=full")
    save_recipe(recipe, tmp_path / "saved.yaml")
    saved = (tmp_path / "saved.yaml").read_text(encoding="utf-8")
    assert "method:\n  kind: full\ntrain:\n" in saved
    assert "  sample: false\n  stop: []\n" in saved
    assert saved.endswith("  seed: 42\nmerge:\n  dtype: auto\ntrack: []\n")
    assert {"method.r", "generate.top_k"} < set(idle(recipe))
    assert load_recipe(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize("kind", list(METHODS))
def test_every_method_is_saved_with_its_own_keys_alone(tmp_path: Path, kind: str) -> None:
    recipe = read(tmp_path, MINIMAL, f"method.kind={kind}")
    save_recipe(recipe, tmp_path / "saved.yaml")
    saved = (tmp_path / "saved.yaml").read_text(encoding="utf-8")
    body = saved.partition("method:\n")[2].partition("train:\n")[0]
    assert {line.split(":")[0].strip() for line in body.splitlines()} == METHODS[kind].fields | {"kind"}
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_a_method_that_is_not_there(tmp_path: Path) -> None:
    for word, meant in {
        "dorra": "; did you mean dora?",
        "p_tunning": "; did you mean p_tuning?",
        "ptuning_v2": "; here that is prefix",
        "houlsby": "; here that is bottleneck, with method.placement: houlsby",
    }.items():
        (line,) = problems(tmp_path, MINIMAL, f"method.kind={word}")
        assert line.startswith("override: method.kind: must be lora, dora, rslora, ") and line.endswith(meant), line
    for given, told in {
        "method.r=0": "override: method.r: must be a whole number ≥ 1, is 0",
        "method.virtual_tokens=0": "override: method.virtual_tokens: must be a whole number ≥ 1 or null, is 0",
    }.items():
        assert problems(tmp_path, MINIMAL, given) == [told]
    assert problems(tmp_path, MINIMAL, "method.use_dora=true") == [
        "override: method.use_dora: a key of PEFT; here: method.kind (dora)"
    ]


def test_a_saved_recipe_takes_overrides(tmp_path: Path) -> None:
    save_recipe(read(tmp_path, MINIMAL), tmp_path / "saved.yaml")
    recipe = load_recipe(tmp_path / "saved.yaml", ["train.epochs=null", "train.steps=7", "method.r=4"])
    assert (recipe.train.steps, recipe.method.r) == (7, 4)


def test_show_marks_what_is_left_to_luthier(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(MINIMAL + "train: {batch: 16}\n", encoding="utf-8")
    shown = show_recipe(tmp_path / "recipe.yaml", ["train.lr=1e-4"])
    lines = shown.split("\n")
    assert "run: null  # default" in lines
    assert "  name: hf:a/b" in lines
    assert "  batch: 16" in lines
    assert "  lr: 0.0001" in lines
    assert "  epochs: 1.0  # default" in lines
    assert "  r: 8  # default" in lines
    (tmp_path / "shown.yaml").write_text(shown, encoding="utf-8")
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe(tmp_path / "recipe.yaml", ["train.lr=1e-4"])


def test_the_difference_of_two_recipes(tmp_path: Path) -> None:
    old = read(tmp_path, MINIMAL, "train.lr=1e-4", "run=a")
    new = read(tmp_path, MINIMAL, "train.lr=2e-4", "data.columns.prompt=[a, b]", "method.target=[q_proj]")
    assert recipe_difference(old, old) == []
    assert recipe_difference(old, new) == [
        "run: a -> null",
        "data.columns: null -> {prompt: [a, b]}",
        "method.target: auto -> [q_proj]",
        "train.lr: 0.0001 -> 0.0002",
    ]


@pytest.mark.parametrize("kind", METHODS)
def test_a_new_recipe_loads_and_explains_itself(tmp_path: Path, kind: str) -> None:
    (tmp_path / "rows.csv").write_text("prompt,response\n")
    text = new_recipe("hf:x/y", "rows.csv", kind)
    recipe = read(tmp_path, text)
    assert (recipe.model.name, recipe.data.train) == ("hf:x/y", f"{tmp_path}/rows.csv")
    assert (recipe.method.kind, recipe.data.eval) == (kind, 0.05)
    lines = text.split("\n")
    section = lines[lines.index("method:") + 1 : lines.index("train:") - 1]
    keys = [line.strip().partition(":")[0] for line in section if not line.startswith("  # ")]
    assert keys[0] == "kind" and set(keys[1:]) == METHODS[kind].fields, "the keys that the kind takes, and no other"
    assert all(section[section.index(line) - 1].startswith("  # ") for line in section if not line.startswith("  # "))
    said = " ".join(line.removeprefix("  # ") for line in lines[: lines.index("  lr: auto")])
    assert said.endswith(f"Peak learning rate; auto is the method's own: {METHODS[kind].why}.")
    assert lines[lines.index("  batch: 16") - 1] == (
        "  # Rows in one optimizer step. A choice of learning; how they are cut into passes never changes the result."
    )
    assert max(map(len, lines)) <= 120


def test_a_new_recipe_speaks_of_its_own_kind() -> None:
    assert "  # The adapter's output is scaled by alpha / r.\n" in new_recipe(kind="lora")
    assert "  # The adapter's output is scaled by alpha / r (rslora: alpha / √r).\n" in new_recipe(kind="rslora")
    assert "  # Rank of the adapters.\n" in new_recipe(kind="vera")
    vera = f"  # VeRA, with PEFT's own defaults; `luthier methods` shows all {len(METHODS)}.\n"
    assert vera in new_recipe(kind="vera")
    with pytest.raises(RecipeError, match="^--kind: there is no method ptuning; did you mean p_tuning\\?$"):
        new_recipe(kind="ptuning")
    with pytest.raises(RecipeError, match="^--kind: there is no method 中; known are lora, dora, "):
        new_recipe(kind="中")


def test_the_schema_is_for_editors() -> None:
    schema = recipe_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (schema["title"], schema["required"]) == ("Luthier recipe", ["model", "data"])
    assert schema["additionalProperties"] is False
    batch = schema["$defs"]["TrainSection"]["properties"]["batch"]
    assert (batch["minimum"], batch["default"]) == (1, 16)
    assert batch["description"].startswith("Rows in one optimizer step.")
    assert json.loads(json.dumps(schema)) == schema
    for name in all_keys():
        for place in all_keys()[name]:
            node = find(tuple(place.split(".")))
            assert node is not None
            assert "description" in node or "$ref" in node, place


def test_the_page_in_the_docs_is_what_the_vocabulary_says() -> None:
    root = Path(__file__).parent.parent
    page = runpy.run_path(str(root / "tools" / "make_docs.py"))["recipe_page"]()
    assert (root / "docs" / "recipe.md").read_text(encoding="utf-8") == page, "run: python tools/make_docs.py"
