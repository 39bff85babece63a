"""A row of any known shape → Conversation.

messages    a column of [{role, content}, …]                 OpenAI's
sharegpt    a column of [{from, value}, …]                   roles human, gpt …; `system` beside it
alpaca      instruction, input, output, system, history
prompt      columns for prompt and answer, by name
text        a pattern over the columns, or a column `text`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from luthier.data.columns import SYNONYMS, Found, all_names, join_names, listed, named, no_column, unsettled
from luthier.data.sources import Row
from luthier.errors import DataError
from luthier.sections import Columns, DataSection, pattern_columns

ROLES: dict[str, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "bot", "model"),
    "tool": ("tool", "function", "observation"),
}
NEEDS = {
    "messages": "a column of [{role, content}, …]",
    "sharegpt": "a column of [{from, value}, …]",
    "alpaca": "the columns instruction and output",
    "prompt": "a prompt column and an answer column",
}
_ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}
_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}


class BadRow(Exception):  # noqa: N818
    """Why a row cannot be used."""


@dataclass(frozen=True)
class Message:
    """One turn. `train` false: this answer is not taught, whatever the recipe says."""

    role: str
    content: str
    train: bool | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns, or, for a text pattern, the values of its columns."""

    messages: tuple[Message, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """What the rows of a source look like. `how`: one line for the screen. A column of `columns` may lack in a row."""

    name: Literal["messages", "sharegpt", "alpaca", "prompt", "text"]
    columns: Columns
    how: str


# ---- recognising


def recognise(rows: Sequence[Row], section: DataSection, columns: Columns | None) -> Format:
    """Settle format and columns from a source's first rows.

    `columns`: the source's own, which come before the section's. Errors: DataError where a named column is not there,
    and where the rows fit no format; it holds the line to paste.
    """
    file = rows[0].file
    found = _found(rows)
    given = columns or section.columns or Columns()
    _check_given(given, found, file)
    if section.text is not None or section.format == "text":
        return _as_text(found, given, section, file)
    fitting = [_as_messages(found, given), _as_alpaca(found, given, section), _as_prompt(found, given)]
    formats = [one for one in fitting if one is not None]
    for one in formats:
        if section.format in ("auto", one.name):
            return one
    if section.format == "auto" and _is_plain_text(found, given):
        return _as_text(found, given, section, file)
    raise DataError(f"{file}: {_refusal(formats, found, given, section)}")


def _refusal(formats: Sequence[Format], found: Found, given: Columns, section: DataSection) -> str:
    if given.messages:
        return f"columns.messages: {given.messages!r} is not {NEEDS['messages']} or {NEEDS['sharegpt']}"
    if section.format in ("auto", "prompt"):
        return unsettled(found, given)
    hint = f"; these rows fit format: {formats[0].name}" if formats else ""
    return f"format: {section.format} needs {NEEDS[section.format]}{hint} {all_names(found)}"


def _found(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Columns in the order of their first appearance, each with its values that are not null."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        for column, value in row.values.items():
            found.setdefault(column, []).extend([] if value is None else [value])
    return found


def _check_given(given: Columns, found: Mapping[str, Any], file: str) -> None:
    if given.messages and (given.prompt or given.response):
        raise DataError(f"{file}: columns names messages and also prompt or response; keep one of the two")
    for key, value in given.model_dump(exclude_none=True).items():
        for place, column in enumerate(listed(value)):
            # input and context come behind a prompt "where there is one": AdGen recipes name an input that no file has
            optional = key == "prompt" and place > 0 and column.lower() in SYNONYMS["more prompt"]
            if column not in found and not optional:
                raise DataError(f"{file}: columns.{key}: {no_column(column, found)}")


def _as_messages(found: Found, given: Columns) -> Format | None:
    if given.prompt or given.response:
        return None
    for column in [given.messages] if given.messages else named("messages", found):
        messages = [m for value in found[column] if isinstance(value, list) for m in value if isinstance(m, dict)]
        for name, keys in _KEYS.items():
            if any(message.keys() >= set(keys) for message in messages):
                columns = Columns(messages=column, system=given.system or _beside("system", found))
                return _format(name, columns, found, f"turns = {column}")
    return None


def _as_alpaca(found: Found, given: Columns, section: DataSection) -> Format | None:
    if given.messages or ((given.prompt or given.response) and section.format != "alpaca"):
        return None
    names = {column.lower(): column for column in found}
    prompt = listed(given.prompt) or [names.get(name, name) for name in ("instruction", "input")]
    response = given.response or names.get("output", "output")
    return _exchange("alpaca", prompt, response, found, given) if {prompt[0], response} <= found.keys() else None


def _as_prompt(found: Found, given: Columns) -> Format | None:
    prompt = listed(given.prompt)
    responses = [given.response] if given.response else [c for c in named("response", found) if c not in prompt]
    if not prompt:
        asked, more = ([c for c in named(kind, found) if c not in responses] for kind in ("prompt", "more prompt"))
        prompt = [*asked, *more] if len(asked) == 1 else more if not asked and len(more) == 1 else []
    if given.messages or not prompt or len(responses) != 1:
        return None
    return _exchange("prompt", prompt, responses[0], found, given)


def _exchange(name: str, prompt: list[str], response: str, found: Found, given: Columns) -> Format:
    taken = [*prompt, response]
    columns = Columns(
        prompt=prompt,
        response=response,
        system=given.system or _beside("system", found, taken),
        history=given.history or _beside("history", found, taken),
    )
    there = [column for column in prompt if column in found]
    return _format(name, columns, found, f"prompt = {' + '.join(there)}, response = {response}")


def _beside(kind: str, found: Found, taken: Sequence[str] = ()) -> str | None:
    """Also where no row so far has it: a column that comes later in a ragged file must not be lost."""
    return next((column for column in [*named(kind, found), kind] if column not in taken), None)


def _is_plain_text(found: Found, given: Columns) -> bool:
    unclaimed = not (named("prompt", found) or named("response", found))
    return "text" in found and unclaimed and not (given.prompt or given.response or given.messages)


def _as_text(found: Found, given: Columns, section: DataSection, file: str) -> Format:
    names = pattern_columns(_pattern(section))
    stands_for = {"prompt": given.prompt, "response": given.response, "system": given.system or section.system}
    for name in names:
        if name not in found and not stands_for.get(name):
            remedy = f"; {{{name}}} also stands for columns: {{{name}: …}}" if name in stands_for else ""
            raise DataError(f"{file}: text: {no_column(name, found)}{remedy}")
    own = {name: name for name in stands_for if name in names and name in found and not getattr(given, name)}
    columns = given.model_copy(update=own)
    return _format("text", columns, found, json.dumps(_pattern(section), ensure_ascii=False), also=names)


def _pattern(section: DataSection) -> str:
    return section.text or "{text}"


def _format(name: Any, columns: Columns, found: Found, how: str, also: Sequence[str] = ()) -> Format:
    taken = {*also, *(column for value in columns.model_dump().values() for column in listed(value))}
    beside = [f", {key} = {column}" for key in ("system", "history") if (column := getattr(columns, key)) in found]
    left = join_names([column for column in found if column not in taken])
    return Format(name, columns, f"{name}: {how}{''.join(beside)}" + (f"; not used: {left}" if left else ""))


# ---- one row


def to_conversation(row: Row, format: Format, section: DataSection) -> Conversation:
    """The row as turns, or as the values of a text pattern. Errors: BadRow with the reason."""
    if format.name == "text":
        return Conversation(fields=_fields(row.values, format.columns, section))
    if format.name in _KEYS:
        turns = _turns(row.values, format, section)
    else:
        turns = [
            *_history(row.values, format.columns.history or ""),
            Message("user", _prompt(row.values, format.columns, section)),
            Message("assistant", _response(row.values, format.columns.response or "")),
        ]
    system = _text(row.values, format.columns.system)
    if system and any(turn.role == "system" for turn in turns):
        raise BadRow(f"two system prompts: column {format.columns.system!r} and a message")
    system = system or section.system
    if system and not any(turn.role == "system" for turn in turns):
        turns = [Message("system", system), *turns]
    return Conversation(tuple(turns))


def _prompt(values: Mapping[str, Any], columns: Columns, section: DataSection) -> str:
    names = listed(columns.prompt)
    if names[0] not in values:
        raise BadRow(f"missing column {names[0]!r}")
    texts = [text for name in names if (text := _text(values, name))]
    if not texts:
        raise BadRow(f"no user turn: {' and '.join(names)} empty")
    return section.before_prompt + section.join.join(texts)


def _response(values: Mapping[str, Any], column: str) -> str:
    if column not in values:
        raise BadRow(f"missing column {column!r}")
    text = _text(values, column)
    if text is None:
        raise BadRow(f"empty answer in column {column!r}")
    return text


def _text(values: Mapping[str, Any], column: str | None) -> str | None:
    """A cell's text as it stands; None where there is nothing but blanks. Errors: BadRow where it is no text."""
    value = values.get(column) if column else None
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRow(f"wrong type in column {column!r}: {_kind(value)}, not a text")
    return value if value.strip() else None


def _history(values: Mapping[str, Any], column: str) -> list[Message]:
    turns: list[Message] = []
    history = values.get(column) or []
    for number, pair in enumerate(history if isinstance(history, list) else [history], 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow(f"wrong type in column {column!r}: entry {number} is not a pair [question, answer] of texts")
        if not pair[1].strip():
            raise BadRow(f"empty answer in column {column!r}, entry {number}")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def _turns(values: Mapping[str, Any], format: Format, section: DataSection) -> list[Message]:
    column = format.columns.messages or ""
    if column not in values:
        raise BadRow(f"missing column {column!r}")
    if not isinstance(values[column], list):
        raise BadRow(f"wrong type in column {column!r}: {_kind(values[column])}, not a list of messages")
    turns = [_turn(number, message, *_KEYS[format.name]) for number, message in enumerate(values[column], 1)]
    turns = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
    _check_turns(turns)
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    turns[first] = replace(turns[first], content=section.before_prompt + turns[first].content)
    return turns


def _turn(number: int, message: Any, role_key: str, content_key: str) -> Message:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise BadRow(f"{where}: wrong type: {_kind(message)}, not an object with {role_key} and {content_key}")
    role, content = message.get(role_key), message.get(content_key)
    if not isinstance(role, str) or role.lower() not in _ROLE_OF:
        raise BadRow(f"{where}: unknown role {str(role)[:40]!r}; known are {', '.join(_ROLE_OF)}")
    role = _ROLE_OF[role.lower()]
    if message.get("tool_calls") or message.get("function_call"):
        raise BadRow(f"{where}: tool calls are not read; write them into {content_key}")
    if not isinstance(content, str):
        raise BadRow(f"{where}: wrong type: its {content_key} is {_kind(content)}, not a text")
    train, weight = message.get("train"), message.get("weight")  # OpenAI's own way of saying it is weight: 0
    if not (train is None or isinstance(train, bool)) or not (weight is None or weight in (0, 1)):
        raise BadRow(f"{where}: wrong type: train is true or false, weight is 0 or 1")
    if train is None and weight is not None:
        train = weight == 1
    if role == "assistant" and train is not False and not content.strip():
        raise BadRow(f"{where}: empty answer")
    return Message(role, content, train)


def _check_turns(turns: Sequence[Message]) -> None:
    answers = [turn for turn in turns if turn.role == "assistant"]
    if not answers:
        raise BadRow("no answer: no assistant turn")
    before = turns[: turns.index(answers[0])]
    if not any(turn.role == "user" and turn.content.strip() for turn in before):
        raise BadRow("no user turn before the first answer")
    if turns[-1].role != "assistant":
        raise BadRow(f"the last turn is the {turns[-1].role}'s: nothing answers it")
    if all(turn.train is False for turn in answers):
        raise BadRow("no answer is taught: each says train: false")


# ---- text patterns


def _fields(values: Mapping[str, Any], columns: Columns, section: DataSection) -> dict[str, str]:
    """What the pattern's names stand for in this row: prompt, response and system by `columns`, else a column each."""
    names = pattern_columns(_pattern(section))
    fields: dict[str, str] = {}
    for name in names:
        if name == "prompt":
            fields[name] = _prompt(values, columns, section)
        elif name in ("response", columns.response):
            fields[name] = _response(values, columns.response or "")
        elif name == "system":
            fields[name] = _text(values, columns.system) or section.system or ""
        elif values.get(name) is None:
            raise BadRow(f"missing column {name!r}")
        else:
            fields[name] = _text(values, name) or ""
    if not any(fields.values()):
        raise BadRow("empty text")
    return fields


# ---- small words


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return {**kinds, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
