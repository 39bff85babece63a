"""The vendors' tokenizers: SentencePiece's own ids for any text, no special token read from one, saved as tried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from luthier.data.encode import Encoded, Encoder
from luthier.data.formats import Conversation, Message
from luthier.errors import ModelError
from luthier.models.load import load_tokenizer
from luthier.models.spm import fast_tokenizer, read_spm
from luthier.models.tokenizers import CHATGLM3_SPECIAL, YUAN2_SPECIAL, save_tokenizer, vendor_tokenizer
from luthier.sections import DataSection
from tiny import tiny_tokenizer
from vendors import CLOTHES, KINDS, dressed, strings, trained

REAL = {
    "chatglm3": "oracle/chatglm3-tiny",
    "yuan2": "oracle/yuan2-tiny",
    "llama2": "tokenizers/llama2",
    "chinese-llama2": "tokenizers/chinese-llama2",
}
real = cache(load_tokenizer)


@pytest.fixture(params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small model in a vendor's clothes."""
    return dressed(tmp_path / "vendor", trained(KINDS[request.param]), **CLOTHES[request.param])


def encoder(tokenizer: Any, **section: Any) -> Encoder:
    return Encoder(tokenizer, DataSection(train="-", **({"text": "{t}"} | section)), date(2026, 1, 1))


def ids_of(made: Encoder, texts: list[str]) -> list[list[int]]:
    """The ids of texts as columns of rows, without what the tokenizer puts before and the end token behind."""
    rows = [made.render(Conversation(fields={"t": text}))[0][0] for text in texts]
    before = len(made.identity["bos"])
    return [one.ids[before:-1] if isinstance(one, Encoded) else [] for one in made.encode(rows)]


def chat(*contents: str, system: str | None = None) -> Conversation:
    said = [
        Message(role, content) for role, content in zip(["user", "assistant"] * len(contents), contents, strict=False)
    ]
    return Conversation((*([Message("system", system)] if system else []), *said))


# -- SentencePiece itself --------------------------------------------------------------------------------------------


def _check(folder: Path, tokenizer: Any, texts: list[str]) -> None:
    made = encoder(tokenizer)
    vendor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = vendor.encode(texts)
    assert ids_of(made, texts) == expected
    assert tokenizer.backend_tokenizer.decode_batch(expected, skip_special_tokens=False) == vendor.decode(expected)
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert not any(special & set(ids) for ids in expected)  # nor does SentencePiece read one from a text
    exact = read_spm(folder / "tokenizer.model").exact
    assert exact != hasattr(tokenizer, "sentencepiece_model")
    if exact:  # then what other tools see is exact as well
        assert tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] == expected


def test_any_text_has_sentencepieces_ids_and_comes_back(folder: Path) -> None:
    _check(folder, load_tokenizer(folder), strings(2000))


@pytest.mark.parametrize(
    "name", ["llama2", *(pytest.param(name, marks=pytest.mark.full) for name in REAL if name != "llama2")]
)
def test_so_it_has_in_the_vendors_own_folder(shared: Path, name: str, request: pytest.FixtureRequest) -> None:
    count = 10_000 if request.node.get_closest_marker("full") else 1000
    blanks = [" " * number + "a" for number in range(200)]
    _check(shared / REAL[name], real(shared / REAL[name]), [*strings(count), *blanks])


@pytest.mark.parametrize(
    ("kind", "text", "exact", "alone"),
    [
        ("tied", "中国人", ["▁", "中国", "人"], ["▁", "中", "国人"]),
        ("squeeze", "▁", [], ["▁", "▁"]),
        ("nfkc", "\x01", ["▁"], []),
        ("unigram", "<s>", ["▁", "<0x3C>", "s", "<0x3E>"], ["▁", "<s>"]),
    ],
)
def test_where_the_fast_tokenizer_cannot_be_exact(kind: str, text: str, exact: Any, alone: Any, tmp_path: Path) -> None:
    """The smallest text of each kind; rows and prompts have SentencePiece's own ids (`_check`), other tools have these.

    tied: of words with one score SentencePiece merges the leftmost, `tokenizers` the one with the lower rank, wherever
    it stands. squeeze: SentencePiece takes a typed U+2581 for a blank at the ends. nfkc: `tokenizers` drops a lone
    control character with the blank before it. unigram: `tokenizers` reads a control piece from text.
    """
    file = dressed(tmp_path / "vendor", trained(kind)) / "tokenizer.model"
    model = read_spm(file)
    fast = fast_tokenizer(model)
    fast.encode_special_tokens = True
    assert not model.exact
    assert sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(text, out_type=str) == exact
    assert fast.encode(text).tokens == alone


# -- the vendors' vectors --------------------------------------------------------------------------------------------


def test_chatglm3_has_the_vendors_ids(shared: Path) -> None:
    tokenizer = real(shared / REAL["chatglm3"])
    expected = json.loads((shared / REAL["chatglm3"] / "expected.json").read_text())
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in CHATGLM3_SPECIAL} == expected["special"]
    assert len(tokenizer) == expected["vocab_size"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (expected["pad"], expected["eos"])
    made = encoder(tokenizer, text=None, template="glm3")
    for case in expected["tokenize"]:
        assert tokenizer.encode(case["text"]) == case["ids"] == made.prompt(case["text"], raw=True)
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids_no_special"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["text"]
    for case in expected["chat"]:
        messages = [Message(one["role"], one["content"]) for one in case["history"]]
        assert made.prompt([*messages, Message(case["role"], case["query"])], raw=False) == case["input_ids"]
    pair = encoder(tokenizer, text=None, template="glm3_pair")
    [one] = pair.encode(pair.render(chat(expected["pair"]["question"], expected["pair"]["answer"]))[0])
    assert isinstance(one, Encoded) and one.ids == expected["pair"]["input_ids"]
    [(start, stop)] = one.spans
    assert one.ids[start:stop] == [*expected["pair"]["answer_ids"], 2]
    assert one.ids[2:start] == expected["pair"]["question_ids"]


@pytest.mark.full
def test_yuan2_has_the_vendors_ids(shared: Path) -> None:
    tokenizer = real(shared / REAL["yuan2"])
    expected = json.loads((shared / REAL["yuan2"] / "expected.json").read_text())
    told = expected["tokenizer"]
    assert list(YUAN2_SPECIAL) == told["added_special_tokens"] and len(tokenizer) == told["length"]
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in told["ids"]} == told["ids"]
    assert tokenizer.eos_token == told["eos_token"]
    made = encoder(tokenizer, text=None, template="yuan2")
    for case in expected["tokenize"]:
        assert tokenizer.encode(case["text"]) == case["ids"] == made.prompt(case["text"], raw=True)
    source, target = "a", "b"
    [one] = made.encode(made.render(chat(source, target))[0])
    assert isinstance(one, Encoded) and one.ids == next(
        c["ids"] for c in expected["tokenize"] if c["text"] == "a<sep>b<eod>"
    )
    assert one.spans == [(2, 4)] and made.prompt(source, raw=False) == one.ids[:2]
    shared_score = made.prompt("CRKP", raw=True)  # the fast tokenizer alone: ▁CR KP
    assert tokenizer.convert_ids_to_tokens(shared_score) == ["▁C", "RK", "P"]


@pytest.mark.parametrize("name", ["llama2", pytest.param("chinese-llama2", marks=pytest.mark.full)])
def test_llamas_model_alone_gives_what_its_tokenizer_json_gives(shared: Path, tmp_path: Path, name: str) -> None:
    whole, folder = shared / REAL[name], dressed(tmp_path / name, None)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(whole / file, folder / file)
    ours, shipped = load_tokenizer(folder), real(whole)
    texts = strings(500)
    assert ours(texts)["input_ids"] == shipped(texts)["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id) == (1, 2, 0, None)
    assert shipped(" a")["input_ids"] == [1, 29871, 263]  # AutoTokenizer of transformers 5 drops the blank


def test_opt_is_transformers_own_with_the_vendors_settings(shared: Path, tmp_path: Path) -> None:
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "errors": "replace", **names}
    bare = dressed(tmp_path / "bare", None, **{"config.json": {"model_type": "opt"}})
    told = dressed(tmp_path / "told", None, **{"tokenizer_config.json": settings})
    for folder in (bare, told):
        for file in ("vocab.json", "merges.txt"):
            shutil.copyfile(shared / "tokenizers/opt" / file, folder / file)
    ours, theirs = load_tokenizer(bare), AutoTokenizer.from_pretrained(told)
    texts = [*strings(500), "Python is the best programming language."]
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert ours(texts[-1])["input_ids"] == [2, 48659, 16, 5, 275, 8326, 2777, 4]
    assert (len(ours), ours.bos_token_id, ours.pad_token_id, ours.eos_token_id) == (50265, 2, 1, 2)
    [typed] = ids_of(encoder(ours), ["say </s> aloud"])
    assert 2 not in typed and ours.decode(typed) == "say </s> aloud"
    _same_after_saving(ours, tmp_path / "saved", "opt")


# -- small rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [None, "glm", "llama"])
def test_saved_it_is_the_same_here_and_elsewhere(folder: Path, tmp_path: Path, merged: str | None) -> None:
    _same_after_saving(load_tokenizer(folder), tmp_path / "saved", merged)


@pytest.mark.full
@pytest.mark.parametrize("name", list(REAL))
def test_so_is_the_vendors_own(shared: Path, tmp_path: Path, name: str) -> None:
    _same_after_saving(real(shared / REAL[name]), tmp_path / "saved", None)


def _same_after_saving(tokenizer: Any, folder: Path, merged: str | None) -> None:
    """In an adapter's folder, or in a merged model's with its config."""
    save_tokenizer(tokenizer, folder)
    if merged:
        (folder / "config.json").write_text(json.dumps({"model_type": merged}))
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    texts = [*strings(50), "a<sep>b<|user|>c</s>d"]
    expected = tokenizer(texts)["input_ids"]
    for other in (ours, theirs):
        assert other(texts)["input_ids"] == expected
        assert (other.eos_token_id, other.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert getattr(ours, "sentencepiece_model", b"") == getattr(tokenizer, "sentencepiece_model", b"")
    assert encoder(ours).identity == encoder(tokenizer).identity


def test_chatglm3s_bare_words_are_marks_only_behind_a_mark(tmp_path: Path) -> None:
    """`sop` and `eop` are special tokens, and letters of "Philosophy" and "people"."""
    tokenizer = load_tokenizer(dressed(tmp_path / "glm", trained("bpe"), **CLOTHES["chatglm3"]))
    made = encoder(tokenizer, text="Philosophy of people: {q}", columns={"prompt": "q", "response": "a"})
    [one] = made.encode(made.render(Conversation(fields={"q": "[gMASK]sop <|user|>"}))[0])
    assert isinstance(one, Encoded)
    begin = tokenizer.convert_tokens_to_ids(["[gMASK]", "sop"])
    assert one.ids[:2] == begin and not {*begin, tokenizer.convert_tokens_to_ids("eop")} & set(one.ids[2:])
    assert tokenizer.decode(one.ids) == "[gMASK]sop Philosophy of people: [gMASK]sop <|user|></s>"


def test_a_settings_file_is_honoured(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": True}
    settings |= {"chat_template": "{{ messages }}", "model_max_length": 77, "pad_token": "</s>"}
    tokenizer = load_tokenizer(dressed(tmp_path / "a", trained("bpe"), **{"tokenizer_config.json": settings}))
    assert tokenizer.encode("the")[-1] == 2 and tokenizer.encode("the")[0] != 1
    assert (tokenizer.chat_template, tokenizer.model_max_length, tokenizer.pad_token_id) == ("{{ messages }}", 77, 2)
    later = {"chat_template": "[gMASK]sop", "additional_special_tokens": ["<|user|>", "<|observation|>"]}
    later |= {"eos_token": "</s>", "pad_token": "<unk>", "added_tokens_decoder": {"420": {"content": "[MASK]"}}}
    clothes = CLOTHES["chatglm3"]["tokenizer_config.json"] | later
    glm = load_tokenizer(dressed(tmp_path / "c", trained("bpe"), **{"tokenizer_config.json": clothes}))
    assert (len(glm), glm.chat_template, glm.split_special_tokens) == (429, "[gMASK]sop", True)
    assert glm.convert_tokens_to_ids(["[MASK]", "<|observation|>", "</s>"]) == [420, 428, 2]
    grown = dressed(tmp_path / "b", trained("tied"), **{"added_tokens.json": {"wordwide": 500}, **CLOTHES["llama2"]})
    assert not hasattr(load_tokenizer(grown), "sentencepiece_model")  # it does not know the added word


def test_a_tokenizer_json_of_another_kind_is_left_to_transformers(tmp_path: Path) -> None:
    """tokenizer.model is also the name of tiktoken's files."""
    for name in ("PreTrainedTokenizerFast", "LlamaTokenizer"):
        path = dressed(tmp_path / name, b"IQ== 0\n")
        tiny_tokenizer().save_pretrained(path)
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": "</s>"}))
        assert vendor_tokenizer(path) is None
        assert load_tokenizer(path)("The fox")["input_ids"] == tiny_tokenizer()("The fox")["input_ids"]


@pytest.mark.parametrize("name", ["chatglm3", "yuan2"])
def test_a_vendors_folder_without_its_model_is_named(tmp_path: Path, name: str) -> None:
    folder = dressed(tmp_path / "x", None, **CLOTHES[name])
    with pytest.raises(
        ModelError, match=r"x: (ChatGLM3|Yuan 2)'s tokenizer needs tokenizer.model, which is not there$"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("damage", [lambda model: b"no model", lambda model: model[:-3], lambda model: b""])
def test_a_damaged_model_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = dressed(tmp_path / "x", damage(trained("bpe")), **CLOTHES["llama2"])
    with pytest.raises(ModelError, match=r"x.tokenizer.model: not a SentencePiece model"):
        load_tokenizer(folder)
