"""Ids → the pieces of text that they stand for, token by token, for people to read."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from tokenizers import Tokenizer

from luthier.data.encode import Example

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character yet


class Piece(NamedTuple):
    """A token; or several that only together make a character. `text`: what the tokenizer decodes them to."""

    text: str
    ids: tuple[int, ...]
    supervised: bool
    special: bool


def pieces(example: Example, tokenizer: Tokenizer, special: Container[int]) -> list[Piece]:
    """An example's tokens in order; their texts joined are the decoded row.

    Each piece is decoded behind the one before it, as SentencePiece drops the blank before a text's first word.
    `special`: ids that stand alone, whatever precedes them.
    """
    ids, found = example.ids.tolist(), list[Piece]()
    before, start = 0, 0  # where the previous piece began, and this one
    for stop in range(1, len(ids) + 1):
        context = tokenizer.decode(ids[before:start], skip_special_tokens=False)
        text = tokenizer.decode(ids[before:stop], skip_special_tokens=False)[len(context) :]
        alone = stop == len(ids) or ids[stop] in special or ids[stop - 1] in special
        if alone or (text and not text.endswith(BROKEN)):
            flags = example.supervised[start:stop].tolist()
            if len(set(flags)) == 1:
                found.append(Piece(text, tuple(ids[start:stop]), flags[0], ids[start] in special))
            else:  # a row's first token is never taught, the rest of its character is: each by the tokenizer's name
                named = [str(tokenizer.id_to_token(id)) for id in ids[start:stop]]
                found += [Piece(n, (i,), f, False) for n, i, f in zip(named, ids[start:stop], flags, strict=True)]
            before, start = start, stop
    return found
