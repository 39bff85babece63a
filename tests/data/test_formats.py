"""Formats are recognised, rows become conversations, and what does not fit is said in words."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from luthier.data.columns import SYNONYMS
from luthier.data.formats import (
    ROLES,
    BadRow,
    Conversation,
    Format,
    Message,
    recognise,
    to_conversation,
)
from luthier.data.sources import Row, open_source
from luthier.errors import DataError
from luthier.sections import Columns, DataSection


def section(**given: Any) -> DataSection:
    return DataSection(train="x", **given)


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value, "x.jsonl", line) for line, value in enumerate(values, 1)]


def shape(*values: dict[str, Any], columns: Columns | None = None, **given: Any) -> Format:
    return recognise(rows(*values), section(**given), columns)


def turned(value: dict[str, Any], columns: Columns | None = None, **given: Any) -> Conversation:
    """The conversation of a row that is its file's only one."""
    settings = section(**given)
    return to_conversation(rows(value)[0], recognise(rows(value), settings, columns), settings)


def said(value: dict[str, Any], columns: Columns | None = None, **given: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in turned(value, columns, **given).messages]


def reason(good: dict[str, Any], bad: dict[str, Any], columns: Columns | None = None, **given: Any) -> str:
    """Why a row cannot be used in a file whose first row is `good`."""
    settings = section(**given)
    with pytest.raises(BadRow) as error:
        to_conversation(rows(bad)[0], recognise(rows(good), settings, columns), settings)
    return str(error.value)


def refusal(*values: dict[str, Any], columns: Columns | None = None, **given: Any) -> str:
    with pytest.raises(DataError) as error:
        shape(*values, columns=columns, **given)
    return str(error.value)


ALPACA = {"instruction": "Add", "input": "1 2", "output": "3"}
MESSAGES = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
CSV = {"source_set": "wmt", "en": "Lung cancer", "zh": "肺癌"}


# ---- recognising


@pytest.mark.parametrize(
    ("value", "how"),
    [
        (MESSAGES, "messages: turns = messages"),
        ({"conversation": MESSAGES["messages"], "id": 1}, "messages: turns = conversation; not used: id"),
        (SHAREGPT, "sharegpt: turns = conversations"),
        (SHAREGPT | {"system": "s", "lang": "en"}, "sharegpt: turns = conversations, system = system; not used: lang"),
        (ALPACA, "alpaca: prompt = instruction + input, response = output"),
        (
            {"output": "3", "Instruction": "Add", "history": [], "system": ""},
            "alpaca: prompt = Instruction, response = output, system = system, history = history",
        ),
        ({"content": "q", "summary": "a"}, "prompt: prompt = content, response = summary"),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},
            "prompt: prompt = instruction + context, response = response; not used: category",
        ),
        ({"input": "q", "output": "a"}, "prompt: prompt = input, response = output"),
        ({"Question": "q", "Answer": "a", "id": 3}, "prompt: prompt = Question, response = Answer; not used: id"),
        ({"text": "t", "meta": {}}, 'text: "{text}"; not used: meta'),
        ({"prompt": "q", "prompt_id": "1"} | MESSAGES, "messages: turns = messages; not used: prompt, prompt_id"),
    ],
)
def test_auto_says_what_it_took(value: dict[str, Any], how: str) -> None:
    assert shape(value).how == how
    assert shape(value).name == how.partition(":")[0]


def test_given_columns_come_first() -> None:
    assert shape(CSV, columns=Columns(prompt="en", response="zh")).how == (
        "prompt: prompt = en, response = zh; not used: source_set"
    )
    settings = section(columns=Columns(prompt="zh", response="en"))
    assert recognise(rows(CSV), settings, None).columns.prompt == ["zh"]
    assert recognise(rows(CSV), settings, Columns(prompt="en", response="zh")).columns.prompt == ["en"]
    # what is not given is still settled by name
    assert shape(ALPACA, columns=Columns(prompt="instruction")).how == (
        "prompt: prompt = instruction, response = output; not used: input"
    )
    assert shape(MESSAGES | ALPACA, columns=Columns(prompt="input", response="output")).name == "prompt"
    assert shape({"talk": SHAREGPT["conversations"]}, columns=Columns(messages="talk")).name == "sharegpt"
    assert shape(ALPACA, columns=Columns(prompt="input", response="output"), format="alpaca").name == "alpaca"


def test_the_line_to_paste() -> None:
    many = [CSV | {"en": f"sentence {i}", "zh": f"句子 {i}"} for i in range(100)]
    assert refusal(*many) == (
        "x.jsonl: the names of the columns do not settle which is the prompt and which the answer; put under data"
        " (a guess, to be corrected; or give a text pattern):\n  columns: {prompt: en, response: zh}\n"
        "(the file's columns: source_set, en, zh)"
    )
    assert "columns: {prompt: en, response: zh}" in refusal(*many, format="prompt")
    # two that could be the prompt: the table's order decides the guess
    two = {"query": "q", "question": "q", "answer": "a"}
    assert "columns: {prompt: question, response: answer}" in refusal(two)
    # an id is unique text as well; a name that YAML reads otherwise is quoted
    odd = [{"row_id": f"r{i}", "my text": f"t{i}", "no": f"n{i}", "": "0"} for i in range(3)]
    assert 'columns: {prompt: "my text", response: "no"}\n(the file\'s columns: row_id, my text, no)' in refusal(*odd)
    assert "columns: {prompt: en, response: zh}" in refusal(*many, columns=Columns(prompt="en"))
    assert refusal({"quote": "q", "tags": ["a"]}) == (
        "x.jsonl: no two columns for prompt and answer; for plain text put under data:"
        '\n  text: "{quote}"\n(the file\'s columns: quote, tags)'
    )
    assert refusal({"n": 1}) == "x.jsonl: no column holds texts (the file's columns: n)"


def test_a_named_column_must_be_there() -> None:
    assert refusal(CSV, columns=Columns(prompt="eng", response="zh")) == (
        "x.jsonl: columns.prompt: no column 'eng'; did you mean 'en'? (the file's columns: source_set, en, zh)"
    )
    for columns in (
        Columns(prompt="en", response="chinese"),
        Columns(prompt=["en", "remark"], response="zh"),
        Columns(prompt=["context", "en"], response="zh"),
        Columns(prompt="en", response="zh", system="sys"),
        Columns(messages="turns"),
    ):
        assert "no column '" in refusal(CSV, columns=columns)
    assert refusal(MESSAGES, columns=Columns(messages="messages", prompt="messages")) == (
        "x.jsonl: columns names messages and also prompt or response; keep one of the two"
    )
    assert refusal(CSV, columns=Columns(messages="en")) == (
        "x.jsonl: columns.messages: 'en' is not a column of [{role, content}, …] or a column of [{from, value}, …]"
    )


def test_input_and_context_may_lack_behind_a_prompt() -> None:
    """SYSTEMS' seventh recipe names an `input` that most AdGen files do not have."""
    columns = Columns(prompt=["content", "input"], response="summary")
    assert shape({"content": "q", "summary": "a"}, columns=columns).how == (
        "prompt: prompt = content, response = summary"
    )
    settings = section(columns=columns)
    format = recognise(rows({"content": "q", "summary": "a"}), settings, None)
    later = to_conversation(rows({"content": "q", "input": "more", "summary": "a"})[0], format, settings)
    assert later.messages[0].content == "q\nmore"


def test_a_format_that_does_not_fit() -> None:
    assert refusal(SHAREGPT, format="messages") == (
        "x.jsonl: format: messages needs a column of [{role, content}, …]; these rows fit format: sharegpt"
        " (the file's columns: conversations)"
    )
    assert refusal(CSV, format="alpaca") == (
        "x.jsonl: format: alpaca needs the columns instruction and output (the file's columns: source_set, en, zh)"
    )
    assert refusal(CSV, format="text") == "x.jsonl: text: no column 'text' (the file's columns: source_set, en, zh)"


@pytest.mark.parametrize(
    ("name", "how", "count", "bad"),
    [
        ("huanhuan.json", "alpaca: prompt = instruction + input, response = output", 3729, 0),
        ("advertisegen.jsonl", "prompt: prompt = content, response = summary", 1070, 0),
        ("advertisegen_messages.jsonl", "messages: turns = messages", 1070, 0),
        ("sharegpt_zh.jsonl", "sharegpt: turns = conversations", 1000, 7),
        ("alpaca_52k.json.gz", "alpaca: prompt = instruction + input, response = output", 52002, 28),
        ("medical_zh_en.jsonl", "alpaca: prompt = instruction + input, response = output", 923, 0),
    ],
)
def test_real_files(shared: Path, name: str, how: str, count: int, bad: int) -> None:
    path, settings = shared / "data" / name, section()
    read = [row for row in open_source(path) if isinstance(row, Row)]
    format = recognise(read[:100], settings, None)
    assert (format.how, len(read)) == (how, count)
    refused = 0
    for row in read:
        try:
            assert to_conversation(row, format, settings).messages[-1].role == "assistant"
        except BadRow:
            refused += 1
    assert refused == bad


def test_real_files_that_need_a_word(shared: Path) -> None:
    path = shared / "data" / "medical_zh_en.csv"
    first = [row for row in islice(open_source(path), 100) if isinstance(row, Row)]
    with pytest.raises(DataError) as error:
        recognise(first, section(), None)
    line = "columns: {prompt: en, response: zh}\n(the file's columns: source_set, en, zh)"
    assert str(error.value).startswith(f"{path}: ") and str(error.value).endswith(line)
    settings = section(text="Quote: {quote}\nAuthor: {author}")
    quotes = [row for row in open_source(shared / "data" / "english_quotes.jsonl") if isinstance(row, Row)]
    format = recognise(quotes[:100], settings, None)
    assert format.how == 'text: "Quote: {quote}\\nAuthor: {author}"; not used: tags'
    assert to_conversation(quotes[0], format, settings).fields == {
        "quote": "“Be yourself; everyone else is already taken.”",
        "author": "Oscar Wilde",
    }
    assert len([to_conversation(row, format, settings) for row in quotes]) == 2508


# ---- prompt and answer by columns


def test_prompt_columns_are_joined_and_empty_ones_skipped() -> None:
    assert said(ALPACA) == [("user", "Add\n1 2"), ("assistant", "3")]
    assert said(ALPACA, join="") == [("user", "Add1 2"), ("assistant", "3")]
    assert said(ALPACA | {"input": ""})[0] == ("user", "Add")
    assert said(ALPACA | {"input": None})[0] == ("user", "Add")
    assert said(ALPACA | {"input": " \n"})[0] == ("user", "Add")
    assert said(ALPACA | {"instruction": ""})[0] == ("user", "1 2")
    assert said({"instruction": "Add", "output": " 3 "}) == [("user", "Add"), ("assistant", " 3 ")]
    assert said(CSV, Columns(prompt=["zh", "en"], response="source_set"), join="|")[0] == ("user", "肺癌|Lung cancer")
    assert said(ALPACA, before_prompt="Do: ")[0] == ("user", "Do: Add\n1 2")


def test_system_and_history() -> None:
    full = ALPACA | {"system": "Be brief.", "history": [["q1", "a1"], ["q2", "a2"]]}
    assert said(full, before_prompt="> ", system="other") == [
        ("system", "Be brief."),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "> Add\n1 2"),
        ("assistant", "3"),
    ]
    assert said(ALPACA | {"system": " "}, system="default")[0] == ("system", "default")
    assert said(ALPACA, system="default")[0] == ("system", "default")
    assert said(CSV, Columns(prompt="en", response="zh", system="source_set"))[0] == ("system", "wmt")
    assert said({"system": "linux", "answer": "tux"}, Columns(prompt="system")) == [
        ("user", "linux"),
        ("assistant", "tux"),
    ]
    assert [role for role, _ in said(ALPACA | {"history": None})] == ["user", "assistant"]


def test_columns_that_come_late_in_a_ragged_file_count() -> None:
    settings = section()
    format = recognise(rows({"instruction": "a", "output": "b"}), settings, None)
    late = to_conversation(rows(ALPACA | {"system": "s", "history": [["q", "a"]]})[0], format, settings)
    assert [message.content for message in late.messages] == ["s", "q", "a", "Add\n1 2", "3"]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"input": "x", "output": "y"}, "missing column 'instruction'"),
        ({"instruction": "x"}, "missing column 'output'"),
        (ALPACA | {"output": ""}, "empty answer in column 'output'"),
        (ALPACA | {"output": " \n"}, "empty answer in column 'output'"),
        (ALPACA | {"output": None}, "empty answer in column 'output'"),
        (ALPACA | {"output": 42}, "wrong type in column 'output': a number, not a text"),
        (ALPACA | {"output": True}, "wrong type in column 'output': true or false, not a text"),
        (ALPACA | {"output": ["a"]}, "wrong type in column 'output': a list, not a text"),
        (ALPACA | {"input": 1.5}, "wrong type in column 'input': a number, not a text"),
        (ALPACA | {"instruction": {}}, "wrong type in column 'instruction': an object, not a text"),
        (ALPACA | {"system": 1}, "wrong type in column 'system': a number, not a text"),
        (ALPACA | {"instruction": "", "input": None}, "no user turn: instruction and input empty"),
        (
            ALPACA | {"history": [["q", "a"], ["q"]]},
            "wrong type in column 'history': entry 2 is not a pair [question, answer] of texts",
        ),
        (
            ALPACA | {"history": "q"},
            "wrong type in column 'history': entry 1 is not a pair [question, answer] of texts",
        ),
        (ALPACA | {"history": [["q", ""]]}, "empty answer in column 'history', entry 1"),
    ],
)
def test_bad_rows_of_columns(bad: dict[str, Any], why: str) -> None:
    assert reason(ALPACA, bad) == why


def test_words_before_the_prompt_make_no_user_turn() -> None:
    empty = ALPACA | {"instruction": "", "input": ""}
    assert reason(ALPACA, empty, before_prompt="Do: ") == "no user turn: instruction and input empty"
    blank = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}
    assert reason(MESSAGES, blank, before_prompt="Do: ") == "no user turn before the first answer"


# ---- messages


def chat(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def test_messages() -> None:
    turns = (("user", "a"), ("user", "b"), ("assistant", "c"), ("tool", "d"), ("assistant", "e"))
    assert said(chat(*turns)) == list(turns)
    assert said(chat(*turns), before_prompt="> ")[0] == ("user", "> a")
    assert said(chat(("system", "s"), *turns), system="default")[0] == ("system", "s")
    assert said(chat(*turns), system="default")[:2] == [("system", "default"), ("user", "a")]
    assert said(chat(("system", " "), *turns), system="default")[:2] == [("system", "default"), ("user", "a")]
    assert said(chat(*turns, system="s"))[0] == ("system", "s")


def test_roles_of_other_tools() -> None:
    for role, aliases in ROLES.items():
        for alias in aliases:
            turns = [{"from": "human", "value": "q"}, {"from": alias, "value": "x"}, {"from": "gpt", "value": "a"}]
            assert said({"conversations": turns})[1] == (role, "x")


def test_train_false_is_carried() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "train": False},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": "c", "train": True},
        {"role": "assistant", "content": "d", "train": None, "weight": 1},
    ]
    assert [message.train for message in turned({"messages": turns}).messages] == [None, False, None, False, True, True]
    assert turned({"messages": turns}).messages[1] == Message("assistant", "", False)
    assert reason(MESSAGES, {"messages": turns[:2]}) == "no answer is taught: each says train: false"
    bad = [turns[0], {"role": "assistant", "content": "a", "train": "no"}]
    assert reason(MESSAGES, {"messages": bad}) == "message 2: wrong type: train is true or false, weight is 0 or 1"
    bad = [turns[0], {"role": "assistant", "content": "a", "weight": 0.5}]
    assert reason(MESSAGES, {"messages": bad}) == "message 2: wrong type: train is true or false, weight is 0 or 1"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"id": 1}, "missing column 'messages'"),
        ({"messages": "q"}, "wrong type in column 'messages': a text, not a list of messages"),
        ({"messages": None}, "wrong type in column 'messages': null, not a list of messages"),
        ({"messages": []}, "no answer: no assistant turn"),
        ({"messages": ["q"]}, "message 1: wrong type: a text, not an object with role and content"),
        (
            chat(("user", "q"), ("narrator", "a")),
            "message 2: unknown role 'narrator'; known are system, developer, user, human, assistant, gpt, bot, model,"
            " tool, function, observation",
        ),
        (chat(("user", "q"), ("assistant", None)), "message 2: wrong type: its content is null, not a text"),
        (chat(("user", [{"type": "text"}])), "message 1: wrong type: its content is a list, not a text"),
        (chat(("user", "q"), ("assistant", " ")), "message 2: empty answer"),
        (chat(("user", "q")), "no answer: no assistant turn"),
        (chat(("assistant", "a"), ("user", "q"), ("assistant", "a")), "no user turn before the first answer"),
        (chat(("system", "s"), ("assistant", "a")), "no user turn before the first answer"),
        (chat(("user", "q"), ("assistant", "a"), ("user", "q")), "the last turn is the user's: nothing answers it"),
        (
            chat(("system", "s"), ("user", "q"), ("assistant", "a"), system="t"),
            "two system prompts: column 'system' and a message",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [1]}]},
            "message 2: tool calls are not read; write them into content",
        ),
    ],
)
def test_bad_rows_of_messages(bad: dict[str, Any], why: str) -> None:
    assert reason(MESSAGES, bad) == why


def test_sharegpt_names_its_own_keys() -> None:
    assert reason(SHAREGPT, {"conversations": [{"from": "human", "value": 1}]}) == (
        "message 1: wrong type: its value is a number, not a text"
    )
    assert reason(SHAREGPT, {"conversations": [{"role": "user", "content": "q"}]}).startswith(
        "message 1: unknown role 'None'"
    )


# ---- text patterns


def fields(value: dict[str, Any], columns: Columns | None = None, **given: Any) -> Any:
    conversation = turned(value, columns, **given)
    assert conversation.messages == ()
    return conversation.fields


def test_text_patterns() -> None:
    assert fields(CSV, text="{en} is {zh}, {{really}}") == {"en": "Lung cancer", "zh": "肺癌"}
    assert fields({"text": " t "}) == {"text": " t "}
    # by columns: {prompt} is what a chat's user turn would be
    pattern = "### Human: {prompt} ### Assistant: {response}"
    columns = Columns(prompt=["instruction", "input"], response="output")
    assert fields(ALPACA, columns, text=pattern, before_prompt="> ") == {"prompt": "> Add\n1 2", "response": "3"}
    assert fields(ALPACA | {"input": ""}, columns, text=pattern) == {"prompt": "Add", "response": "3"}
    assert shape(ALPACA, columns=columns, text=pattern).how == f'text: "{pattern}"'
    # without columns a file's own prompt and response stand there
    own = {"prompt": "q", "response": "a"}
    assert fields(own, text=pattern, before_prompt="> ") == {"prompt": "> q", "response": "a"}
    assert fields(own | {"system": "t"}, text="{system}{prompt}", system="s") == {"system": "t", "prompt": "q"}
    assert fields(own | {"system": None}, text="{system}{prompt}", system="s") == {"system": "s", "prompt": "q"}
    assert fields(CSV, text="{system}: {en}", system="s") == {"system": "s", "en": "Lung cancer"}
    assert fields(CSV, Columns(system="zh"), text="{system}: {en}") == {"system": "肺癌", "en": "Lung cancer"}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (
            {"text": "{zhh}"},
            "x.jsonl: text: no column 'zhh'; did you mean 'zh'? (the file's columns: source_set, en, zh)",
        ),
        (
            {"text": "{en}{response}"},
            "x.jsonl: text: no column 'response' (the file's columns: source_set, en, zh); {response} also stands for"
            " columns: {response: …}",
        ),
    ],
)
def test_patterns_that_are_refused(given: dict[str, Any], why: str) -> None:
    assert refusal(CSV, **given) == why


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"en": "x"}, "missing column 'zh'"),
        ({"en": "x", "zh": None}, "missing column 'zh'"),
        ({"en": 1, "zh": "x"}, "wrong type in column 'en': a number, not a text"),
        ({"en": ["x"], "zh": "x"}, "wrong type in column 'en': a list, not a text"),
        ({"en": " ", "zh": ""}, "empty text"),
    ],
)
def test_bad_rows_of_patterns(bad: dict[str, Any], why: str) -> None:
    assert reason(CSV, bad, text="{en} {zh}") == why
    assert fields(CSV | {"zh": ""}, text="{en} {zh}") == {"en": "Lung cancer", "zh": ""}


def test_the_answer_of_a_pattern_is_never_empty() -> None:
    empty = CSV | {"zh": " "}
    assert reason(CSV, empty, Columns(response="zh"), text="{en} {zh}") == "empty answer in column 'zh'"
    columns = Columns(prompt="en", response="zh")
    assert reason(CSV, empty, columns, text="{prompt} {response}") == "empty answer in column 'zh'"
    named = {"en": "x", "response": ""}
    assert reason(named | {"response": "y"}, named, text="{en} {response}") == "empty answer in column 'response'"


# ---- the docs


def test_the_published_tables_are_the_code(request: pytest.FixtureRequest) -> None:
    """docs/data.md shows SYNONYMS and ROLES as they are."""
    page = (request.config.rootpath / "docs" / "data.md").read_text(encoding="utf-8")
    for head, table in (("| what it is | names of columns |", SYNONYMS), ("| role | also written |", ROLES)):
        lines = [f"| {key} | {', '.join(f'`{name}`' for name in names)} |" for key, names in table.items()]
        assert "\n".join([head, "|---|---|", *lines, ""]) in page
