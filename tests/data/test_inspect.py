"""The facts of `look`, against counts made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from luthier.data.cache import SCHEMA, cached
from luthier.data.encode import Encoder
from luthier.data.examples import Examples, Source, spread
from luthier.data.formats import Format
from luthier.data.inspect import Check, Look, look
from luthier.data.prepare import Data, prepare
from luthier.sections import Columns, DataSection
from tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: Sequence[dict[str, Any] | str]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def qa(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "response": answer} for prompt, answer in pairs]


def made(tokenizer: Any = None, **section: Any) -> tuple[Data, Encoder, DataSection]:
    asked = DataSection(**section)
    encoder = Encoder(tokenizer or tiny_tokenizer(), asked, date(2026, 3, 4))
    return prepare(asked, encoder, lambda _: None), encoder, asked


def looked(rows: int = 3, seed: int = 0, **section: Any) -> Look:
    data, encoder, asked = made(**section)
    return look(data, encoder, asked, rows, seed)


def check(facts: Look, beginning: str) -> Check:
    [found] = [check for check in facts.checks if check.what.startswith(beginning)]
    return found


WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "old",
    "town",
    "river",
    "lives",
    "where",
    "does",
]


def sentence(seed: int, words: int = 12) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def test_the_rows_shown_are_the_rows_trained_on(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", qa(*((f"Q{i} 春天", f"A{i} 鲸 <|im_end|>") for i in range(20))))
    data, encoder, section = made(train=file)
    facts = look(data, encoder, section, 4, seed=0)
    assert len(facts.rows) == 4
    origins = [data.train.origin(i) for i in range(20)]
    for row in facts.rows:
        number = origins.index(row.origin)
        assert row.ids == data.train[number].ids.tolist()
        assert [id for piece in row.pieces for id in piece.ids] == row.ids
        assert row.supervised == data.train.supervised[number]
        text = "".join(piece.text for piece in row.pieces)
        assert text == (
            f"<|im_start|>user\nQ{number} 春天<|im_end|>\n<|im_start|>assistant\nA{number} 鲸 <|im_end|><|im_end|>\n"
        )
        taught = "".join(piece.text for piece in row.pieces if piece.supervised)
        assert taught == f"A{number} 鲸 <|im_end|><|im_end|>"
        # what a user typed is no special token, though it reads the same
        assert [piece.text for piece in row.pieces if piece.special and piece.supervised] == ["<|im_end|>"]
    assert [row.origin for row in look(data, encoder, section, 4, seed=0).rows] == [row.origin for row in facts.rows]
    assert [row.origin for row in look(data, encoder, section, 4, seed=1).rows] != [row.origin for row in facts.rows]
    assert len(look(data, encoder, section, 50, seed=0).rows) == 20


def test_lengths_and_shares(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", qa(*(("x" * i, "y" * (2 * i)) for i in range(1, 101))))
    data, encoder, section = made(train=file)
    facts = look(data, encoder, section, 1, 0)
    prompt, answer, whole = facts.lengths
    assert [part.what for part in facts.lengths] == ["prompt", "answer", "row"]
    around = len(encoder.prompt("x", raw=False)) - 1
    assert prompt.percentiles == [around + n for n in (1, 5, 25, 50, 75, 95, 99, 100)]
    assert answer.percentiles == [2 * n + 1 for n in (1, 5, 25, 50, 75, 95, 99, 100)]
    assert whole.percentiles[0] == around + 1 + 3 + 1  # … and the line break behind the answer
    for part in facts.lengths:
        assert sum(part.counts) == 100
        assert part.edges[0] == part.percentiles[0]
        assert part.edges[-2] <= part.percentiles[-1] < part.edges[-1]
    assert facts.supervised_share == sum(2 * n + 1 for n in range(1, 101)) / data.report["train_tokens"]


def test_lengths_within_a_decade_have_bars_of_one_width() -> None:
    counts, edges = spread(np.arange(20, 60))
    assert edges == list(range(20, 61, 2)) and counts == [2] * 20
    counts, edges = spread(np.array([20, 20, 50]))
    assert edges == list(range(20, 53, 2)) and (counts[0], counts[-1], sum(counts)) == (2, 1, 3)
    assert spread(np.array([1, 9])) == ([1, *[0] * 7, 1], list(range(1, 11)))


def test_lengths_over_more_have_bars_that_only_grow() -> None:
    counts, edges = spread(np.arange(3, 2001))
    widths = np.diff(edges).tolist()
    assert widths == sorted(widths) and widths[0] == 1 and widths[-1] > 400
    assert counts[:-1] == widths[:-1] and sum(counts) == 1998 and edges[-2] <= 2000 < edges[-1]
    widths = np.diff(spread(np.arange(3, 101))[1]).tolist()
    assert widths == sorted(widths), "a narrower bar would look like a dip"
    assert spread(np.array([0, 5000]))[1][0] == 0 and sum(spread(np.array([0, 5000]))[0]) == 2


def test_rows_of_one_length_have_one_bar(tmp_path: Path) -> None:
    facts = looked(train=write(tmp_path / "a.jsonl", qa(("abc", "def"), ("abd", "deg"))))
    assert [(part.counts, part.edges[1] - part.edges[0]) for part in facts.lengths] == [([2], 1)] * 3


def test_where_all_is_taught_there_is_no_prompt(tmp_path: Path) -> None:
    rows = [{"quote": f"春 {i}", "author": "me"} for i in range(3)]
    facts = looked(train=write(tmp_path / "a.jsonl", rows), text="{quote}: {author}", supervise="all")
    assert [part.what for part in facts.lengths] == ["row"]
    assert check(facts, "rows whose end is not taught").count == 0
    assert facts.end_tokens == ["</s>"]


def test_a_line_break_behind_the_last_end_token_is_no_mistake(tmp_path: Path) -> None:
    facts = looked(train=write(tmp_path / "a.jsonl", qa(("a", "b"), ("c", "d"))), supervise="all")
    assert "".join(p.text for p in facts.rows[0].pieces).endswith("<|im_end|>\n")
    assert facts.rows[0].pieces[-1].supervised
    assert check(facts, "rows whose end is not taught").count == 0


def test_copies_and_prompts_with_several_answers(tmp_path: Path) -> None:
    pairs = [("a", "1"), ("b", "1"), ("a", "1"), ("b", "2"), ("c", "1"), ("a", "1")]
    facts = looked(train=write(tmp_path / "a.jsonl", qa(*pairs)))
    assert check(facts, "exact copies") == Check(
        "exact copies", 2, 6, ["a.jsonl:3 = a.jsonl:1", "a.jsonl:6 = a.jsonl:1"]
    )
    several = check(facts, "rows whose prompt has another answer")
    assert (several.count, several.named) == (2, ["a.jsonl:2 / a.jsonl:4"])


def test_near_copies_are_named_once_and_are_no_exact_ones(tmp_path: Path) -> None:
    long = sentence(0, 60)
    pairs = [(sentence(i), sentence(1000 + i)) for i in range(30)]
    rows = qa(*pairs, ("Tell me.", long), ("Tell me.", long), ("Tell me.", long + " fox"))
    near = check(looked(train=write(tmp_path / "a.jsonl", rows)), "near copies")
    assert (near.count, near.of) == (2, 32)
    assert [name.rpartition(" ")[0] for name in near.named] == ["a.jsonl:31 ≈ a.jsonl:33"]
    assert 0.8 <= float(near.named[0].rpartition("(")[2][:-1]) < 1


def test_eval_rows_that_stand_in_training(tmp_path: Path) -> None:
    long = sentence(0, 60)
    pairs = [(sentence(i), sentence(1000 + i)) for i in range(30)]
    train = write(tmp_path / "train.jsonl", qa(*pairs, ("Tell me.", long)))
    held = qa(pairs[4], (pairs[5][0], "another"), ("Tell me.", long + " fox"), ("all", "new"), pairs[4])
    held += qa(("alike", sentence(7, 60)), ("alike", sentence(7, 60) + " fox"))  # to one another, not to training
    facts = looked(train=train, eval=write(tmp_path / "eval.jsonl", held))
    assert check(facts, "eval rows that stand in training") == Check(
        "eval rows that stand in training", 2, 7, ["eval.jsonl:1 = train.jsonl:5", "eval.jsonl:5 = train.jsonl:5"]
    )
    prompts = check(facts, "further eval prompts in training")
    assert (prompts.count, prompts.named) == (2, ["eval.jsonl:2 = train.jsonl:6", "eval.jsonl:3 = train.jsonl:31"])
    near = check(facts, "eval rows nearly in training")
    assert (near.count, near.of) == (1, 5)
    assert near.named[0].startswith("train.jsonl:31 ≈ eval.jsonl:3 (0.")
    assert check(facts, "near copies").count == 0


def test_without_an_eval_part_nothing_is_said_of_it(tmp_path: Path) -> None:
    facts = looked(train=write(tmp_path / "a.jsonl", qa(("a", "b"), ("c", "d"))))
    assert not [check for check in facts.checks if "eval" in check.what]


def test_bad_rows_drops_and_cuts_are_counted_and_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any] | str] = [*qa(*((f"q{i}", "a") for i in range(20)))]
    rows[3] = '{"prompt": "x", '
    rows[5] = {"prompt": "x", "response": ""}
    rows[7] = qa(("x", "y" * 300))[0]
    file = write(tmp_path / "a.jsonl", rows)
    dropped = looked(train=file, bad_rows="skip", max_length=64)
    bad, long = check(dropped, "bad rows"), check(dropped, "rows dropped for length")
    assert (bad.count, bad.of) == (2, 20)
    assert [name.rsplit(":", 1)[0].split(": ")[0] for name in bad.named] == ["a.jsonl:4", "a.jsonl:6"]
    assert (long.count, long.of, [name.split(": ")[0] for name in long.named]) == (1, 20, ["a.jsonl:8"])
    lost = check(dropped, "answer tokens lost")
    assert (lost.count, lost.of) == (301, 301 + 17 * 2)
    cut = looked(train=file, bad_rows="skip", max_length=64, too_long="cut")
    assert check(cut, "rows cut").count == 1
    assert check(cut, "rows dropped for length").count == 0
    assert check(cut, "rows whose end is not taught").count == 0


def test_at_most_four_are_named(tmp_path: Path) -> None:
    facts = looked(train=write(tmp_path / "a.jsonl", qa(*[("a", "b")] * 9)))
    copies = check(facts, "exact copies")
    assert copies.count == 8
    assert copies.named == [*(f"a.jsonl:{n} = a.jsonl:1" for n in (2, 3, 4, 5)), "…"]


# -- rows that the encoder would never make ---------------------------------------------------------------------------


def forged(rows: Sequence[tuple[list[int], int, int]]) -> Examples:
    """Encoded rows by hand: ids, and the one range that is taught."""
    empty = {"status": 0, "apart": 0, "split": False, "lost": 0, "prompt": 1}
    records = [
        {**empty, "file": 0, "line": n, "row": n, "ids": ids, "starts": [start], "stops": [stop]}
        for n, (ids, start, stop) in enumerate(rows, start=1)
    ]
    store, _ = cached("forged", lambda: [pa.RecordBatch.from_pylist(records, schema=SCHEMA)], lambda _: None)
    shape = Format("prompt", Columns(), "by hand")
    chosen = np.array([[0, row] for row in range(len(rows))])
    return Examples([Source("f.jsonl", [Path("f.jsonl")], shape, 1.0, "", store)], chosen)


def test_a_row_whose_end_is_not_taught_is_wrong(tmp_path: Path) -> None:
    data, encoder, section = made(train=write(tmp_path / "a.jsonl", qa(("a", "b"))))
    end, word = 3, 100
    rows = forged([([word, word, end], 1, 3), ([word, word, end], 1, 2), ([word, end, word], 1, 3)])
    facts = look(replace(data, train=rows), encoder, section, 1, 0)
    assert check(facts, "rows whose end") == Check(
        "rows whose end is not taught", 2, 3, ["f.jsonl:2", "f.jsonl:3"], "wrong"
    )


def test_bos_is_there_once(tmp_path: Path) -> None:
    data, encoder, section = made(train=write(tmp_path / "a.jsonl", qa(("a", "b"))))
    bos, end, word = 0, 3, 100
    rows = forged([([bos, word, end], 1, 3), ([bos, bos, word, end], 2, 4), ([word, word, end], 1, 3)])
    facts = look(replace(data, train=rows), encoder, section, 1, 0)
    assert facts.first_token is None  # the tiny tokenizer has no such rule
    assert check(facts, "rows that begin with <s> twice") == Check(
        "rows that begin with <s> twice", 1, 3, ["f.jsonl:2"], "wrong"
    )
    assert check(facts, "rows that do not begin with <s>").count == 0


def test_the_rule_of_bos_is_the_tokenizers(tmp_path: Path, shared: Path) -> None:
    from transformers import AutoTokenizer

    llama = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama2")
    data, encoder, section = made(llama, train=write(tmp_path / "a.jsonl", qa(("a", "b"))), template="llama2")
    facts = look(data, encoder, section, 1, 0)
    assert facts.first_token == "<s>"
    assert check(facts, "rows that do not begin with <s>").count == 0
    rows = forged([([1, 100, 2], 1, 3), ([100, 100, 2], 1, 3)])
    facts = look(replace(data, train=rows), encoder, section, 1, 0)
    assert check(facts, "rows that do not begin with <s>").named == ["f.jsonl:2"]
