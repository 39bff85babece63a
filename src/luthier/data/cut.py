"""Rows that are too long: measured, and cut at the level of text, so that every special token stays in place.

Ids are never cut: the conversation is shortened and rendered again, which keeps the template whole, the end token
last, and a prompt's ids a prefix of its row's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from luthier.data.encode import Encoded, Encoder
from luthier.data.formats import Conversation, Message
from luthier.sections import DataSection

ROUNDS = 8  # a shortened text is encoded again; neighbours can cost a token more, so it may take a second cut


def excess(encoded: Encoded, encoder: Encoder) -> tuple[str, int]:
    """What is too long and by how many tokens: ("prompt" | "answer" | "row" | "", n).

    data.max_prompt and data.max_answer count no special tokens; data.max_length counts all.
    """
    section = encoder.section
    if section.max_prompt is not None:
        over = encoder.plain_tokens(encoded.ids[: encoded.prompt_tokens]) - section.max_prompt
        if over > 0:
            return "prompt", over
    if section.max_answer is not None:
        longest = max(encoder.plain_tokens(encoded.ids[start:stop]) for start, stop in encoded.spans)
        if longest > section.max_answer:
            return "answer", longest - section.max_answer
    over = encoded.length - section.max_length
    return ("row", over) if over > 0 else ("", 0)


def shorten(
    conversation: Conversation, encoder: Encoder, encode: Callable[[Conversation], Encoded | None]
) -> Encoded | None:
    """The longest beginning of the conversation that fits, encoded; None where nothing sensible is left.

    Whole last exchanges go first; then the longer one of the last prompt and the last answer is cut at its end.
    """
    for _ in range(len(conversation.messages) + ROUNDS):
        encoded = encode(conversation)
        if encoded is None:
            return None
        what, over = excess(encoded, encoder)
        if not what:
            return encoded
        shorter = _without_last_exchange(conversation) if what == "row" else None
        shorter = shorter or _with_less_text(conversation, what, over, encoder)
        if shorter is None:
            return None
        conversation = shorter
    return None


def _without_last_exchange(conversation: Conversation) -> Conversation | None:
    messages = conversation.messages
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if len(answers) < 2:
        return None
    return replace(conversation, messages=messages[: answers[-2] + 1])


def _with_less_text(conversation: Conversation, what: str, over: int, encoder: Encoder) -> Conversation | None:
    if conversation.fields:
        return _with_less_field(conversation, what, over, encoder)
    messages = list(conversation.messages)
    at = _too_long(messages, what, encoder)
    if what == "row":
        asked, answer = _last(messages, "user"), len(messages) - 1
        prompt, said = (encoder.count(messages[i].content)[0] for i in (asked, answer))
        at = asked if prompt > said else answer
        over = min(over, max(abs(prompt - said), -(-over // 2)))  # down to the other's length, then both alike
    text = _cut(messages[at].content, over, encoder)
    if text is None:
        return None
    messages[at] = Message(messages[at].role, text, messages[at].train)
    return replace(conversation, messages=tuple(messages))


def _too_long(messages: list[Message], what: str, encoder: Encoder) -> int:
    """The message to shorten: the longest answer, or the question before the first answer."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if what == "prompt":
        return _last(messages[: answers[0]], "user")
    return max(answers, key=lambda i: encoder.count(messages[i].content)[0])


def _last(messages: list[Message], role: str) -> int:
    return max(i for i, message in enumerate(messages) if message.role == role)


def _with_less_field(conversation: Conversation, what: str, over: int, encoder: Encoder) -> Conversation | None:
    fields = dict(conversation.fields)
    answers = [name for name in ("response", _response(encoder.section)) if name in fields]
    prompts = [name for name in fields if name not in answers]
    among = {"prompt": prompts, "answer": answers}.get(what) or list(fields)
    longest = max(among, key=lambda name: len(fields[name]))
    text = _cut(fields[longest], over, encoder)
    if text is None:
        return None
    same = fields[longest]  # {prompt} and the column it came from are one text
    return replace(conversation, fields={n: text if value == same else value for n, value in fields.items()})


def _response(section: DataSection) -> str | None:
    return section.columns.response if section.columns else None


def _cut(text: str, over: int, encoder: Encoder) -> str | None:
    """The text without its last `over` tokens; None where nothing would be left of it."""
    tokens, ends = encoder.count(text)
    if tokens - over < 1:
        return None
    return text[: ends[tokens - over - 1]].rstrip() or None
