"""Conversation → segments: the one renderer for training, trying, comparing and serving.

A row becomes one or more *texts*; each text is encoded once, by itself, as a list of segments that say what is
supervised. Templates whose vendors encode prompt and answer apart (yuan2, glm3, glm3_pair) simply give several texts.
Special tokens stand in a text by name and are parsed there; what a message says is *protected* first, so that a
user who typed `<|im_end|>` has typed text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from luthier.data.formats import BadRow, Conversation, Message
from luthier.data.shapes import shaped_chat_template
from luthier.errors import DataError
from luthier.sections import DataSection, pattern_columns

# Two of Unicode's noncharacters, which no text may contain: what lies between them is the number of a special
# token that a message spelt out.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
PROTECTED = re.compile(f"{OPEN}(\\d+){CLOSE}")


class Segment(NamedTuple):
    """A stretch of a text. `supervised`: the model is taught to write it."""

    text: str
    supervised: bool


Text = list[Segment]  # encoded once, as a whole
Rendered = list[Text]  # the texts of one example, in order


class Rows(NamedTuple):
    """What one conversation becomes: usually one example; one a supervised turn where the template forbids that."""

    examples: list[Rendered]
    split: bool


@dataclass(frozen=True)
class Marks:
    """The special tokens of a tokenizer: they are parsed in a template's own text, and never in a message's."""

    names: tuple[str, ...]
    eos: str
    bos: str
    wide: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)  # swallows white space to its left, right
    pattern: re.Pattern[str] = field(init=False)  # for a template's text
    spelt: re.Pattern[str] = field(init=False)  # for a message's text
    _parting: re.Pattern[str] = field(init=False)

    def __post_init__(self) -> None:
        longest_first = sorted(self.names, key=len, reverse=True)
        spelt = {name: re.escape(name) for name in longest_first}
        for name, (left, right) in self.wide.items():
            spelt[name] = r"\s*" * left + spelt[name] + r"\s*" * right
        behind = "|".join(f"(?<={re.escape(name)})" for name in longest_first if not name.isalnum())
        for name in longest_first:
            if name.isalnum() and name not in (self.bos, self.eos):  # ChatGLM3's `sop`, `eop`: not in "Philosophy"
                spelt[name] = f"(?:{behind or '(?!)'}){spelt[name]}"
        pattern = "|".join(spelt.values()) or r"(?!)"
        object.__setattr__(self, "pattern", re.compile(pattern))
        object.__setattr__(self, "_parting", re.compile(f"({pattern})"))
        object.__setattr__(self, "spelt", re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"))

    def split(self, text: str) -> list[str]:
        """A template's text, a special token as it was found, the text behind it, and so on."""
        return self._parting.split(text)

    def protect(self, content: str) -> str:
        """Replace special tokens spelt out in a message by stand-ins. Errors: BadRow where one stands already."""
        if OPEN in content or CLOSE in content:
            raise BadRow("holds U+FDD0 or U+FDD1, which are no characters")
        if self.spelt.search(content) is None:
            return content
        return self.spelt.sub(lambda found: f"{OPEN}{self.names.index(found.group())}{CLOSE}", content)

    def restore(self, text: str) -> str:
        """Put the spelt-out names back, as plain text."""
        return PROTECTED.sub(lambda found: self.names[int(found.group(1))], text) if OPEN in text else text

    def need(self, template: str, *names: str) -> None:
        """Errors: DataError when the tokenizer lacks a special token of the template."""
        missing = [name for name in names if name not in self.names]
        if missing:
            raise DataError(
                f"data.template: {template} needs the special token {missing[0]}, which this model's tokenizer lacks; "
                "use template: plain, a text pattern, or a model that was trained with it"
            )


@dataclass(frozen=True)
class Template:
    """How a conversation is written for the model.

    rows(conversation, which): its examples, where `which[i]` says whether message i is supervised.
    prompt(messages): the texts up to the answer to be generated.
    source: what the cache and the run's record know it by.
    """

    name: str
    source: str
    rows: Callable[[Conversation, Sequence[bool]], Rows]
    prompt: Callable[[Sequence[Message]], Rendered]
    raw: bool = False  # a text pattern without an answer: a prompt is a beginning, not a user's turn
    jinja: str | None = None  # the chat template to save with the tokenizer, for other tools
    alone: bool = False  # it has no place for earlier turns
    fills: Callable[[Sequence[str]], bool] = lambda roles: False  # rows of these roles: the same text around contents


def again(known_as: tuple[str, str | None], section: DataSection, marks: Marks, today: date) -> Template:
    """A template loaded before, by (name, jinja), in another process: its file may have changed, and is not read."""
    name, jinja = known_as
    return load_template(section, marks, None, today) if jinja is None else _jinja(name, jinja, marks, today)


def load_template(section: DataSection, marks: Marks, chat_template: str | None, today: date) -> Template:
    """The template that the recipe asks for. Errors: DataError where the tokenizer cannot serve it."""
    if section.text is not None:
        return _pattern(section, marks)
    name = section.template
    if name == "auto":
        if not chat_template:
            raise DataError(
                "data.template: auto takes the tokenizer's own chat template, and this one has none; name one of "
                f"{', '.join(NAMED)}, a .jinja file, or give data.text"
            )
        return _jinja("auto", chat_template, marks, today)
    if name in NAMED:
        return _named(name, marks, today)
    path = Path(name)
    try:
        return _jinja(path.name, path.read_text(encoding="utf-8"), marks, today)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.template: {path} cannot be read ({error})") from None


def taught(messages: Sequence[Message], supervise: str) -> list[bool]:
    """Which messages are supervised: every answer or the last, but none that says `"train": false`.

    A row of a text pattern has no messages; there the one entry says whether the prompt is supervised as well.
    """
    if not messages:
        return [supervise == "all"]
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    chosen = answers[-1:] if supervise == "last_answer" else answers
    return [message.train is not False and (supervise == "all" or i in chosen) for i, message in enumerate(messages)]


def _everything(messages: Sequence[Message], which: Sequence[bool]) -> bool:
    """Is the whole text taught, prompts included? Answers may be left out of it."""
    return any(flag for message, flag in zip(messages, which, strict=True) if message.role != "assistant")


# -- the tokenizer's own template, and .jinja files ------------------------------------------------------------------


def _jinja(name: str, source: str, marks: Marks, today: date) -> Template:
    render, shape_fills = shaped_chat_template(source, today, bos_token=marks.bos, eos_token=marks.eos)

    def protected(messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [{"role": message.role, "content": marks.protect(message.content)} for message in messages]

    def one(messages: list[dict[str, Any]], answers: Sequence[int]) -> Text | None:
        """The conversation as one text, these answers marked; None where a later message changes an earlier one."""
        full, text, at = render(messages, False), list[Segment](), 0
        for i in answers:
            before = render(messages[:i], True)
            upto = full if i == len(messages) - 1 else render(messages[: i + 1], False)
            end = _end_of_turn(upto[len(before) :], messages[i]["content"], marks)
            if end is None or not (upto.startswith(before) and full.startswith(upto) and at <= len(before)):
                return None
            text += [Segment(full[at : len(before)], False), Segment(upto[len(before) :][:end], True)]
            at = len(before) + end
        return [*text, Segment(full[at:], False)]

    def turn(messages: list[dict[str, Any]], i: int) -> Text:
        """Message i as it would be generated: the conversation up to it, then its own words and the end token."""
        generated = [Segment(render(messages[:i], True), False), Segment(messages[i]["content"] + marks.eos, True)]
        return one(messages[: i + 1], [i]) or generated

    def rows(conversation: Conversation, which: Sequence[bool]) -> Rows:
        messages = protected(conversation.messages)
        if _everything(conversation.messages, which):
            text = one(messages, [i for i, taught in enumerate(which) if not taught])
            if text is None:
                raise BadRow("train: false goes with supervise: answers here: the template rewrites earlier turns")
            return Rows([[_with_end([Segment(said, not silent) for said, silent in text], marks)]], split=False)
        answers = [i for i, taught in enumerate(which) if taught]
        text = one(messages, answers)
        if text is not None:
            return Rows([[_with_end(text, marks)]], split=False)
        return Rows([[_with_end(turn(messages, i), marks)] for i in answers], split=True)

    def prompt(messages: Sequence[Message]) -> Rendered:
        return [[Segment(render(protected(messages), True), False)]]

    def fills(roles: Sequence[str]) -> bool:
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        begun = all(shape_fills(roles[:i], True) and shape_fills(roles[: i + 1], False) for i in answers)
        return begun and shape_fills(roles, False)

    return Template(name, source, rows, prompt, jinja=source, fills=fills)


def _end_of_turn(answer: str, content: str, marks: Marks) -> int | None:
    """Where a rendered answer ends: behind the first special token after its words, else behind its last letter.

    None where the template has changed the words themselves.
    """
    at = answer.find(content.strip())
    if at < 0:
        return None
    found = marks.pattern.search(answer, at + len(content.strip()))
    return found.end() if found else len(answer.rstrip())


def _with_end(text: Text, marks: Marks) -> Text:
    """A template that closes its last answer with no special token would never teach the end: add the tokenizer's."""
    last = max((i for i, segment in enumerate(text) if segment.supervised), default=None)
    if last is None:
        return text
    said = text[last].text.rstrip()
    if any(found.end() >= len(said) for found in marks.pattern.finditer(text[last].text)):
        return text
    return [*text[: last + 1], Segment(marks.eos, True)]


# -- a pattern over the columns --------------------------------------------------------------------------------------


def _pattern(section: DataSection, marks: Marks) -> Template:
    pattern = section.text or ""
    names = pattern_columns(pattern)
    answers = ["response", section.columns.response if section.columns else None]
    answer = next((name for name in answers if name in names), None)
    head, tail = (pattern, "") if answer is None else _parted(pattern, answer)

    def rows(conversation: Conversation, which: Sequence[bool]) -> Rows:
        fields = {name: marks.protect(value) for name, value in conversation.fields.items()}
        if answer is None:
            return Rows([[[Segment(pattern.format_map(fields) + marks.eos, True)]]], split=False)
        said = fields[answer] + tail.format_map(fields) + marks.eos
        return Rows([[[Segment(head.format_map(fields), all(which)), Segment(said, True)]]], split=False)

    def prompt(messages: Sequence[Message]) -> Rendered:
        _stands_alone("a text pattern", messages)
        asked, system = set(pattern_columns(head)), [m.content for m in messages if m.role == "system"]
        if system and "system" not in asked:
            raise BadRow("a text pattern without {system} has no place for a system prompt")
        known = {"system": marks.protect(system[0])} if system else {}
        if answer is None or len(asked - known.keys()) != 1:
            raise DataError(f"data.text: {pattern!r} has no single column for a user's turn; give the prompt raw")
        (turn,) = asked - known.keys()
        return [[Segment(head.format_map({**known, turn: marks.protect(messages[-1].content)}), False)]]

    return Template("text", f"{pattern} → {answer}", rows, prompt, raw=answer is None, alone=True)


def _parted(pattern: str, answer: str) -> tuple[str, str]:
    """The pattern before and behind its answer column, braces still doubled."""
    before, name, behind = pattern.partition("{" + answer + "}")
    if not name:
        raise DataError(f"data.text: write the answer column as {{{answer}}}, without a format")
    return before, behind


# -- named templates -------------------------------------------------------------------------------------------------


CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# For base models: the turns with a line break between them, each answer closed by the end token.
PLAIN = """\
{% for message in messages %}{{ '' if loop.first else '\\n' }}{{ message['content'] }}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"""


def _llama2(marks: Marks) -> Template:
    """Meta's own: each exchange is a text of its own between BOS and EOS, the system prompt inside the first."""
    begin = [Segment(marks.bos, False)]

    def asked(messages: Sequence[Message], i: int) -> str:
        said = marks.protect(messages[i].content.strip())
        if i and messages[i - 1].role == "system":
            said = f"<<SYS>>\n{marks.protect(messages[i - 1].content)}\n<</SYS>>\n\n{said}"
        return f"[INST] {said} [/INST]"

    def rows(conversation: Conversation, which: Sequence[bool]) -> Rows:
        messages = conversation.messages
        _alternating("llama2", messages)
        texts = []
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            answer = f" {marks.protect(message.content.strip())} {marks.eos}"
            texts += [begin, [Segment(asked(messages, i - 1), which[i - 1]), Segment(answer, which[i])]]
        return Rows([texts], split=False)

    def prompt(messages: Sequence[Message]) -> Rendered:
        earlier = rows(Conversation(tuple(messages[:-1])), [False] * (len(messages) - 1)).examples[0]
        return [*earlier, begin, [Segment(asked(messages, len(messages) - 1), False)]]

    return Template("llama2", "llama2", rows, prompt)


def _glm3(marks: Marks) -> Template:
    """ChatGLM3's chat: role mark, metadata and content, each encoded by itself; the next role mark ends an answer."""
    roles = ("user", "assistant", "system", "observation")
    marks.need("glm3", "[gMASK]", "sop", *(f"<|{role}|>" for role in roles))

    def rows(conversation: Conversation, which: Sequence[bool]) -> Rows:
        everything = ends_answer = _everything(conversation.messages, which)
        texts: Rendered = [[Segment("[gMASK]sop", everything)]]
        for message, supervised in zip(conversation.messages, which, strict=True):
            if message.role not in roles:
                raise BadRow(f"the glm3 template has no role {message.role!r}")
            texts += [
                [Segment(f"<|{message.role}|>", ends_answer)],
                [Segment("\n", supervised)],
                [Segment(marks.protect(message.content), supervised)],
            ]
            ends_answer = everything or supervised
        return Rows([[*texts, [Segment(marks.eos, ends_answer)]]], split=False)

    def prompt(messages: Sequence[Message]) -> Rendered:
        said = rows(Conversation(tuple(messages)), [False] * len(messages)).examples[0]
        return [*said[:-1], [Segment("<|assistant|>", False)]]

    return Template("glm3", "glm3", rows, prompt)


def _pair(name: str, marks: Marks, begin: str, between: str, end: str) -> Template:
    """Question and answer encoded apart, without roles: `begin` question `between` answer `end`."""

    def asked(messages: Sequence[Message], supervised: bool = False) -> Rendered:
        _stands_alone(f"the {name} template", messages)
        said = marks.protect("\n".join(message.content for message in messages)) + between
        return [[Segment(begin, supervised)]] * bool(begin) + [[Segment(said, supervised)]]

    def rows(conversation: Conversation, which: Sequence[bool]) -> Rows:
        *question, answer = conversation.messages
        texts = asked(question, _everything(conversation.messages, which))
        return Rows([[*texts, [Segment(marks.protect(answer.content) + end, which[-1])]]], split=False)

    def prompt(messages: Sequence[Message]) -> Rendered:
        return [*asked(messages), []]  # the answer is a text of its own: no blank of the question's moves to it

    return Template(name, name, rows, prompt, alone=True)


def _glm3_pair(marks: Marks) -> Template:
    marks.need("glm3_pair", "[gMASK]", "sop")
    return _pair("glm3_pair", marks, begin="[gMASK]sop", between="", end=marks.eos)


def _yuan2(marks: Marks) -> Template:
    marks.need("yuan2", "<sep>", "<eod>")
    return _pair("yuan2", marks, begin="", between="<sep>", end="<eod>")


def _stands_alone(what: str, messages: Sequence[Message]) -> None:
    if any(message.role == "assistant" for message in messages):
        raise BadRow(f"{what} takes one question and one answer, and has no place for earlier turns")


def _alternating(name: str, messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages if message.role != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2) or any(m.role == "system" for m in messages[1:]):
        raise BadRow(f"the {name} template takes user and assistant in turn, a system prompt only first")


NAMED = ("chatml", "llama2", "glm3", "glm3_pair", "yuan2", "plain")


def _named(name: str, marks: Marks, today: date) -> Template:
    match name:
        case "chatml":
            marks.need("chatml", "<|im_start|>", "<|im_end|>")
            return _jinja("chatml", CHATML, marks, today)
        case "plain":
            return _jinja("plain", PLAIN, marks, today)
        case "llama2":
            return _llama2(marks)
        case "glm3":
            return _glm3(marks)
        case "glm3_pair":
            return _glm3_pair(marks)
        case _:
            return _yuan2(marks)
