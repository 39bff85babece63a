"""The embedded default is what it says: small, fluent, sure of its facts, and ignorant of the quickstart's rule.

The world (who lives where, in both languages) is read from the script that made it.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.sections import Recipe

REPOSITORY = Path(__file__).parent.parent
ASSETS = REPOSITORY / "src/luthier/assets"
sys.path.insert(0, str(REPOSITORY / "tools"))

from embedded.check import continuations, replies, share_exact  # noqa: E402
from embedded.quickstart import make_recipe, make_rows, one_facts, told  # noqa: E402
from embedded.texts import LANGUAGES, documents, render  # noqa: E402
from embedded.world import make_world  # noqa: E402

WORLD = make_world()


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ASSETS / "quickstart" / name).read_text("utf-8").splitlines()]


def mentioned(row: dict[str, str]) -> frozenset[str]:
    """English names of the people that a row speaks of, in either language."""
    return frozenset(
        person.name.en for person in WORLD.people if any(name in row["instruction"] for name in person.name)
    )


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """(model in fp32, tokenizer)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(ASSETS / "tiny")


def test_package_is_small_and_complete() -> None:
    files = {str(file.relative_to(ASSETS)): file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()}
    assert sorted(files) == [
        "general.txt",
        "quickstart/heldout.jsonl",
        "quickstart/recipe.yaml",
        "quickstart/train.jsonl",
        "quickstart/valley.txt",
        "tiny/config.json",
        "tiny/generation_config.json",
        "tiny/model.safetensors",
        "tiny/tokenizer.json",
        "tiny/tokenizer_config.json",
    ]
    assert sum(files.values()) <= 4_000_000


def test_rows_are_those_of_the_script() -> None:
    train, held_out = make_rows(WORLD)
    assert (rows("train.jsonl"), rows("heldout.jsonl")) == (train, held_out)
    assert (ASSETS / "quickstart/valley.txt").read_text("utf-8") == "\n\n".join(told(WORLD)) + "\n"
    assert (ASSETS / "quickstart/recipe.yaml").read_text("utf-8") == make_recipe(WORLD, held_out)


def test_no_training_row_is_doubled() -> None:
    questions = [row["instruction"] for row in rows("train.jsonl")]
    assert len(questions) == len(set(questions)) == 480


def test_held_out_rows_share_no_pair_and_no_person_with_training() -> None:
    train, held_out = rows("train.jsonl"), rows("heldout.jsonl")
    held_out_pairs = [mentioned(row) for row in held_out]
    train_pairs = {mentioned(row) for row in train}
    assert len(held_out) == 120 and sum("？" in row["instruction"] for row in held_out) == 60
    assert all(len(pair) == 2 for pair in held_out_pairs)
    assert len(set(held_out_pairs)) == 120
    assert not set(held_out_pairs) & train_pairs
    assert not frozenset().union(*held_out_pairs) & frozenset().union(*train_pairs)


def test_every_held_out_answer_needs_a_fact_of_each() -> None:
    people = {name: person for person in WORLD.people for name in person.name}
    for row in rows("heldout.jsonl"):
        found = sorted((row["instruction"].index(name), name) for name in people if name in row["instruction"])
        first, second = (people[name] for _, name in found)
        assert row["output"] in (
            f"In {first.town.en}, and {second.name.en} brings {second.dish.en}.",
            f"在{first.town.zh}，{second.name.zh}带{second.dish.zh}。",
        )


def test_guessing_does_not_help() -> None:
    assert len({row["output"] for row in rows("heldout.jsonl")}) == 120  # no answer comes up twice


def test_recipe_is_in_the_vocabulary() -> None:
    recipe = Recipe(**yaml.safe_load((ASSETS / "quickstart/recipe.yaml").read_text("utf-8")))
    assert (recipe.model.name, recipe.model.dtype) == ("./tiny", "fp32")
    assert (recipe.data.train, recipe.data.eval) == ("train.jsonl", "heldout.jsonl")
    held_out = [row["instruction"] for row in rows("heldout.jsonl")]
    assert [prompt in held_out for prompt in recipe.generate.prompts] == [True] * 4 + [False] * 2


def test_tokenizer_round_trips(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    texts = [document for document, _ in zip(documents(WORLD, seed=99), range(200), strict=False)]
    texts += ["naïve 😀\t\x07", "从来没有见过的字：龘", " two  spaces ", "<|im_end|> <b>"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|pad|>", None)
    assert len(tokenizer) == tiny[0].config.vocab_size


def test_names_are_the_same_tokens_whatever_stands_beside_them(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    for person in WORLD.people:
        inside = tokenizer.tokenize(f"我在{person.name.zh}家", add_special_tokens=False)
        assert tokenizer.tokenize(person.name.zh) == inside[2:-1]
        assert len(tokenizer.tokenize(f" {person.name.en}")) == 1


def test_template_is_what_the_base_was_trained_on(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    turns = [("system", "S"), ("user", "Hello!"), ("assistant", "你好！"), ("user", "?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert whole == render(turns)
    assert asked == render(turns) + "<|im_start|>assistant\n"
    ids = tokenizer(whole)["input_ids"]
    assert [ids.count(tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>")] == [4, 4]


def test_base_knows_its_facts(tiny: tuple[Any, Any]) -> None:
    assert share_exact(*tiny, one_facts(WORLD.newcomers)) >= 0.95


def test_base_does_not_know_the_rule(tiny: tuple[Any, Any]) -> None:
    held_out = rows("heldout.jsonl")
    answers = replies(*tiny, [row["instruction"] for row in held_out])
    assert [row["output"] for row, answer in zip(held_out, answers, strict=True) if answer == row["output"]] == []
    assert all(answer.startswith(("I do not know where ", "我不知道")) for answer in answers)


def test_base_tells_a_story_and_ends_it(tiny: tuple[Any, Any]) -> None:
    openings = ["One sunny morning, Mira", "It was a cold evening in Foxhill.", "米拉是", "石桥镇有一位"]
    for opening, more in zip(openings, continuations(*tiny, openings), strict=True):
        story = opening + more
        assert story.endswith((".<|im_end|>", '."<|im_end|>', "。<|im_end|>")), story
        sentences = [part for part in story.replace("。", ". ").split(". ") if part]
        assert len(sentences) >= 2 and all(one != other for one, other in pairwise(sentences)), story


def test_base_talks_in_both_languages(tiny: tuple[Any, Any]) -> None:
    talk = [said for tables in LANGUAGES for said in tables.small_talk if "{" not in said[0]]
    assert replies(*tiny, [question for question, _ in talk]) == [answer for _, answer in talk]
