"""YAML 1.2's values, and what is told where a file or an override is no YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from luthier.errors import RecipeError
from luthier.recipe import load_recipe
from luthier.yamlfile import write_value
from reading import MINIMAL, problems, read


def test_plain_values_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        "\ufeffrun: 2024-01-31\nmodel: {name: hf:a/b, revision: no}\n"
        "data: {train: hf:c/d, system: yes, before_prompt: 1:30, seed: 010}\n"
        "train: {lr: 2e-4, eps: 1E-6, betas: [.9, 0.95], weight_decay: 1e-2, batch: 0x10}\n"
        "generate: {stop: [on, off, ~x], sample: TRUE}\n",
    )
    assert recipe.run == "2024-01-31"
    assert (recipe.model.revision, recipe.data.system, recipe.data.before_prompt) == ("no", "yes", "1:30")
    assert (recipe.data.seed, recipe.train.batch) == (10, 16)
    assert (recipe.train.lr, recipe.train.eps, recipe.train.betas) == (2e-4, 1e-6, (0.9, 0.95))
    assert recipe.train.weight_decay == 0.01
    assert recipe.generate.stop == ["on", "off", "~x"]
    assert recipe.generate.sample is True


TEXTS = ["yes", "2e-4", "010", "0o17", "1:30", "2024-01-31", "~", "a: b", "x\n", "\u2028", "'", "[a]", "#", "甄嬛"]


def test_a_text_is_written_so_that_it_stays_one(tmp_path: Path) -> None:
    written = write_value(TEXTS)
    assert yaml.safe_load(written) == TEXTS  # a reader of YAML 1.1
    assert read(tmp_path, f"{MINIMAL}generate: {{stop: {written}}}\n").generate.stop == TEXTS
    for text in TEXTS:
        assert yaml.safe_load(f"key: {write_value(text)}") == {"key": text}


@pytest.mark.parametrize(
    ("value", "written"),
    [(16, "16"), (16.0, "16.0"), (1e-8, "1.0e-08"), (2e-5, "2.0e-05"), (True, "true"), (None, "null"), ([], "[]")],
)
def test_other_values_are_written_as_every_reader_knows_them(value: object, written: str) -> None:
    assert write_value(value) == written
    assert yaml.safe_load(written) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: the recipe is empty; `luthier recipe new` prints one to start from"),
        ("# only this\n", "recipe.yaml: the recipe is empty; `luthier recipe new` prints one to start from"),
        (
            "- a\n- b\n",
            "recipe.yaml:1: a recipe is keys with values, as in `model: {name: …}`; this is [a, b]",
        ),
        (
            "model:\n  name: a: b\n",
            "recipe.yaml:2:10: not YAML: mapping values are not allowed here; put a text that holds ': ' in quotes",
        ),
        (
            "model:\n\tname: a\n",
            "recipe.yaml:2:1: not YAML: while scanning for the next token, found character '\\t' that cannot start any "
            "token; indent with spaces",
        ),
        (
            "model:\n  name: a\ntrain:\n  batch：16\n  lr: 1e-4\n",
            "recipe.yaml:5:5: not YAML: mapping values are not allowed here; line 4 has a full-width '：', YAML needs "
            "':' and a blank",
        ),
        (
            "model: {name: a\n",
            "recipe.yaml:2:1: not YAML: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'",
        ),
        (
            "model: a\n---\nmodel: b\n",
            "recipe.yaml:2:1: not YAML: expected a single document in the stream, but found another document",
        ),
        ("model: {name: a}\n? [x]\n: 1\n", "recipe.yaml:2:3: not YAML: a key is a text"),
        (
            "model: {name: !!python/name:os.system }\n",
            "recipe.yaml:1:15: not YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/name:os.system'",
        ),
        ("run: x\nmodel: a\x07b\n", "recipe.yaml:2:9: not YAML: the character U+0007 may not stand in it"),
    ],
)
def test_what_is_no_yaml_is_told_with_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    assert problems(tmp_path, text) == [message]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there\.yaml: no such file$"):
        load_recipe(tmp_path / "there.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read \(Is a directory\)$"):
        load_recipe(tmp_path)
    (tmp_path / "gbk.yaml").write_bytes("run: 甄嬛\n".encode("gbk"))
    with pytest.raises(RecipeError, match=r"gbk\.yaml: not UTF-8 \(byte 5\); save it as UTF-8$"):
        load_recipe(tmp_path / "gbk.yaml")


def test_a_key_given_twice_names_both_lines(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL + "train:\n  lr: 1e-4\n  batch: 4\n  lr: x\n") == [
        "recipe.yaml:6: train.lr: given twice, here and on line 4; keep one"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "override: 'train.lr' is not key=value, as in train.lr=1e-4"),
        ("=3", "override: '=3' is not key=value, as in train.lr=1e-4"),
        ("train..lr=3", "override: 'train..lr=3' is not key=value, as in train.lr=1e-4"),
        (
            "generate.stop=[a",
            "override: generate.stop: not YAML: while parsing a flow sequence, expected ',' or ']', but got "
            "'<stream end>'; put it in quotes",
        ),
        (
            "data.system=a\x07",
            "override: data.system: not YAML: a character that may not stand in it; put it in quotes",
        ),
        (
            "data.text=Quote: {quote}",
            'override: data.text: must be a text or null, is {Quote: {quote: null}}; a text with braces or ": " in it '
            "is in quotes",
        ),
        ("train.batch=0", "override: train.batch: must be a whole number ≥ 1, is 0"),
        (
            "lora_r=8",
            "override: lora_r: a key of TRL, axolotl, litgpt, alpaca-lora; here: method.r (rank of the adapters)",
        ),
    ],
)
def test_an_override_is_told_as_one(tmp_path: Path, override: str, message: str) -> None:
    assert problems(tmp_path, MINIMAL, override) == [message]


def test_an_override_takes_the_place_of_all_that_stood_there(tmp_path: Path) -> None:
    text = "model: {name: hf:a/b}\ndata:\n  train:\n    - hf:c/d\n    - path: hf:e/f\n"
    assert problems(tmp_path, text, "data.train=[hf:c/d, {paht: hf:e/f}]") == [
        "override: data.train[1].paht: unknown key; did you mean data.train[1].path?",
        "override: data.train[1].path: missing: A file, a folder, `hf:owner/name[split]` or "
        "`modelscope:owner/name[split]`",
    ]
