"""The quick ways of the data path give what the slow ones give, row by row: shapes, words, helpers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from array import array
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from luthier.data import templates, workers
from luthier.data.encode import Encoder
from luthier.data.formats import BadRow, Conversation, Message, recognise
from luthier.data.jinja import compile_chat_template
from luthier.data.record import Recorder
from luthier.data.shapes import Shaped, _outliner, shaped_chat_template
from luthier.data.sources import Row, open_source
from luthier.data.templates import CHATML, PLAIN
from luthier.data.words import PATTERNS, Words, cuts_at_blanks
from luthier.errors import DataError
from luthier.sections import DataSection
from tiny import CHATML as TINY
from tiny import TEXTS, tiny_tokenizer

TODAY = date(2026, 3, 4)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ BODY }}<|im_end|>\n{% endfor %}"
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set all = messages %}{% for m in all %}{% set content = '<' + m['role'] + '>\n' + m.content.strip() + '</s>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)
OPENED = {  # these take no decision by a content
    "tiny": TINY,
    "chatml": CHATML,
    "plain": PLAIN,
    "gemma": GEMMA,
    "llama3": LLAMA3,
    "tilde": LOOP.replace("BODY", "m.content ~ '!' ~ m.role") + "{{ messages[0].content ~ '?' }}",
    "string": LOOP.replace("BODY", "m.content if m.content is string else 'list'"),
    "namespace": "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.content %}{% endfor %}"
    "{{ ns.x }}",
}
CLOSED = {  # these do, or may, each in its way
    "empty": "m.content or 'nothing'",
    "lower": "m.content | lower",
    "length": "m.content | length",
    "first": "m.content | first",
    "in": "'fox' in m.content",
    "equal": "m.content == 'fox'",
    "same": "m.content in ['fox', 'x']",
    "method": "m.content.upper()",
    "split": "m.content.split('x')[-1]",
    "slice": "m.content[:2]",
    "percent": "'%s' % m.content",
    "filter": "[m.content] | join(',')",
    "tojson": "m | tojson",
    "repr": "[m.content]",
    "times": "m.content * 2",
    "tilde, then trim": "(m.content ~ ' ') | trim",
    "default": "m.content | default('x', true)",
    "strip of some": "m.content.strip('x')",
    "key": "{'fox': 1}[m.content]",
    "index": "[1, 2][m.content]",
    "call": "range(m.content)",
    "macro": "m.content }}{% macro f(x) %}{{ x }} {% endmacro %}{{ f(m.content) | trim",
    "captured": "1 }}{% set x %}{{ m.content }} {% endset %}{{ x | length",
    "random": "[m.role] | random",
}
CONTENTS = [
    *("fox", "", " ", "  both ends\n", "\n\nlines\n", "春天来了，你好。", "<|im_end|>", "x<s>", "%s {0} {{ x }}"),
    *("\ufdd00\ufdd1", "\ufdd21\ufdd3", "a  b   c", "é e\u0301 \u0301 x", "tab\t x", "nb\u00a0sp \u3000 wide"),
    *("it's \u212a'S we'LL 12345 a1.b2!", "\r\n x\r\ny", "end.\n1. Next\n2. (third)", "a.\n\nb?!\n c", "...\n"),
    *("\x1c x \x85 y", "ſ 'ſ ﬁ ½ ² ª", "x\0y \0 z"),
]  # fmt: skip
ROLES = [
    *(["user"], ["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant", "user", "assistant"]),
    *(["assistant"], ["user", "tool", "assistant"]),
]


def rendered(render: Any, messages: list[dict[str, Any]], begun: bool) -> str:
    try:
        return str(render(messages, begun))
    except BadRow as error:
        return f"bad: {error}"


@pytest.mark.parametrize("source", [*OPENED.values(), *(LOOP.replace("BODY", body) for body in CLOSED.values())])
def test_a_shape_filled_in_is_the_template_rendered(source: str) -> None:
    plain = compile_chat_template(source, TODAY, **TOKENS)
    shaped = shaped_chat_template(source, TODAY, **TOKENS).render
    for roles in ROLES:
        for i in range(0, len(CONTENTS), 1 if source == GEMMA else 3):
            said = [{"role": r, "content": CONTENTS[(i + 7 * n) % len(CONTENTS)]} for n, r in enumerate(roles)]
            for begun in (False, True):
                assert rendered(shaped, said, begun) == rendered(plain, said, begun), said


@pytest.mark.parametrize("name", [*OPENED, *CLOSED])
def test_which_templates_may_be_filled_in(name: str) -> None:
    outline = _outliner(OPENED.get(name) or LOOP.replace("BODY", CLOSED[name]), TODAY, TOKENS)
    assert (outline is not None and outline(["user", "assistant"], False) is not None) == (name in OPENED)


def byte_level(pattern: str | None, nfc: bool = True) -> Tokenizer:
    """A small tokenizer that cuts words by `pattern` (None: GPT-2's own)."""
    made = Tokenizer(models.BPE())
    if nfc:
        made.normalizer = normalizers.NFC()
    alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = pre_tokenizers.Split(Regex(pattern or "x"), "isolated", invert=False)
    made.pre_tokenizer = alone if pattern is None else pre_tokenizers.Sequence([split, alone])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # pairs across every kind of border, many times: what can merge has merged
    mixed = ["".join(pair) for pair in zip(CONTENTS, CONTENTS[1:], strict=False)] + [*TEXTS, *CONTENTS]
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(mixed * 3, trainer)
    made.encode_special_tokens = True
    return made


@pytest.mark.parametrize("pattern", [None, *PATTERNS])
def test_words_give_the_ids_of_the_whole_text(pattern: str | None) -> None:
    tokenizer = byte_level(pattern)
    assert cuts_at_blanks(tokenizer)
    words = Words(lambda texts: [one.ids for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)])
    between = ["", " ", "  ", "\n", " \n", "\n ", "\n\n", ".", ". ", ".\n", "'", " '", "1", " 1", "\r\n", "é", "\u0301"]
    texts = [a + x + b for a in CONTENTS for x in between for b in ("fox", "1.", "春", "", CONTENTS[3])]
    texts = [text for text in texts if "\0" not in text or len(text) < 12]
    expected = [array("i", one.ids).tobytes() for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    for _ in range(2):  # with nothing known, and with all known
        for text, ids, whole in zip(texts, words.encode(texts), expected, strict=True):
            assert ids == whole, ascii(text)
    for text, whole in zip(texts[::-7], expected[::-7], strict=True):
        assert words.encode([text]) == [whole], ascii(text)


def test_tokenizers_of_other_rules_are_not_cut() -> None:
    for spoil in (
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: t.add_tokens(["new york"]),
        lambda t: setattr(t, "encode_special_tokens", False),
        lambda t: setattr(t.model, "dropout", 0.1),
    ):
        tokenizer = byte_level(PATTERNS[0])
        spoil(tokenizer)
        assert not cuts_at_blanks(tokenizer)
    assert not cuts_at_blanks(byte_level(r"\w+|\W+"))


def source(path: Path, count: int) -> Path:
    rows: list[Any] = []
    for i in range(count):
        rows.append({"prompt": CONTENTS[i % 22] + f"q{i}", "response": CONTENTS[(5 * i) % 22] + "x" * (i % 50)})
    rows[5:5] = [{"prompt": "no answer"}, {"prompt": 1, "response": "x"}, {"prompt": "a\0", "response": "b"}, []]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n", encoding="utf-8")
    return path


def recorder(path: Path) -> Recorder:
    section = DataSection(train=str(path), max_length=60, too_long="cut")
    rows = [row for row in open_source(path) if isinstance(row, Row)]
    return Recorder(recognise(rows[:20], section, None), section, Encoder(tiny_tokenizer(), section, TODAY))


def all_of(path: Path, made: Recorder) -> list[dict[str, Any]]:
    return [r for batch, _ in workers.encoded_batches([path, path], made) for r in batch.to_pylist()]


def slow_template(*args: Any, **tokens: str) -> Shaped:
    return Shaped(compile_chat_template(*args, **tokens), lambda *_: False)


SPELT = [
    "<|im_end|>",
    "<|im_",
    "a<",
    "x <|im_end|",
    "end|>",
    "|im_end|>",
    "he fox",
    "\ufdd00\ufdd1",
    "\ufdd21\ufdd3",
    "\x1f",
    " ",
]
SAID = "{{ m['content'] }}"
BEHIND = TINY.replace(SAID, SAID + "|im_end|>")  # the end of a content may make a mark of what is behind it
BEFORE = TINY.replace(SAID, "{{ ('<' if m['role'] == 'user' else '') + m['content'] }}")  # and so may its beginning
BORDER = (
    TINY.replace("\n" + SAID, " t" + SAID).replace("assistant\n", "assistant t").replace("assistant\\n", "assistant t")
)


@pytest.mark.parametrize("source", [TINY, PLAIN, GEMMA, LLAMA3, BEHIND, BEFORE, BORDER])
@pytest.mark.parametrize("supervise", ["answers", "last_answer", "all"])
def test_a_row_by_its_form_is_the_row_rendered_and_cut(source: str, supervise: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    section = DataSection(train="x", supervise=supervise)
    encoder = Encoder(tokenizer, section, TODAY)
    said, by_form = [*CONTENTS, *SPELT], 0
    for roles in ROLES[1:4]:
        for i in range(len(said)):
            turns = [Message(role, said[(i + 5 * n) % len(said)]) for n, role in enumerate(roles)]
            turns[-1] = replace(turns[-1], train=False if i % 5 == 0 and len(roles) > 3 else None)
            row = Conversation(tuple(turns))
            try:
                slow, split = encoder.render(row)
            except BadRow:
                continue
            made, also = encoder.prepared(row)
            by_form += not isinstance(made[0], list)
            assert also == split and list(map(str, encoder.encode(made))) == list(map(str, encoder.encode(slow))), turns
    assert (by_form > 20) == (supervise != "all" and source in (TINY, GEMMA, BORDER)), by_form


def test_any_number_of_helpers_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source(tmp_path / "a.jsonl", 300)
    made = recorder(path)
    alone = all_of(path, made)
    assert {row["status"] for row in alone} == {0, 1, 3} and len(alone) == 610
    # slow in every way: each row by itself, its template rendered, its tokens from Rust
    monkeypatch.setattr(templates, "shaped_chat_template", slow_template)
    slow = recorder(path)
    slow.encoder._subwords._words = None
    rows = [(number, row) for number in (0, 1) for row in open_source(path)]
    assert [r for one in rows for r in slow.batch([one]).to_pylist()] == alone
    monkeypatch.setattr(workers, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(workers, "AHEAD", 2)
    monkeypatch.setattr(workers, "_cores", lambda: 3)
    begun: list[subprocess.Popen[bytes]] = []
    plain = subprocess.Popen

    def noted(*args: Any, **kwargs: Any) -> Any:
        begun.append(plain(*args, **kwargs))
        return begun[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", noted)
    monkeypatch.setattr(workers, "_quietly", lambda *_: None)  # leave what is not its turn to the helpers
    assert all_of(path, made) == alone
    assert len(begun) == 2 and all(process.returncode is not None for process in begun)


def test_a_helper_that_dies_costs_nothing_and_errors_come_in_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(tmp_path / "a.jsonl", 60)
    made = recorder(path)
    alone = all_of(path, made)
    monkeypatch.setattr(workers, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(workers, "AHEAD", 2)
    monkeypatch.setattr(workers, "_cores", lambda: 2)
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    assert all_of(path, made) == alone
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n" + b"{}\n" * 9)
    came = list[int]()
    with pytest.raises(DataError, match="not UTF-8"):
        for batch, _ in workers.encoded_batches([path], made):
            came.append(batch.num_rows)
    assert not came  # one piece of the file: the break is read before its first row


def test_a_helper_says_what_this_process_would(tmp_path: Path) -> None:
    """Its whole talk, as one reads it: ready, then a batch; no torch, no orphan when its input ends."""
    path = source(tmp_path / "a.jsonl", 30)
    made = recorder(path)
    rows = [(0, row) for row in open_source(path)]
    code = "import sys; from luthier.data import workers; workers._work(); sys.exit(3 * ('torch' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(made) + pickle.dumps(rows), capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    ready = pickle.dumps("ready")
    assert done.stdout.startswith(ready)
    batch = pa.ipc.read_record_batch(pa.py_buffer(pickle.loads(done.stdout[len(ready) :])), made.batch(rows).schema)
    assert batch.to_pylist() == made.batch(rows).to_pylist()
