"""Vendors' tokenizer folders without the vendors: small SentencePiece models in their clothes, and texts to try."""

from __future__ import annotations

import io
import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece

from tiny import TEXTS

CLOTHES: dict[str, dict[str, Any]] = {
    "chatglm3": {
        "tokenizer_config.json": {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["x"]}}
    },
    "yuan2": {"config.json": {"model_type": "yuan"}, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
    "llama2": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": False}},
    "unigram": {"config.json": {"model_type": "llama"}},
}
KINDS = {"llama2": "bpe", "chatglm3": "bpe", "yuan2": "tied", "unigram": "nfkc unigram"}
"""Which small model each wears: Yuan's words share their scores."""
SPELT = """
the quick brown Fox people 你好 世界 的 我们 中国人 中华人民共和国 这款 、 。 Привет مرحبا नमस्ते 한국어
ひらがな ﬁ ａｂｃ ① ½
😀 🇨🇳 http://x.y/?a=b def f(x): return 3.14 1,000 -- == PDGF CRKP ▁ ▁▁ <0x0A> <0x41>
<s> </s> <unk> [gMASK] sop <|user|> <sep> <eod> <pad> <|im_start|> [INST]
"""
WORDS = [
    *SPELT.split(),
    *("\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\u200d", "\ufeff", "\u2028", "\0", "\x01", "\x7f", "\x85"),
    *(
        "e\u0301",
        "a\u0300\u0316",
        "👩\u200d👩\u200d👧",
        "\U000e0001",
        "\U0010ffff",
        "\ufffe",
        "\ufffd",
        "\u0378",
        "\U000323b0",
    ),
]
RANGES = [(32, 127), (32, 127), (0x4E00, 0x9FFF), (0, 0x250), (0x300, 0x370), (0x1F300, 0x1FAFF), (1, 0xD800)]
RANGES += [(0xE000, 0x110000)]


def strings(count: int) -> list[str]:
    """Seeded Unicode of every kind, special tokens and the blank's mark spelt out; no noncharacter of Luthier's own."""
    dice = random.Random(7)

    def part() -> str:
        match dice.randrange(4):
            case 0:
                return dice.choice(WORDS)
            case 1:
                return " " * dice.randrange(24)
            case 2:
                return dice.choice(WORDS) + " "
            case _:
                return "".join(chr(dice.randrange(*dice.choice(RANGES))) for _ in range(dice.randrange(1, 6)))

    texts = ["", " ", "  ", "\n", "▁", " ▁ "]
    texts += ["".join(part() for _ in range(dice.randrange(1, 12))) for _ in range(count - len(texts))]
    return [re.sub("[\ufdd0\ufdd1]", "", text) for text in texts]


@cache
def trained(kind: str) -> bytes:
    """A small SentencePiece model with byte fallback, BPE unless `kind` says else.

    nfkc: it normalises a text; squeeze: several blanks become one; tied: words added that share one score, as Yuan's.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        model_type="unigram" if "unigram" in kind else "bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="nmt_nfkc" if "nfkc" in kind else "identity",
        remove_extra_whitespaces="squeeze" in kind,
        minloglevel=2,
    )
    added = ("中", "国", "人", "国人", "中国", "<eod>", "<sep>", "<pad>") if kind == "tied" else ()
    return model.getvalue() + b"".join(_piece(text) for text in added)


def _piece(text: str) -> bytes:
    """A piece of score 0 in protobuf's wire format: a message's repeated fields may be appended to it."""
    body = b"\n" + bytes([len(text.encode())]) + text.encode() + b"\x15" + bytes(4)
    return b"\n" + bytes([len(body)]) + body


def dressed(path: Path, model: bytes | None, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    if model is not None:
        (path / "tokenizer.model").write_bytes(model)
    return path
