"""Base against tuned: the same prompts, held-out answers counted exactly, and an adapter without effect refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from luthier.compare import (
    Comparison,
    Pair,
    Question,
    answers,
    asked,
    compare,
    held_out,
    largest_logit_difference,
    last_logits,
    probe_rows,
)
from luthier.data.encode import Encoder
from luthier.data.prepare import Data, prepare
from luthier.errors import RecipeError, RunError
from luthier.generate import Reply, generate
from luthier.models.adapters import adapter_off, attach
from luthier.models.load import load_model
from luthier.quiet import quiet
from luthier.sections import DataSection, GenerateSection, MethodSection, ModelSection
from tiny import tiny_llama, tiny_tokenizer

SHORT = GenerateSection(max_new_tokens=8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    quiet()


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A tiny Llama with an adapter that is still zero."""
    loaded = load_model(tiny_llama(tmp_path / "llama"), ModelSection(name="tiny"), torch.device("cpu"), say=silent)
    return attach(loaded, MethodSection(), 1, say=silent).eval()


def move(model: Any, size: float = 0.2) -> Any:
    """Move what trains at random, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def silent(line: str) -> None:
    """Say nothing."""


@contextmanager
def off(model: Any) -> Iterator[Any]:
    with adapter_off(model):
        yield model


def data_of(folder: Path, held: list[dict[str, Any]], tokenizer: Any = None, **section: Any) -> tuple[Data, Encoder]:
    for name, rows in (("train", [{"prompt": f"train {i}", "response": "x"} for i in range(3)]), ("eval", held)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    asked = DataSection(train=str(folder / "train.jsonl"), eval=str(folder / "eval.jsonl"), **section)
    encoder = Encoder(tokenizer or tiny_tokenizer(), asked, date(2026, 3, 4))
    return prepare(asked, encoder, silent), encoder


def qa(prompt: str, response: str) -> dict[str, Any]:
    return {"prompt": prompt, "response": response}


def compared(model: Any, data: Data | None, encoder: Encoder, prompts: list[Any], **more: Any) -> Comparison:
    given: dict[str, Any] = {"section": SHORT, "say": silent, **more}
    return compare(
        off(model),
        nullcontext(model),
        prompts=prompts,
        data=data,
        encoder=encoder,
        tokenizer=tiny_tokenizer(),
        end_ids=encoder.end_ids,
        **given,
    )


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_held_out_rows_are_prompt_and_answer_without_the_template(tmp_path: Path) -> None:
    rows = [qa("Where, 鲸?", " In the old town. "), qa("“Quote”", "春天\n来了")]
    data, encoder = data_of(tmp_path, rows, system="Be brief.")
    found = {q.origin: q for q in held_out(data.eval, encoder, tiny_tokenizer(), None, 128)[0]}
    assert {q.origin: (q.text, q.reference) for q in found.values()} == {
        "eval.jsonl:1": ("Where, 鲸?", "In the old town."),
        "eval.jsonl:2": ("“Quote”", "春天\n来了"),
    }
    assert found["eval.jsonl:2"].ids == encoder.prompt("“Quote”", raw=False)


@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_the_template_is_taken_off_with_real_tokenizers(tmp_path: Path, shared: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    template = {"llama2": "llama2", "qwen2": "auto"}[name]
    rows = [qa("  “Two” things?", "春天来了，小鸟"), qa("0", "1"), qa("x y", " z")]
    data, encoder = data_of(tmp_path, rows, tokenizer, template=template)
    found = held_out(data.eval, encoder, tokenizer, None, 128)[0]
    assert {(q.text, q.reference) for q in found} == {("“Two” things?", "春天来了，小鸟"), ("0", "1"), ("x y", "z")}


def test_a_conversation_asks_for_its_first_answer(tmp_path: Path) -> None:
    said = [("system", "S"), ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    section = DataSection(train=str(path), eval=str(path))
    encoder = Encoder(tiny_tokenizer(), section, date(2026, 3, 4))
    [question] = held_out(prepare(section, encoder, silent).eval, encoder, tiny_tokenizer(), None, 128)[0]
    assert (question.text, question.reference) == ("system\nS\nuser\none?", "1")
    text = tiny_tokenizer().decode(question.ids)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"


def test_a_pattern_with_an_answer_column_has_prompts(tmp_path: Path) -> None:
    rows = [{"q": "Where?", "a": "Here."}]
    (tmp_path / "eval.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    path = str(tmp_path / "eval.jsonl")
    section = DataSection(train=path, eval=path, text="Q: {q}\nA: {a}", columns={"prompt": "q", "response": "a"})
    encoder = Encoder(tiny_tokenizer(), section, date(2026, 3, 4))
    [question] = held_out(prepare(section, encoder, silent).eval, encoder, tiny_tokenizer(), None, 128)[0]
    assert (question.text, question.reference) == ("Where?", "Here.")


def test_held_out_rows_are_drawn_once_each_and_up_to_the_bound(tmp_path: Path) -> None:
    rows = [qa(f"q{i % 20}", str(i)) for i in range(40)]
    data, encoder = data_of(tmp_path, rows)
    texts = [q.text for q in held_out(data.eval, encoder, tiny_tokenizer(), None, 128)[0]]
    assert sorted(texts) == sorted({f"q{i}" for i in range(20)})
    assert [q.text for q in held_out(data.eval, encoder, tiny_tokenizer(), None, 5)[0]] == texts[:5]
    long = len(encoder.prompt("q10", raw=False))
    kept, left_out = held_out(data.eval, encoder, tiny_tokenizer(), long, 128)
    assert sorted(q.text for q in kept) == [f"q{i}" for i in range(10)]
    assert left_out == 20  # the longer ones leave no room to answer


@pytest.mark.parametrize(("max_length", "room"), [(None, 256), (1000, 256), (100, 100)])
def test_rows_without_room_for_an_answer_are_left_out_and_said(
    model: Any, tmp_path: Path, max_length: int | None, room: int
) -> None:
    section = GenerateSection(max_new_tokens=2, max_length=max_length)
    frame = (
        len(
            tiny_tokenizer().apply_chat_template([{"role": "user", "content": "!"}], add_generation_prompt=True)[
                "input_ids"
            ]
        )
        - 1
    )
    data, encoder = data_of(
        tmp_path, [qa("!" * (room - frame - 1), "x"), qa("!" * (room - frame), "x")], max_length=1000
    )
    said: list[str] = []
    result = compared(move(model), data, encoder, ["Who?"], section=section, say=said.append)
    assert [len(pair.question.ids) for pair in result.held_out] == [room - 1]
    left_out = f"1 left out, whose prompt fills the {room} tokens for prompt and answer"
    assert said == [f"compare: 1 of the recipe's prompts, 1 of the held-out rows; {left_out}"]
    data, encoder = data_of(tmp_path, [qa("!" * room, "x")], max_length=1000)
    with pytest.raises(RecipeError, match=f"^nothing to compare: .* that have an answer; {left_out}$"):
        compared(model, data, encoder, [], section=section)


def test_where_all_is_taught_nothing_is_held_out(tmp_path: Path) -> None:
    data, encoder = data_of(tmp_path, [qa("a", "b")], supervise="all")
    assert held_out(data.eval, encoder, tiny_tokenizer(), None, 128)[0] == []
    assert held_out(None, encoder, tiny_tokenizer(), None, 128)[0] == []


def test_prompts_of_the_recipe(tmp_path: Path) -> None:
    _, encoder = data_of(tmp_path, [qa("a", "b")])
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    questions = asked(["Who?", messages], encoder, SHORT)
    assert [(q.origin, q.text, q.reference) for q in questions] == [
        ("prompt 1", "Who?", None),
        ("prompt 2", "user: Hi\nassistant: Ho\nuser: ?", None),
    ]
    assert questions[0].ids == encoder.prompt("Who?", raw=False)
    assert asked(["Who?"], encoder, GenerateSection(raw=True))[0].ids == encoder.prompt("Who?", raw=True)


# -- what is answered ------------------------------------------------------------------------------------------------


def test_base_and_tuned_answer_as_themselves(model: Any, tmp_path: Path) -> None:
    """References are what the tuned model says, but for one that the base says: every row flips as it must."""
    texts = [f"Where is {name}?" for name in ("the fox", "the dog", "it", "the river")]
    _, encoder = data_of(tmp_path, [qa("a", "b")])
    ids = [encoder.prompt(text, raw=False) for text in texts]
    before = generate(model, tiny_tokenizer(), ids, SHORT, encoder.end_ids)
    after = generate(move(model), tiny_tokenizer(), ids, SHORT, encoder.end_ids)
    assert all(a.text.strip() and a.text.strip() != b.text.strip() for a, b in zip(after, before, strict=True))
    rows = [qa(text, reply.text) for text, reply in zip(texts[:3], after[:3], strict=True)]
    data, encoder = data_of(tmp_path, [*rows, qa(texts[3], before[3].text)])
    said: list[str] = []
    result = compared(model, data, encoder, ["Who?"], say=said.append)
    assert said == ["compare: 1 of the recipe's prompts, 4 of the held-out rows"]
    figures = result.figures()
    assert (figures["prompts"], figures["held_out"]) == (1, 4)
    assert (figures["base"]["exact"], figures["tuned"]["exact"]) == (1, 3)
    assert (figures["wrong_to_right"], figures["right_to_wrong"]) == (3, 1)
    assert {pair.question.text: pair.tuned for pair in result.held_out} == dict(zip(texts, after, strict=True))
    assert {pair.question.text: pair.base for pair in result.held_out} == dict(zip(texts, before, strict=True))
    assert result.logit_difference > 0


def test_an_adapter_without_effect_is_an_error(model: Any, tmp_path: Path) -> None:
    data, encoder = data_of(tmp_path, [qa("a", "b")])
    with pytest.raises(
        RunError, match="^the adapter has no effect: base and tuned give the very same logits on 2 texts"
    ):
        compared(model, data, encoder, ["Who?"])
    assert RunError.exit_status == 1


def test_nothing_to_ask_is_an_error(model: Any, tmp_path: Path) -> None:
    data, encoder = data_of(tmp_path, [qa("a", "b")], supervise="all")
    with pytest.raises(RecipeError, match="^nothing to compare: give generate.prompts, or data.eval with rows"):
        compared(model, data, encoder, [])


def test_the_tuned_model_is_let_go_before_the_base_is_loaded(model: Any, tmp_path: Path) -> None:
    """Full fine-tuning has two models: one at a time."""
    _, encoder = data_of(tmp_path, [qa("a", "b")])
    events: list[str] = []

    @contextmanager
    def opened(name: str) -> Iterator[Any]:
        events.append(f"{name} in")
        with adapter_off(model) if name == "base" else nullcontext():
            yield model
        events.append(f"{name} out")

    move(model)
    compare(
        opened("base"),
        opened("tuned"),
        prompts=["Who?"],
        data=None,
        encoder=encoder,
        tokenizer=tiny_tokenizer(),
        section=SHORT,
        end_ids=encoder.end_ids,
        say=silent,
    )
    assert events == ["tuned in", "tuned out", "base in", "base out"]


def test_held_out_rows_are_greedy_and_prompts_sample(model: Any) -> None:
    questions = [Question("p", "", [5, 6, 7]), Question("h", "", [5, 6, 7], "x"), Question("p", "", [9, 8])]
    wild = GenerateSection(max_new_tokens=12, sample=True, temperature=5.0)
    first, second, third = answers(model, tiny_tokenizer(), questions, wild, [1])
    [greedy] = generate(model, tiny_tokenizer(), [[5, 6, 7]], GenerateSection(max_new_tokens=12), [1])
    assert second == greedy
    assert first != greedy
    assert len(third.ids) > 0


def test_the_logits_are_those_behind_the_last_token(model: Any) -> None:
    rows = [[5, 6, 7], [8, 9]]
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    assert torch.equal(last_logits(model, rows), expected)
    other = expected.clone()
    other[1, 17] -= 0.5
    assert largest_logit_difference(expected, other) == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(RunError, match="^the tuned model's logits are not finite: try model.dtype: fp32"):
        largest_logit_difference(expected, expected / 0)


def test_the_probe_is_the_prompts_and_some_rows(tmp_path: Path) -> None:
    data, encoder = data_of(tmp_path, [qa(f"q{i}", "y" * 400) for i in range(40)], max_length=1000)
    assert data.eval is not None
    rows = probe_rows(asked(["Who?"], encoder, SHORT), data.eval)
    assert len(rows) == 33
    assert rows[0] == encoder.prompt("Who?", raw=False)
    assert rows[1] == data.eval[0].ids[:256].tolist()


def test_figures_and_json() -> None:
    def reply(text: str, stopped: bool = True) -> Reply:
        return Reply(text, list(range(len(text))), stopped)

    pairs = [
        Pair(Question("prompt 1", "a", [1]), reply("12345", False), reply("123")),
        Pair(Question("e:1", "b", [2], "yes"), reply("no"), reply(" yes\n")),
        Pair(Question("e:2", "c", [3], "yes"), reply("yes"), reply("Yes")),
        Pair(Question("e:3", "d", [4], "yes"), reply("yes"), reply("yes")),
    ]
    comparison = Comparison(pairs, 1.25)
    assert [pair.flip for pair in pairs] == [0, 1, -1, 0]
    assert comparison.figures() == {
        "prompts": 1,
        "held_out": 3,
        "base": {"exact": 2, "exact_share": 2 / 3, "stopped_share": 0.75, "mean_tokens": 13 / 4},
        "tuned": {"exact": 2, "exact_share": 2 / 3, "stopped_share": 1.0, "mean_tokens": 14 / 4},
        "wrong_to_right": 1,
        "right_to_wrong": 1,
        "largest_logit_difference": 1.25,
    }
    written = json.loads(json.dumps(comparison.as_json()))
    assert written["figures"] == comparison.figures()
    assert written["answers"][0] == {
        "origin": "prompt 1",
        "prompt": "a",
        "prompt_ids": [1],
        "base": {"text": "12345", "ids": [0, 1, 2, 3, 4], "stopped": False},
        "tuned": {"text": "123", "ids": [0, 1, 2], "stopped": True},
    }
    assert written["answers"][1]["reference"] == "yes"
    assert written["answers"][1]["tuned"] == {"text": " yes\n", "ids": [0, 1, 2, 3, 4], "stopped": True, "exact": True}
    assert Comparison(pairs[:1], 1.0).figures()["tuned"]["exact_share"] is None
