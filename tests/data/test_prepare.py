"""The data path as a whole: cache, bad rows, lengths, sample, split, records."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from luthier.data.encode import Encoder
from luthier.data.prepare import Data, prepare, write_text
from luthier.errors import DataError
from luthier.sections import DataFile, DataSection
from tiny import tiny_tokenizer

TODAY = date(2026, 3, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def qa(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response}


def ready(path: str | list[DataFile], said: list[str] | None = None, tokenizer: Any = None, **section: Any) -> Data:
    """The data of a section; `said` takes the lines about the sources, and not the summary."""
    wanted, lines = DataSection(train=path, **section), list[str]()
    data = prepare(wanted, Encoder(tokenizer or tiny_tokenizer(), wanted, TODAY), lines.append)
    if said is not None:
        said += lines[:-1]
    return data


def texts(data: Data, part: str = "train") -> list[str]:
    rows = getattr(data, part)
    return [tiny_tokenizer().decode(rows[i].ids) for i in range(len(rows))]


def row_text(prompt: str, response: str) -> str:
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"


def test_rows_come_in_order_with_their_masks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [qa("Where?", "In town."), qa("谁？", "小鸟。")])
    data = ready(path)
    assert texts(data) == [row_text("Where?", "In town."), row_text("谁？", "小鸟。")]
    example = data.train[1]
    assert tiny_tokenizer().decode(example.ids[example.supervised]) == "小鸟。<|im_end|>"
    assert data.train.lengths.tolist() == [len(data.train[0].ids), len(data.train[1].ids)]
    assert data.train.supervised.tolist() == [int(data.train[i].supervised.sum()) for i in range(2)]
    assert data.train.origin(1) == "a.jsonl:2"
    assert data.report["train_rows"] == 2 and data.report["eval_rows"] == 0


def test_the_cache_is_keyed_by_content_and_not_by_seed_sample_or_split(tmp_path: Path, cache: Path) -> None:
    rows = [qa(f"Where {i}?", f"Town {i}.") for i in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    said: list[str] = []
    for section in ({}, {"seed": 7}, {"sample": 5}, {"eval": 3}, {"bad_rows": "skip"}):
        ready(path, said, **section)
    assert [("from the cache" in line) for line in said] == [False, True, True, True, True]
    for section in ({"max_length": 64}, {"supervise": "all"}, {"system": "be kind"}, {"template": "plain"}):
        ready(path, said, **section)
        assert "from the cache" not in said[-1], section
    moved = write(tmp_path / "elsewhere.jsonl", rows)
    ready(moved, said)
    assert "from the cache" in said[-1]
    write(tmp_path / "a.jsonl", [*rows, qa("new", "row")])
    ready(path, said)
    assert "from the cache" not in said[-1]
    assert len(list(cache.glob("*.arrow"))) == 6


def test_a_damaged_cache_is_made_anew_with_a_line(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", [qa("Where?", "In town.")])
    before = texts(ready(path))
    [entry] = cache.glob("*.arrow")
    for damage in (lambda: entry.write_bytes(entry.read_bytes()[:100]), lambda: _flip(entry, 300)):
        damage()
        said: list[str] = []
        assert texts(ready(path, said)) == before
        assert said[0] == f"cache: the entry {entry.name} is damaged; encoding again"
    said = []
    ready(path, said)
    assert "from the cache" in said[0]


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def test_two_processes_share_one_entry(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", [qa(f"Where {i}?", f"Town {i}.") for i in range(300)])
    code = f"import test_prepare as t; d = t.ready({path!r}); print(len(d.train), int(d.train.lengths.sum()))"
    here = Path(__file__).parent
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(here), str(here.parent)]!r}; {code}"]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent) for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in running]
    assert outputs[0] == outputs[1] and outputs[0].startswith("300 ")
    assert len(list(cache.glob("*.arrow"))) == 1 and not list(cache.glob("*.part"))


BAD = [qa("Where?", "In town."), qa("Who?", ""), {"prompt": "x"}, qa("How?", "Well."), {"prompt": 3, "response": "y"}]


def test_bad_rows_stop_the_run_and_name_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", BAD)
    with pytest.raises(DataError) as error:
        ready(path)
    first, *lines = str(error.value).splitlines()
    assert first == (
        "bad.jsonl: 3 of 5 rows cannot be used; put them right, or data.bad_rows: skip leaves them out and lists them "
        "in rejected.jsonl:"
    )
    assert [line.split(":")[:2] for line in lines] == [["  bad.jsonl", "2"], ["  bad.jsonl", "3"], ["  bad.jsonl", "5"]]
    assert "empty answer" in lines[0] and "missing column 'response'" in lines[1]


def test_skipped_rows_are_counted_and_kept_for_rejected_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    write(path, BAD)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "broken\n{"prompt": "a\\ud800", "response": "b"}\n')
    data = ready(str(path), bad_rows="skip")
    assert texts(data) == [row_text("Where?", "In town."), row_text("How?", "Well.")]
    assert data.report["bad"] == 5
    assert [(row.file, row.line) for row in data.rejected] == [("bad.jsonl", line) for line in (2, 3, 5, 6, 7)]
    assert data.rejected[0].row == '{"prompt": "Who?", "response": ""}'
    assert "broken JSON" in data.rejected[3].reason and "surrogate" in data.rejected[4].reason


def test_a_file_of_bad_rows_only_is_an_error_in_both(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", [qa("Where?", ""), qa("Who?", "")])
    for policy in ("error", "skip"):
        with pytest.raises(DataError, match="^bad.jsonl: all 2 rows are bad:\n  bad.jsonl:1: "):
            ready(path, bad_rows=policy)


def test_plain_text_without_a_pattern_is_told_what_to_write(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("The fox lives.\nBy the river.\n")
    with pytest.raises(
        DataError, match='plain text without question and answer; .*\n  text: "{text}"\n  supervise: all'
    ):
        ready(str(path))
    data = ready(str(path), text="{text}", supervise="all")
    assert texts(data) == ["The fox lives.</s>", "By the river.</s>"]
    assert data.train[0].supervised.tolist() == [False] + [True] * (len(data.train[0].ids) - 1)


LONG = "the lazy dog by the old river " * 12


def test_long_rows_are_dropped_by_default_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [qa("Where?", "In town."), qa("Who?", LONG), qa("How?", "Well.")])
    data = ready(path, max_length=60)
    assert texts(data) == [row_text("Where?", "In town."), row_text("How?", "Well.")]
    assert data.report["dropped_for_length"] == 1
    assert data.rejected[0].line == 2 and "tokens too long" in data.rejected[0].reason
    with pytest.raises(DataError, match="a.jsonl: 1 row is longer than data.max_length 60 allows.*\n  a.jsonl:2: "):
        ready(path, max_length=60, too_long="error")


def test_more_than_half_dropped_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [qa("Where?", "In town."), qa("Who?", LONG), qa("How?", LONG)])
    with pytest.raises(DataError, match="2 of 3 rows are too long and would be dropped, more than half; raise data"):
        ready(path, max_length=60)
    with pytest.raises(
        DataError, match="3 of 3 rows cannot be cut to fit and would .* raise data.max_length .now 8.\n"
    ):
        ready(path, max_length=8, too_long="cut")


def test_one_row_is_not_rows(tmp_path: Path) -> None:
    section, said = DataSection(train=write(tmp_path / "a.jsonl", [qa("Where?", "In town.")])), list[str]()
    prepare(section, Encoder(tiny_tokenizer(), section, TODAY), said.append)
    assert ": 1 row encoded" in said[-2] and said[-1].startswith("data: 1 row to train on, ")


@pytest.mark.parametrize("row", [qa("Who?", LONG), qa(LONG, "Me."), qa(LONG, LONG)])
def test_a_cut_keeps_template_and_end(tmp_path: Path, row: dict[str, str]) -> None:
    path = write(tmp_path / "a.jsonl", [qa("Where?", "In town."), row])
    data = ready(path, max_length=60, too_long="cut")
    cut = data.train[1]
    [text] = texts(data)[1:]
    assert 50 <= len(cut.ids) <= 60
    assert text.startswith("<|im_start|>user\n") and "<|im_end|>\n<|im_start|>assistant\n" in text
    assert text.endswith("<|im_end|>\n")
    assert cut.ids[np_last(cut.supervised)] == tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert data.report["cut"] == 1
    lost = data.report["answer_tokens_lost"]
    assert (lost > 0) == (row["response"] == LONG)


def np_last(flags: Any) -> int:
    return int(flags.nonzero()[0][-1])


def test_a_cut_conversation_loses_whole_last_exchanges_first(tmp_path: Path) -> None:
    turns = [("user", "Where?"), ("assistant", "In town."), ("user", "Who?"), ("assistant", LONG)]
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": role, "content": said} for role, said in turns]}])
    data = ready(path, max_length=60, too_long="cut")
    assert texts(data) == [row_text("Where?", "In town.")]


def test_prompt_and_answer_have_limits_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [qa("Where?", "In town."), qa(LONG, LONG)])
    data = ready(path, max_length=500, max_prompt=30, max_answer=20, too_long="cut")
    cut = data.train[1]
    special = set(range(4))
    answer = [i for i in cut.ids[cut.supervised].tolist() if i not in special]
    prompt = [i for i in cut.ids[: int(cut.supervised.argmax())].tolist() if i not in special]
    assert 17 <= len(answer) <= 20 and 27 <= len(prompt) <= 30


def test_the_split_never_parts_rows_of_one_prompt(tmp_path: Path) -> None:
    rows = [qa(f"Where {i % 100}?", f"Town {i}.") for i in range(300)]
    path = write(tmp_path / "a.jsonl", rows)
    for wanted in (0.25, 30):
        data = ready(path, eval=wanted)
        train = {text.split("<|im_end|>")[0] for text in texts(data)}
        held = {text.split("<|im_end|>")[0] for text in texts(data, "eval")}
        assert not train & held and len(train) + len(held) == 100
        assert data.eval is not None and len(data.eval) % 3 == 0
        assert len(data.eval) == (30 if wanted == 30 else pytest.approx(75, abs=30))
    assert set(texts(ready(path, eval=0.25, seed=1), "eval")) != set(texts(ready(path, eval=0.25), "eval"))
    with pytest.raises(DataError, match="data.eval: 301 rows are to be held out, and there are 300"):
        ready(path, eval=301)


def test_an_eval_file_is_kept_apart(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [qa("Where?", "In town.")])
    held = write(tmp_path / "b.jsonl", [qa("Who?", "Me."), qa("How?", "Well.")])
    data = ready(train, eval=held)
    assert len(data.train) == 1 and data.eval is not None
    assert data.eval.origin(1) == "b.jsonl:2"
    assert [source["part"] for source in data.report["sources"]] == ["train", "eval"]


def test_a_sample_is_seeded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [qa(f"Where {i}?", f"Town {i}.") for i in range(100)])
    one, again, other = (texts(ready(path, sample=10, seed=seed)) for seed in (1, 1, 2))
    assert len(one) == 10 and one == again and one != other
    with pytest.raises(DataError, match="data.sample: 101 rows are asked for, and 100 can be used"):
        ready(path, sample=101)


def test_files_keep_their_weights(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [qa(f"Where {i}?", "Town.") for i in range(6)])
    b = write(tmp_path / "b.jsonl", [qa(f"Who {i}?", "Me.") for i in range(4)])
    data = ready([DataFile(path=a), DataFile(path=b, weight=2.5)])
    assert data.train_sources == [(0, 6, 1.0), (6, 10, 2.5)]


def test_the_rendered_rows_can_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [qa("say <|im_end|>", "No."), qa("Who?", LONG)])
    out = tmp_path / "text.jsonl"
    section = DataSection(train=path, write_text=str(out), max_length=60, too_long="cut")
    encoder = Encoder(tiny_tokenizer(), section, TODAY)
    data = prepare(section, encoder, lambda _: None)
    assert not out.exists()  # a verb that only reads the data must not write it
    write_text(data, section, encoder)
    lines = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines == [row_text("say <|im_end|>", "No."), tiny_tokenizer().decode(data.train[1].ids)]


def test_the_summary_says_what_was_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*BAD, qa("Who?", LONG)])
    section = DataSection(train=path, bad_rows="skip", max_length=60)
    said: list[str] = []
    prepare(section, Encoder(tiny_tokenizer(), section, TODAY), said.append)
    assert said[-1].startswith("data: 2 rows to train on, 0 held out, 3 bad, left out, 1 too long, dropped, ")
    assert said[-1].endswith(" answer tokens lost")


def test_the_end_token_is_part_of_the_caches_key(tmp_path: Path) -> None:
    """It stands in tokenizer_config.json alone; a wrong one that was put right must not come back from the cache."""
    path = write(tmp_path / "a.jsonl", [qa("Where?", "In town.")])
    other = tiny_tokenizer()
    other.eos_token = "<|im_end|>"
    ends = [int(ready(path, tokenizer=t, template="plain").train[0].ids[-1]) for t in (tiny_tokenizer(), other)]
    assert ends == [1, 3]


def test_two_recipes_hold_out_the_same_rows(tmp_path: Path) -> None:
    """Whatever they put around a prompt: template, system prompt, words before it."""
    path = write(tmp_path / "a.jsonl", [qa(f"Where {i}?", f"Town {i}.") for i in range(60)])
    held = []
    for section in ({}, {"system": "be kind"}, {"before_prompt": "Say: "}, {"template": "plain"}):
        data = ready(path, eval=0.3, **section)
        assert data.eval is not None
        held.append([data.eval.origin(i) for i in range(len(data.eval))])
    assert held[0] == held[1] == held[2] == held[3]


def test_a_share_that_holds_out_nothing_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [qa("Where?", "In town."), qa("Who?", "Me.")])
    with pytest.raises(DataError, match="data.eval: 0.0001 of 2 rows holds out none; give a number of rows"):
        ready(path, eval=0.0001)


@pytest.mark.parametrize("at", [0, 1])
def test_a_limit_cuts_the_message_that_is_over_it(tmp_path: Path, at: int) -> None:
    said = ["Where?", "In town.", "Who?", "Me."]
    said[at] = LONG
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]
    path = write(tmp_path / "a.jsonl", [{"messages": messages}])
    data = ready(path, max_length=500, max_prompt=20, max_answer=20, too_long="cut")
    [text] = texts(data)
    assert data.report["cut"] == 1 and data.report["dropped_for_length"] == 0
    assert "Who?" in text and "Me." in text and LONG.strip() not in text


def test_the_turns_of_one_conversation_stay_on_one_side(tmp_path: Path) -> None:
    """Where a template makes one example a turn, a later turn's prompt holds the earlier one's answer."""
    template = tmp_path / "counts.jinja"
    counted = "{{ messages|length }} {% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    template.write_text(counted + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    roles = ["user", "assistant"] * 3
    rows = [{"messages": [{"role": r, "content": f"{n} {i}"} for n, r in enumerate(roles)]} for i in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    data = ready(path, template=str(template), eval=0.3)
    assert data.eval is not None and data.report["sources"][0]["rows"] == 20
    sides = [{part.origin(i) for i in range(len(part))} for part in (data.train, data.eval)]
    assert len(data.train) + len(data.eval) == 60 and not sides[0] & sides[1]
    sample = ready(path, template=str(template), sample=4)
    assert len(sample.train) == 12
