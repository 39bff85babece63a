"""A SentencePiece `tokenizer.model` → a fast tokenizer.

The file is read here, field by field: SentencePiece's own protobuf module needs a protobuf of just the right version.
Numbers of fields and kinds of pieces: sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from luthier.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
SPACE = "▁"


@dataclass(frozen=True)
class SpmModel:
    """What a tokenizer.model holds. pieces: (text, score, kind) by id; charsmap: its normalisation, empty for none."""

    pieces: list[tuple[str, float, int]]
    algorithm: int
    charsmap: bytes
    prefix: bool  # a blank before the first word
    squeeze: bool  # blanks at the ends go, several become one

    @property
    def exact(self) -> bool:
        """Does the fast tokenizer give SentencePiece's ids for every text?

        SentencePiece merges the leftmost of several pairs with one score; `tokenizers` knows only one rank for each
        pair. Yuan 2 and the Chinese Llamas added tens of thousands of words at score 0. Llama's own runs of blanks
        share a score as well, and come out alike (tested up to 200).
        """
        kinds = {kind for _, _, kind in self.pieces}
        scores = [s for text, s, kind in self.pieces if kind == NORMAL and len(text) > 1 and text.strip(SPACE)]
        plain = self.algorithm == BPE and not self.charsmap and not self.squeeze
        return plain and not kinds & {USER_DEFINED, UNUSED} and len(set(scores)) == len(scores)


def read_spm(file: Path) -> SpmModel:
    """Errors: ModelError where the file is no SentencePiece model, or one of a kind that no language model uses."""
    try:
        whole = list(_fields(file.read_bytes()))
        pieces = [_piece(value) for number, value in whole if number == 1]
        trainer, normalizer = (
            {n: v for number, value in whole if number == which for n, v in _fields(value)} for which in (2, 3)
        )
    except (IndexError, TypeError, ValueError, struct.error):
        raise ModelError(f"{file}: not a SentencePiece model") from None
    algorithm = trainer.get(3, UNIGRAM)
    if not pieces or algorithm not in (UNIGRAM, BPE):
        raise ModelError(f"{file}: not a SentencePiece model of words' pieces (BPE or unigram)")
    if trainer.get(24, 0) or not normalizer.get(5, 1):
        raise ModelError(f"{file}: it writes blanks behind a word or unmarked, which no known language model does")
    return SpmModel(pieces, algorithm, normalizer.get(2, b""), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))


def fast_tokenizer(model: SpmModel) -> Tokenizer:
    """The same vocabulary, normalisation and merges; control pieces are special, user-defined ones are kept whole."""
    bytes_too = any(kind == BYTE for _, _, kind in model.pieces)
    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    if unknown is None:
        raise ModelError("the SentencePiece model has no piece for what is unknown")
    own: models.BPE | models.Unigram
    if model.algorithm == BPE:
        vocabulary = {text: i for i, (text, _, _) in enumerate(model.pieces)}
        own = models.BPE(
            vocabulary, _merges(model), unk_token=model.pieces[unknown][0], fuse_unk=True, byte_fallback=bytes_too
        )
    else:
        scored = [(text, score) for text, score, _ in model.pieces]
        own = models.Unigram(scored, unk_id=unknown, byte_fallback=bytes_too)
    made = Tokenizer(own)
    made.normalizer = _normalizer(model)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            *([decoders.ByteFallback()] if bytes_too else []),
            decoders.Fuse(),
            *([decoders.Strip(" ", 2**16 if model.squeeze else 1, 0)] if model.prefix else []),
        ]
    )
    for text, _, kind in model.pieces:
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(text, special=kind != USER_DEFINED, normalized=False)])
    return made


def _merges(model: SpmModel) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order of SentencePiece's scores, then of the ids."""
    ids = {text: i for i, (text, _, kind) in enumerate(model.pieces) if kind == NORMAL}
    found = []
    for text, i in ids.items():
        for at in range(1, len(text)):
            left, right = ids.get(text[:at]), ids.get(text[at:])
            if left is not None and right is not None:
                found.append((-model.pieces[i][1], i, left, right))
    return [(model.pieces[left][0], model.pieces[right][0]) for _, _, left, right in sorted(found)]


def _normalizer(model: SpmModel) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.squeeze:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


# -- protobuf's wire format (protobuf.dev/programming-guides/encoding) -------------------------------------------------


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of one message: number, and an int or its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"wire type {wire}")
            size, at = _varint(data, at)
        if at + size > len(data):
            raise ValueError("cut short")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    return fields[1].decode("utf-8"), struct.unpack("<f", fields.get(2, bytes(4)))[0], fields.get(3, NORMAL)
