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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from luthier.data.formats import BadRow, Conversation, Message
from luthier.data.templates import Marks, Rendered, Segment, load_template, taught
from luthier.errors import DataError
from luthier.sections import DataSection

ENCODER_VERSION = 2  # part of the cache's key: raise it when the same row would give other tokens
REMEMBERED = 4096  # sections kept for the whole run: system prompts, role names, line breaks
NO_PREFIX = b"\x1a\x02\x18\x00"  # behind a SentencePiece model: normalizer_spec { add_dummy_prefix: false }


NEXT_TURN = ("<|user|>", "<|observation|>")
"""ChatGLM3 ends an answer with the next turn's mark."""


@dataclass(frozen=True)
class Example:
    """One row of training. ids: int32 [t]; supervised: bool [t], true where token j is a target (never token 0)."""

    ids: np.ndarray
    supervised: np.ndarray


class Encoded(NamedTuple):
    """An example on its way to the cache. spans: token ranges [start, stop) that are supervised, in order."""

    ids: list[int]
    spans: list[tuple[int, int]]
    apart: int  # borders where a token straddled, so that the two sides were encoded apart
    row: bytes  # digest of the whole text

    @property
    def answer_tokens(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def prompt_tokens(self) -> int:
        return self.spans[0][0]


class Section(NamedTuple):
    """A stretch of text without special tokens: encoded as one. `head`: it begins a text (and its first word)."""

    pieces: tuple[Segment, ...]
    head: bool

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


class Mark(NamedTuple):
    """A special token of the template."""

    id: int
    supervised: bool


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
        self._special = set(self._ids.values())
        self._head = _copy(tokenizer.backend_tokenizer)
        self._inner, self._prefix_once = _without_prefix(self._head)
        self._remembered: dict[tuple[bool, str], list[int]] = {}
        self._parses = not tokenizer.split_special_tokens  # special tokens in a raw prompt
        self._begin: list[int] = []
        self._exact: dict[bool, SentencePieceProcessor] = {}  # makes the ids where the fast tokenizer cannot
        self._check_against(tokenizer)
        self._begin = _begin(tokenizer)
        model: bytes | None = getattr(tokenizer, "sentencepiece_model", None)
        if model:
            self._exact[True] = SentencePieceProcessor(model_proto=model)
            self._exact[False] = SentencePieceProcessor(model_proto=model + NO_PREFIX)
        next_turn = [self._ids[name] for name in NEXT_TURN if "[gMASK]" in self._ids and name in self._ids]
        alone = self.template.name == "glm3_pair"
        self.end_ids = sorted({tokenizer.eos_token_id, *self._turn_end(), *(() if alone else next_turn)})
        self._identity = {
            "tokenizer": hashlib.sha256(self._head.to_str().encode()).hexdigest(),
            "bos": self._begin,
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
        return self._head

    # -- rows --------------------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation) -> tuple[list[Rendered], bool]:
        """The examples of a conversation, and whether the template made it one a turn. Errors: BadRow."""
        return self.template.rows(conversation, taught(conversation.messages, self.section.supervise))

    def text(self, rendered: Rendered) -> str:
        """What is encoded, special tokens by name."""
        return self.marks.restore("".join(segment.text for text in rendered for segment in text))

    def encode(self, examples: Sequence[Rendered]) -> list[Encoded | BadRow]:
        """Encode a batch of rendered examples; one without a supervised token comes back as a BadRow."""
        plans = [self._plan(rendered) for rendered in examples]
        known = self._encode_sections(unit for plan in plans for unit in plan if isinstance(unit, Section))
        return [self._assemble(rendered, plan, known) for rendered, plan in zip(examples, plans, strict=True)]

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

    def _plan(self, rendered: Rendered) -> list[Section | Mark]:
        """Cut every text at its special tokens."""
        plan: list[Section | Mark] = []
        for text in rendered:
            head, pieces = True, list[Segment]()
            for segment in text:
                at = 0
                for found in self.marks.pattern.finditer(segment.text):
                    pieces.append(Segment(segment.text[at : found.start()], segment.supervised))
                    plan += self._section(pieces, head)
                    plan.append(Mark(self._ids[found.group().strip()], segment.supervised))
                    head, pieces, at = False, [], found.end()
                pieces.append(Segment(segment.text[at:], segment.supervised))
            plan += self._section(pieces, head)
        return plan

    def _section(self, pieces: list[Segment], head: bool) -> list[Section]:
        """Restore what messages spelt out, join neighbours of one kind, give blanks before an answer to the answer."""
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
        return [Section(whole, head or not self._prefix_once)] if whole else []

    def _encode_sections(self, sections: Iterable[Section]) -> dict[tuple[bool, str], list[int]]:
        """Ids of every section's text, and of the text before each of its borders; each distinct text once."""
        wanted: dict[tuple[bool, str], int] = {}
        for section in sections:
            before = ""
            for piece in section.pieces:
                before += piece.text
                wanted[section.head, before] = wanted.get((section.head, before), 0) + 1
        known = self._remembered
        fresh = [key for key in wanted if key not in known]
        found: dict[tuple[bool, str], list[int]] = {}
        for head in (True, False):
            keys = [key for key in fresh if key[0] is head]
            found.update(zip(keys, self._ids_of([text for _, text in keys], head), strict=True))
        for key, ids in found.items():
            if wanted[key] > 1 and len(known) < REMEMBERED:
                known[key] = ids
        return {**found, **{key: known[key] for key in wanted if key in known}}

    def _ids_of(self, texts: list[str], head: bool) -> list[list[int]]:
        """Texts without special tokens → ids, in native threads."""
        if self._exact:
            exact: list[list[int]] = self._exact[head].encode(texts)
            return exact
        tokenizer = self._head if head else self._inner
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _assemble(
        self, rendered: Rendered, plan: list[Section | Mark], known: dict[tuple[bool, str], list[int]]
    ) -> Encoded | BadRow:
        parts: list[tuple[list[int], bool]] = []
        apart = 0
        for unit in plan:
            if isinstance(unit, Mark):
                parts.append(([unit.id], unit.supervised))
                continue
            pieces = self._cut(unit, known)
            if pieces is None:
                apart += 1
                pieces = self._apart(unit)
            parts += pieces
        if list(islice(chain.from_iterable(ids for ids, _ in parts), len(self._begin))) != self._begin:
            parts.insert(0, (self._begin, False))
        ids, spans = _joined(parts)
        if not spans:
            return BadRow("no token of it is supervised")
        return Encoded(ids, spans, apart, digest(segment.text for text in rendered for segment in text))

    def _cut(self, section: Section, known: dict[tuple[bool, str], list[int]]) -> list[tuple[list[int], bool]] | None:
        """The section's ids by piece, or None where a token straddles a border."""
        if len(section.pieces) == 1:
            return [(known[section.head, section.text], section.pieces[0].supervised)]
        whole, before, at = known[section.head, section.text], "", [0]
        for piece in section.pieces:
            before += piece.text
            ids = known[section.head, before]
            if whole[: len(ids)] != ids:
                return None
            at.append(len(ids))
        return [
            (whole[start:stop], piece.supervised)
            for (start, stop), piece in zip(pairwise(at), section.pieces, strict=True)
        ]

    def _apart(self, section: Section) -> list[tuple[list[int], bool]]:
        return [
            (self._ids_of([text], section.head and not i)[0], flag) for i, (text, flag) in enumerate(section.pieces)
        ]

    def _flat(self, rendered: Rendered, strip: bool) -> list[int]:
        plan = self._plan(rendered)
        if strip and plan and isinstance(plan[-1], Section) and rendered[-1]:
            last = plan.pop()
            assert isinstance(last, Section)
            plan += self._section([Segment(last.text.rstrip(" "), False)], last.head)
        known = self._encode_sections(unit for unit in plan if isinstance(unit, Section))
        ids = [i for unit in plan for i in ([unit.id] if isinstance(unit, Mark) else known[unit.head, unit.text])]
        return ids if ids[: len(self._begin)] == self._begin else [*self._begin, *ids]

    def count(self, text: str) -> tuple[int, list[int]]:
        """Tokens of a plain text, and for each the character at which it ends: the fast tokenizer's, for a cut."""
        encoding = self._head.encode(text, add_special_tokens=False)
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


def _without_prefix(head: Tokenizer) -> tuple[Tokenizer, bool]:
    """The tokenizer without SentencePiece's blank before the first word, and whether only a text's start has it."""
    pre = head.pre_tokenizer
    if isinstance(pre, pre_tokenizers.Metaspace) and pre.prepend_scheme != "never":
        inner = _copy(head)
        inner.pre_tokenizer = pre_tokenizers.Metaspace(pre.replacement, prepend_scheme="never", split=pre.split)
        return inner, pre.prepend_scheme == "first"
    whole = head.normalizer
    parts = [whole[i] for i in range(len(whole))] if isinstance(whole, normalizers.Sequence) else []
    if any(isinstance(part, normalizers.Prepend) for part in parts):
        inner = _copy(head)
        inner.normalizer = normalizers.Sequence([part for part in parts if not isinstance(part, normalizers.Prepend)])
        return inner, False
    return head, False


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of our own, in which a text never yields special tokens."""
    own = Tokenizer.from_str(tokenizer.to_str())
    own.no_padding()
    own.no_truncation()
    own.encode_special_tokens = True
    return own


def _joined(parts: list[tuple[list[int], bool]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids in one list, supervised ranges joined where they touch; token 0 has nothing to be predicted from."""
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for piece, supervised in parts:
        start, stop = max(len(ids), 1), len(ids) + len(piece)
        ids += piece
        if not supervised or start >= stop:
            continue
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
    return ids, spans


def digest(texts: Iterable[str]) -> bytes:
    """Eight bytes that tell texts apart."""
    state = hashlib.blake2b(digest_size=8)
    for text in texts:
        state.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return state.digest()
