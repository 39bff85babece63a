"""A tokenizer as what the data path needs of it: texts without special tokens → ids, in native threads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from luthier.data.words import Words, cuts_at_blanks, packed

NO_PREFIX = b"\x1a\x02\x18\x00"  # behind a SentencePiece model: normalizer_spec { add_dummy_prefix: false }


class Subwords:
    """Ids of texts, as the bytes of int32. A text at the head of another may begin otherwise than one inside it:
    SentencePiece puts a blank before a first word.

    prefix_once: only a text's head has that blank; else every text between two special tokens has it.
    exact: the vendor's own SentencePiece makes the ids, as the fast tokenizer cannot.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: transformers' fast one; it is copied."""
        self.head = _copy(tokenizer.backend_tokenizer)
        self.inner, self.prefix_once = _without_prefix(self.head)
        self.sha256 = hashlib.sha256(self.head.to_str().encode()).hexdigest()
        self.exact: dict[bool, SentencePieceProcessor] = {}
        self._words = self._remembering()

    def take(self, model: bytes) -> None:
        """From here on the ids are SentencePiece's, by this model."""
        self.exact[True] = SentencePieceProcessor(model_proto=model)
        self.exact[False] = SentencePieceProcessor(model_proto=model + NO_PREFIX)
        self._words = None

    def ids(self, texts: Sequence[str], head: bool) -> list[bytes]:
        """The ids of each text."""
        if self._words is not None:
            return self._words.encode(texts)
        return [packed(ids) for ids in self._plain(list(texts), head)]

    def _plain(self, texts: list[str], head: bool) -> list[list[int]]:
        if self.exact:
            exact: list[list[int]] = self.exact[head].encode(texts)
            return exact
        tokenizer = self.head if head else self.inner
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _remembering(self) -> Words | None:
        same = self.inner is self.head and not self.exact
        return Words(lambda texts: self._plain(texts, True)) if same and cuts_at_blanks(self.head) else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_words": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for tokenizer in {id(one): one for one in (self.head, self.inner)}.values():
            tokenizer.encode_special_tokens = True  # no part of a tokenizer's own state
        self._words = self._remembering()


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
