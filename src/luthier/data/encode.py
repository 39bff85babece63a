"""Segments → Example: the only place that makes targets.

A text is cut at its special tokens into *sections*; each section is encoded once, as a whole, in Rust threads. Where
supervision begins inside a section, the tokens before the border must be the very tokens of the text before it (then
a prompt's ids are a prefix of its row's ids); where a token straddles the border, the two sides are encoded apart.
Blanks before an answer belong to the answer: `Author: ` + `Oscar` is taught as `Author:` + ` Oscar`, since ` Oscar`
is one token in every tokenizer at hand.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from luthier.data.formats import BadRow, Conversation, Message
from luthier.data.forms import Filled, Form, Mark, Section, form_of, is_plain, probe, texts_of
from luthier.data.shapes import SHAPES
from luthier.data.subwords import Subwords
from luthier.data.templates import Marks, Rendered, Rows, Segment, again, load_template, taught
from luthier.data.words import packed
from luthier.errors import DataError
from luthier.sections import DataSection

ENCODER_VERSION = 2  # part of the cache's key: raise it when the same row would give other tokens
REMEMBERED = 4096  # sections kept for the whole run: system prompts, role names, line breaks
ID = 4  # bytes of an id


NEXT_TURN = ("<|user|>", "<|observation|>")
"""ChatGLM3 ends an answer with the next turn's mark."""


@dataclass(frozen=True)
class Example:
    """One row of training. ids: int32 [t]; supervised: bool [t], true where token j is a target (never token 0)."""

    ids: np.ndarray
    supervised: np.ndarray


class Encoded(NamedTuple):
    """An example on its way to the cache. spans: token ranges [start, stop) that are supervised, in order."""

    packed: bytes  # the ids, as int32
    spans: list[tuple[int, int]]
    apart: int  # borders where a token straddled, so that the two sides were encoded apart
    row: bytes  # digest of the whole text

    @property
    def ids(self) -> list[int]:
        return _unpacked(self.packed)

    @property
    def length(self) -> int:
        return len(self.packed) // ID

    @property
    def answer_tokens(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def prompt_tokens(self) -> int:
        return self.spans[0][0]


class Encoder:
    """A tokenizer with a template: rows and prompts → ids.

    Errors: DataError where the tokenizer cannot serve the template, or does not encode the sections of a text as it
    encodes the text itself.
    """

    def __init__(self, tokenizer: Any, section: DataSection, today: date) -> None:
        special = {t.content: t for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.marks = Marks(
            names=tuple(special),
            eos=tokenizer.eos_token or "",
            bos=tokenizer.bos_token or "",
            wide={name: (token.lstrip, token.rstrip) for name, token in special.items()},
        )
        if not self.marks.eos:
            raise DataError(
                "this model's tokenizer names no end token (eos_token): an answer's end could not be taught"
            )
        self.template = load_template(section, self.marks, tokenizer.chat_template, today)
        self.section, self.today = section, today
        self._ids: dict[str, int] = {name: tokenizer.convert_tokens_to_ids(name) for name in special}
        self._marks: dict[tuple[str, bool], Mark] = {}
        self._special = set(self._ids.values())
        self._subwords = Subwords(tokenizer)
        self._remembered: dict[tuple[bool, str], bytes] = {}
        self._forms: dict[tuple[tuple[str, ...], tuple[bool, ...]], Form | None] = {}
        self._parses = not tokenizer.split_special_tokens  # special tokens in a raw prompt
        self._begin = b""
        self._check_against(tokenizer)
        self._begin = packed(_begin(tokenizer))
        model: bytes | None = getattr(tokenizer, "sentencepiece_model", None)
        if model:
            self._subwords.take(model)
        next_turn = [self._ids[name] for name in NEXT_TURN if "[gMASK]" in self._ids and name in self._ids]
        alone = self.template.name == "glm3_pair"
        self.end_ids = sorted({tokenizer.eos_token_id, *self._turn_end(), *(() if alone else next_turn)})
        self._identity = {
            "tokenizer": self._subwords.sha256,
            "bos": _unpacked(self._begin),
            "bos_text": self.marks.bos,
            "eos": self.marks.eos,
            "template": self.template.source,
            "today": today.isoformat() if "strftime_now" in self.template.source else None,
            "encoder": ENCODER_VERSION,
        }
        if model:
            self._identity["sentencepiece"] = hashlib.sha256(model).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """What decides a row's ids beside the row and the section: for the cache's key and the run's record."""
        return self._identity

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizers library's object: ids ↔ text, without torch."""
        return self._subwords.head

    def __getstate__(self) -> dict[str, Any]:
        kept = (self.template.name, self.template.jinja)  # its functions cannot be sent to another process
        return {**self.__dict__, "template": kept, "_remembered": {}, "_forms": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.template = again(state["template"], self.section, self.marks, self.today)

    # -- rows --------------------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation) -> Rows:
        """The examples of a conversation, and whether the template made it one a turn. Errors: BadRow."""
        return self.template.rows(conversation, taught(conversation.messages, self.section.supervise))

    def prepared(self, conversation: Conversation) -> tuple[Sequence[Rendered | Filled], bool]:
        """As `render`, or what makes the same ids with less work: the row by the form of its shape."""
        contents = [message.content for message in conversation.messages]
        form = self._form(conversation) if all(is_plain(content, self.marks) for content in contents) else None
        return self.render(conversation) if form is None else ([form.filled(contents, conversation)], False)

    def text(self, rendered: Rendered) -> str:
        """What is encoded, special tokens by name."""
        return self.marks.restore("".join(segment.text for text in rendered for segment in text))

    def encode(self, examples: Sequence[Rendered | Filled]) -> list[Encoded | BadRow]:
        """Encode a batch of examples; one without a supervised token comes back as a BadRow."""
        plans = [[] if isinstance(one, Filled) else self._plan(one) for one in examples]
        filled = (key for one in examples if isinstance(one, Filled) for key in one.texts)
        known = self._encode_texts(chain(filled, texts_of(chain.from_iterable(plans))))
        return [
            self._fill(one, known) if isinstance(one, Filled) else self._assemble(one, plan, known)
            for one, plan in zip(examples, plans, strict=True)
        ]

    def prompt(self, said: str | Sequence[Message], raw: bool) -> list[int]:
        """The ids that generation starts from; a training row of the same prompt begins with the very same ones.

        `raw`: `said` is text, taken as it is; special tokens in it and BOS are by the tokenizer's rule. Else a string
        is the user's turn under the template; system prompt and `before_prompt` are put in as for a row.
        Errors: DataError where the template refuses the messages, or the text holds what no text may.
        """
        messages = [Message("user", said)] if isinstance(said, str) else list(said)
        for message in messages:
            if re.search("[\ud800-\udfff\ufdd0\ufdd1]", message.content):
                raise DataError(f"prompt {ascii(message.content)[:60]}: a lone surrogate or U+FDD0 is no text")
        if raw:
            text = messages[0].content if self._parses else self.marks.protect(messages[0].content)
            return self._flat([[Segment(text, False)]], strip=False)
        try:
            return self._flat(self.template.prompt(self._as_row(messages)), strip=True)
        except BadRow as error:
            raise DataError(f"prompt {messages[-1].content[:60]!r}: {error}") from None

    def _as_row(self, messages: list[Message]) -> list[Message]:
        """What formats.py does with a row: the recipe's system prompt, and `before_prompt` on the first user turn."""
        if self.section.system and not any(message.role == "system" for message in messages):
            messages = [Message("system", self.section.system), *messages]
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is not None:
            messages[first] = Message("user", self.section.before_prompt + messages[first].content)
        return messages

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _form(self, conversation: Conversation) -> Form | None:
        which = taught(conversation.messages, self.section.supervise)
        roles = [message.role for message in conversation.messages]
        key = (tuple(roles), tuple(which))
        if key not in self._forms and len(self._forms) < SHAPES and self.template.fills(roles):
            try:
                examples, split = self.template.rows(probe(roles), which)
            except BadRow:  # rendering the row tells it
                examples, split = [], True
            made = None if split else form_of(examples[0], self._plan(examples[0]), self.marks, self._one)
            self._forms[key] = made
        return self._forms.get(key)

    def _one(self, text: str, head: bool) -> bytes:
        return self._subwords.ids([text], head)[0]

    def _plan(self, rendered: Rendered) -> list[Section | Mark]:
        """Cut every text at its special tokens."""
        plan: list[Section | Mark] = []
        for text in rendered:
            head, pieces = True, list[Segment]()
            for said, supervised in text:
                first, *others = self.marks.split(said)
                pieces.append(Segment(first, supervised))
                for name, behind in zip(others[::2], others[1::2], strict=True):
                    plan += self._section(pieces, head)
                    plan.append(self._mark(name, supervised))
                    head, pieces = False, [Segment(behind, supervised)]
            plan += self._section(pieces, head)
        return plan

    def _mark(self, found: str, supervised: bool) -> Mark:
        known = self._marks.get((found, supervised))
        if known is None:  # some swallow the white space beside them
            known = self._marks[found, supervised] = Mark(packed([self._ids[found.strip()]]), supervised)
        return known

    def _section(self, pieces: list[Segment], head: bool) -> list[Section]:
        """Restore what messages spelt out, join neighbours of one kind, give blanks before an answer to the answer."""
        if len(pieces) == 1:
            [(text, supervised)] = pieces
            alone = (Segment(self.marks.restore(text), supervised),)
            return [Section(alone, head or not self._subwords.prefix_once)] if text else []
        joined: list[Segment] = []
        for text, supervised in pieces:
            text = self.marks.restore(text)
            if joined and joined[-1].supervised == supervised:
                joined[-1] = Segment(joined[-1].text + text, supervised)
            elif joined and supervised:
                kept = joined[-1].text.rstrip(" ")
                blanks = joined[-1].text[len(kept) :]
                joined[-1:] = [Segment(kept, False), Segment(blanks + text, True)]
            else:
                joined.append(Segment(text, supervised))
        whole = tuple(piece for piece in joined if piece.text)
        return [Section(whole, head or not self._subwords.prefix_once)] if whole else []

    def _encode_texts(self, keys: Iterable[tuple[bool, str]]) -> dict[tuple[bool, str], bytes]:
        """Ids of every text, by (head, text); each distinct one is encoded once."""
        wanted = Counter(keys)
        known = self._remembered
        found: dict[tuple[bool, str], bytes] = {}
        for head in (True, False):
            texts = [key[1] for key in wanted if key[0] is head and key not in known]
            if texts:
                found.update(zip([(head, text) for text in texts], self._subwords.ids(texts, head), strict=True))
        for key, ids in found.items():
            if wanted[key] > 1 and len(known) < REMEMBERED:
                known[key] = ids
        return {**found, **{key: known[key] for key in wanted if key in known}}

    def _assemble(
        self, rendered: Rendered, plan: list[Section | Mark], known: dict[tuple[bool, str], bytes]
    ) -> Encoded | BadRow:
        parts: list[tuple[bytes, bool]] = []
        apart = 0
        for unit in plan:
            if isinstance(unit, Mark):
                parts.append(unit)
                continue
            pieces = self._cut(unit, known)
            if pieces is None:
                apart += 1
                pieces = self._apart(unit)
            parts += pieces
        return self._finished(parts, apart, "".join(f"{segment.text}\0" for text in rendered for segment in text))

    def _fill(self, filled: Filled, known: dict[tuple[bool, str], bytes]) -> Encoded | BadRow:
        parts = filled.form.parts([known[key] for key in filled.texts])
        if parts is None:  # a token straddles a border
            return self.encode(self.render(filled.conversation).examples)[0]
        return self._finished(parts, 0, filled.known_by)

    def _finished(self, parts: list[tuple[bytes, bool]], apart: int, known_by: str) -> Encoded | BadRow:
        ids, spans = _joined(parts)
        if not ids.startswith(self._begin):
            ids, spans = _joined([(self._begin, False), *parts])
        return Encoded(ids, spans, apart, digest(known_by)) if spans else BadRow("no token of it is supervised")

    def _cut(self, section: Section, known: dict[tuple[bool, str], bytes]) -> list[tuple[bytes, bool]] | None:
        """The section's ids by piece, or None where a token straddles a border."""
        if len(section.pieces) == 1:
            [(text, supervised)] = section.pieces
            return [(known[section.head, text], supervised)]
        whole, before, at = known[section.head, section.text], "", [0]
        for piece in section.pieces:
            before += piece.text
            ids = known[section.head, before]
            if not whole.startswith(ids):
                return None
            at.append(len(ids))
        return [
            (whole[start:stop], piece.supervised)
            for (start, stop), piece in zip(pairwise(at), section.pieces, strict=True)
        ]

    def _apart(self, section: Section) -> list[tuple[bytes, bool]]:
        return [
            (self._subwords.ids([text], section.head and not i)[0], flag)
            for i, (text, flag) in enumerate(section.pieces)
        ]

    def _flat(self, rendered: Rendered, strip: bool) -> list[int]:
        plan = self._plan(rendered)
        if strip and plan and isinstance(plan[-1], Section) and rendered[-1]:
            last = plan.pop()
            assert isinstance(last, Section)
            plan += self._section([Segment(last.text.rstrip(" "), False)], last.head)
        known = self._encode_texts(texts_of(plan))
        ids = b"".join(unit.id if isinstance(unit, Mark) else known[unit.head, unit.text] for unit in plan)
        return _unpacked(ids if ids.startswith(self._begin) else self._begin + ids)

    def count(self, text: str) -> tuple[int, list[int]]:
        """Tokens of a plain text, and for each the character at which it ends: the fast tokenizer's, for a cut."""
        encoding = self._subwords.head.encode(text, add_special_tokens=False)
        return len(encoding.ids), [stop for _, stop in encoding.offsets]

    def plain_tokens(self, ids: Sequence[int]) -> int:
        """How many of the ids are no special tokens."""
        return sum(i not in self._special for i in ids)

    # -- checks ------------------------------------------------------------------------------------------------------

    def _turn_end(self) -> list[int]:
        """The special token that closes an answer under the template, by rendering one."""
        probe = Conversation((Message("user", "a"), Message("assistant", "b")))
        if self.section.text is not None:
            return []
        try:
            encoded = self.encode(self.template.rows(probe, taught(probe.messages, "answers")).examples)[0]
        except BadRow as error:
            raise DataError(
                f"data.template: {self.template.name} cannot write one question and answer: {error}"
            ) from None
        assert isinstance(encoded, Encoded)
        last = encoded.ids[encoded.spans[-1][1] - 1]
        return [last] if last in self._special else []

    def _check_against(self, tokenizer: Any) -> None:
        """Sections encoded one by one must be what the tokenizer itself makes of the whole text."""
        for text in ("Ab c{0}d 中 {0}\ne", "{0}x{0}  y", "no mark, 两 words"):
            probe = text.format(self.marks.eos)
            expected = tokenizer.encode(probe, add_special_tokens=False, split_special_tokens=False)
            if self._flat([[Segment(probe, False)]], strip=False) != expected:
                raise DataError(
                    f"this tokenizer ({type(tokenizer).__name__}) encodes text around special tokens unlike its parts"
                )


def _begin(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: BOS, `[gMASK] sop`, or nothing."""
    whole: list[int] = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)]


def _joined(parts: list[tuple[bytes, bool]]) -> tuple[bytes, list[tuple[int, int]]]:
    """Ids in one, supervised ranges joined where they touch; token 0 has nothing to be predicted from."""
    spans: list[tuple[int, int]] = []
    at = 0
    for piece, supervised in parts:
        start, at = at, at + len(piece) // ID
        start = max(start, 1)
        if not supervised or start >= at:
            continue
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], at)
        else:
            spans.append((start, at))
    return b"".join([ids for ids, _ in parts]), spans


def _unpacked(ids: bytes) -> list[int]:
    return list(memoryview(ids).cast("i"))


def digest(text: str) -> bytes:
    """Eight bytes that tell texts apart."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
