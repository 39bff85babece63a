"""Texts → ids word by word, each distinct word encoded once, where the tokenizer's rules allow it.

Byte-level BPE as GPT-2, Qwen and Llama 3 have it cuts a text into words before it merges anything, and the ids of a
word depend on nothing around it. Their patterns all begin a word at a single blank between two characters that are no
white space: only a run of white space reads on over a blank, only such a run looks ahead, and none touches that blank.
Nor does NFC look across it: no composition begins with a blank, and no mark moves past one. So a text may be cut
there, and its ids are those of its parts. English is then a look into a dictionary, and only new words go to Rust;
a language that is written without blanks goes there whole.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

from tokenizers import Tokenizer, models

KEPT = 1 << 17
"""Parts remembered, some 30 MB of them; later ones are encoded anew in each batch."""
LONGEST = 24
"""Characters of a part that is worth remembering."""
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = (_LETTERS + r"\p{N}" + _REST, _LETTERS + r"\p{N}{1,3}" + _REST)
"""Qwen's and Llama 3's; GPT-2's stands in the tokenizers library itself."""
_CUT = re.compile(r"(?<=\S)(?= \S)")
_CLEAN = re.compile(r"(?: ?\S|[^ ])(?s:.*)(?<=\S)")
"""A part that may follow a cut at any blank, and be followed by one."""
_LINE = re.compile(r"(?<=\S\n)(?=\S)")
"""A new part is cut further. A single line break between two others ends a word in all patterns: it is taken by the
punctuation before it, or stands alone, and is too short to look ahead."""
_WORD = re.compile(r"( ?[A-Za-z0-9]+)([!-/:-@\[-`{-~]+\n?|\n)")
"""Letters and digits never share a word with punctuation or the line break behind them, where no letter follows."""


def cuts_at_blanks(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's texts may be cut as above: it has to be one of those word for word."""
    model = tokenizer.model
    return (
        isinstance(model, models.BPE)
        and not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)
        and _described(tokenizer.normalizer) in (None, {"type": "NFC"})
        and _byte_level(_described(tokenizer.pre_tokenizer))
        and tokenizer.encode_special_tokens
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())  # others are found anywhere
    )


def _described(part: Any) -> Any:
    return None if part is None else json.loads(part.__getstate__())


def _byte_level(pre: Any) -> bool:
    match pre:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern in PATTERNS
    return False


class Words:
    """The parts that texts have been cut into, with their ids as the bytes of int32."""

    def __init__(self, encode: Callable[[list[str]], list[list[int]]]) -> None:
        self._encode = encode
        self._known: dict[str, bytes] = {}  # only clean parts between two calls
        self._bits: dict[str, bytes] = {}  # what new parts were made of

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text."""
        known = self._known
        cut = [text.replace(" ", "\0 ").split("\0") for text in texts]  # before every blank, in C
        unfit = {p for p in dict.fromkeys(chain.from_iterable(cut)) if p not in known and not _CLEAN.fullmatch(p)}
        for i, (text, parts) in enumerate(zip(texts, cut, strict=True)):
            if "\0" in text or not unfit.isdisjoint(parts):
                cut[i] = _CUT.split(text)
        fresh = dict.fromkeys(part for part in chain.from_iterable(cut) if part not in known)
        before = len(known)
        known.update(zip(fresh, self._new(fresh), strict=True))
        found = [b"".join(map(known.__getitem__, parts)) for parts in cut]
        _forget(known, [part for part in fresh if not _CLEAN.fullmatch(part)], fresh, before)
        return found

    def _new(self, parts: Iterable[str]) -> list[bytes]:
        """The ids of parts, by their lines and, in those, by the word and the punctuation behind it."""
        known, fresh = self._bits, dict[str, None]()
        made = [[bit for line in _LINE.split(part) for bit in _bits(line)] for part in parts]
        fresh.update((bit, None) for bits in made for bit in bits if bit not in known)
        before = len(known)
        known.update(zip(fresh, map(packed, self._encode(list(fresh))), strict=True))
        found = [b"".join(map(known.__getitem__, bits)) for bits in made]
        _forget(known, [], fresh, before)
        return found


def _bits(line: str) -> tuple[str, ...]:
    split = _WORD.fullmatch(line)
    return split.groups() if split else (line,)


def _forget(known: dict[str, bytes], unfit: Sequence[str], fresh: Iterable[str], before: int) -> None:
    """Take out what is not worth remembering, or finds no room."""
    for part in unfit:
        del known[part]
    for part in fresh:
        if before >= KEPT or len(part) > LONGEST:
            known.pop(part, None)
        else:
            before += 1


def packed(ids: Sequence[int]) -> bytes:
    """Ids as the bytes of int32."""
    return array("i", ids).tobytes()
