"""Tokens as text for people: whole characters, every id once, what is taught and what is special told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from luthier.data.encode import Example
from luthier.data.pieces import Piece, pieces
from tiny import tiny_tokenizer

TEXTS = [
    "The quick brown fox\n\njumps  over.",
    "春天来了，小鸟在树上唱歌。",
    "mixed 中文 and 😀🏳️‍🌈 emoji, é, ñ",
    " leading and trailing ",
    "a\ufffdb",
]
REAL = ["llama2", "chinese-llama2"]


@pytest.fixture(params=["tiny", *REAL])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "tiny":
        return tiny_tokenizer().backend_tokenizer
    folder = request.getfixturevalue("shared") / "tokenizers" / request.param
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def cut(tokenizer: Tokenizer, text: str, border: int) -> tuple[list[int], list[Piece]]:
    """A row <s> text </s> of which everything from token `border` on is taught."""
    bos, eos = (tokenizer.token_to_id(name) for name in ("<s>", "</s>"))
    ids = [bos, *tokenizer.encode(text, add_special_tokens=False).ids, eos]
    example = Example(np.array(ids, np.int32), np.arange(len(ids)) >= border)
    return ids, pieces(example, tokenizer, {bos, eos})


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_row(tokenizer: Tokenizer, text: str) -> None:
    ids, found = cut(tokenizer, text, 1)
    assert "".join(piece.text for piece in found) == tokenizer.decode(ids, skip_special_tokens=False)
    assert [id for piece in found for id in piece.ids] == ids
    assert [piece.special for piece in found] == [True, *[False] * (len(found) - 2), True]
    assert [piece.supervised for piece in found] == [False, *[True] * (len(found) - 1)]
    assert "".join(piece.text for piece in found).count("\ufffd") == text.count("\ufffd")


def test_a_character_of_several_tokens_is_one_piece() -> None:
    tokenizer = tiny_tokenizer().backend_tokenizer
    encoded = tokenizer.encode("鲸鱼", add_special_tokens=False)
    assert len(encoded.ids) == 6  # no character of it is in the tiny vocabulary: its bytes
    _, found = cut(tokenizer, "鲸鱼", 1)
    assert [(piece.text, len(piece.ids)) for piece in found] == [("<s>", 1), ("鲸", 3), ("鱼", 3), ("</s>", 1)]


def test_a_character_that_is_taught_in_part_is_shown_by_its_tokens() -> None:
    """Without BOS a row's first token is never taught, the rest of its character is."""
    tokenizer = tiny_tokenizer().backend_tokenizer
    ids = tokenizer.encode("鲸x", add_special_tokens=False).ids
    found = pieces(Example(np.array(ids, np.int32), np.arange(4) >= 1), tokenizer, set())
    assert [(piece.ids, piece.supervised) for piece in found] == [
        ((ids[0],), False),
        ((ids[1],), True),
        ((ids[2],), True),
        ((ids[3],), True),
    ]
    assert [piece.text for piece in found] == [*(tokenizer.id_to_token(id) for id in ids[:3]), "x"]
    assert "\ufffd" not in "".join(piece.text for piece in found)


def test_broken_bytes_do_not_swallow_what_follows() -> None:
    tokenizer: Any = tiny_tokenizer().backend_tokenizer
    half = tokenizer.encode("鲸", add_special_tokens=False).ids[:2]
    ids = [*half, 3, *tokenizer.encode("x", add_special_tokens=False).ids]
    found = pieces(Example(np.array(ids, np.int32), np.zeros(4, bool)), tokenizer, {3})
    assert [(piece.text, piece.special) for piece in found] == [("\ufffd", False), ("<|im_end|>", True), ("x", False)]
