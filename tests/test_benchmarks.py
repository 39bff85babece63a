"""`make bench`: the rows that everyone is given, the useful work, the tables; a turn of Luthier and of the script."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny import tiny_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "compare"))  # scripts, also run without Luthier

import bench  # noqa: E402
import cells  # noqa: E402
import contestants  # noqa: E402
import tables  # noqa: E402

ROWS = 4


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A cell of a tiny shape, of rows some of which are too long: its folder, and the facts of its rows."""
    base = tmp_path_factory.mktemp("bench")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(base / "tokenizer")
    rows = [{"instruction": "The quick brown fox " + "jumps " * n, "output": f"over {n}"} for n in (*range(12), 90, 99)]
    (base / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cells.SHAPES, "tiny", cells.Shape(32, 48, 2, 4, 2, words=384))
        patch.setitem(cells.DATA, "toy", cells.Data("toy.jsonl", {}, {"tiny": ROWS}, 96))
        patch.setenv("LUTHIER_CACHE", str(base / "cache"))
        facts = cells.make(cells.Cell("tiny", "toy"), base / "cell", base, base / "tokenizer", ROWS)
    return base / "cell", facts


def test_everyone_is_given_the_same_rows(cell: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = cell
    raw = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = json.loads((folder / "tokens.json").read_text())
    tokenizer = tiny_tokenizer()
    assert len(raw) == len(rows) == facts["rows"] == ROWS
    for text, row in zip(raw, rows, strict=True):
        taught = [label for label in row["labels"] if label != cells.IGNORE]
        written = tokenizer.decode(row["input_ids"])
        assert f"<|im_start|>user\n{text['instruction']}<|im_end|>\n<|im_start|>assistant\n{text['output']}" in written
        assert tokenizer.decode(taught) == text["output"] + "<|im_end|>"
        assert len(row["input_ids"]) == len(row["labels"]) <= 96
    begins = {tuple(row["input_ids"][: facts["common_prefix"]]) for row in rows}
    assert len(begins) == 1 and facts["common_prefix"] > 5


def test_useful_work_by_hand() -> None:
    shape = cells.Shape(hidden=4, ffn=6, layers=2, heads=2, kv_heads=1, words=10)
    assert shape.decoder == 2 * (16 + 8 + 8 + 16 + 24 + 24 + 24)  # q, k, v, o, gate, up, down
    assert shape.head == 40
    # 4 · 240 · 3 + 4 · 40 · 1 + 6 · 2 · 4 · 9, and the same of 5 tokens, 2 of them taught
    assert cells.useful_work(shape, [(3, 1), (5, 2)]) == (2880 + 160 + 432) + (4800 + 320 + 1200)
    # both begin with the same two tokens, computed once: less 4 · 240 · 2 + 6 · 2 · 4 · 4
    assert cells.shared_work(shape, [(3, 1), (5, 2)], spared=2, prefix=2) == 9792 - 1920 - 192


@pytest.mark.parametrize(("rows", "length"), [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 4]], 1), ([[1], [2]], 0)])
def test_the_common_beginning_leaves_every_row_a_token(rows: list[list[int]], length: int) -> None:
    assert cells.common_prefix(rows) == length


def test_the_ladder_adds_one_rung_at_a_time() -> None:
    off = [[o for o in line.job["overrides"] if o.startswith("engine.")] for line in contestants.ladder(full=True)]
    assert off[0] == [f"engine.{rung}=false" for rung in contestants.RUNGS]
    count = len(contestants.RUNGS)
    for before, after in zip(off[:count], off[1 : count + 1], strict=True):
        assert before[1:] == after
    assert off[count] == off[count + 1] == [] and off[count + 2] == ["engine.compile=true"]


def test_in_a_short_run_the_fastest_of_each_group_take_turns() -> None:
    everyone = contestants.contestants(full=False, slow=True)
    here = bench.usual(everyone, cells.USUAL[1])
    assert bench.usual(everyone, cells.USUAL[0]) == everyone
    assert [one.name for one in here if one.rung] == ["Luthier + prefetch"]
    turns: dict[str, list[dict[str, Any]]] = {one.name: [] for one in everyone}
    turns |= {"TRL padded": [{"seconds": [9.0]}], "TRL packed": [{"seconds": [8.0]}, {"failed": "status 1"}]}
    turns |= {"Unsloth": [{"seconds": [1.0, 5.0]}], "LLaMA-Factory": [{"failed": "status 1"}]}
    assert bench.fastest(everyone, turns) == {"TRL packed", "Unsloth", "Luthier + prefetch"}


def test_tables_have_medians_ratios_and_who_is_missing(tmp_path: Path) -> None:
    result = fake()
    headings, rows = tables.table(result)
    named = {row[0]: dict(zip(headings, row, strict=True)) for row in rows}
    script, plain, ours = named["script"], named["Luthier, off"], named["Luthier + sharing"]
    assert script["s a step"] == "8.00 (6.00–9.00)" and script["Luthier is"] == "4.0 ×"  # the first step is left out
    assert ours["s a step"] == "2.00 (2.00–2.00)" and plain["Luthier is"] == "2.0 ×"
    assert script["peak memory"] == "4.00 GiB" and script["prepared"] == "1,500 rows/s"
    work = cells.useful_work(cells.SHAPES["100m"], [(100, 20)] * 4)
    assert script["utilisation"] == f"{work / 8 / result['gemm'][1]:.0%}"
    shared = cells.shared_work(cells.SHAPES["100m"], [(100, 20)] * 4, spared=150, prefix=50)
    assert ours["utilisation"] == f"{shared / 2 / result['gemm'][1]:.0%}" != f"{work / 2 / result['gemm'][1]:.0%}"
    assert ours["effective rate"] == f"{work / 2 / 1e9:.0f} GFLOP/s"
    assert ours["loss, gradient, next loss"] == "11.9415, 0.447, 11.9398"
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write_page(page, tables.markdown([result]))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| script | 8.00 (6.00–9.00) | 4.0 × |" in text
    assert "- script: 4.0 × as long a step; Luthier's peak is 0.25 × its" in text
    assert "- unsloth: skipped, no network" in text and "- TRL: 1 of 1 turns failed, status 1: Boom" in text


def fake() -> dict[str, Any]:
    """A result of three turns: the script takes 8 s, Luthier 4 s, and 2 s where it shares."""

    def turns(seconds: list[list[float]], peak: int, computed: int) -> list[dict[str, Any]]:
        first = {"losses": [11.94147, 11.93977], "norms": [0.447, 0.44], "computed": computed}
        return [
            first | {"seconds": one, "peak_mib": peak, "above_imports_mib": peak // 2, "weights": ["bfloat16"]}
            for one in seconds
        ]

    def one(name: str, group: str, rung: str | None = None) -> dict[str, Any]:
        return {"name": name, "group": group, "excluded": 1, "rung": rung}

    return {
        "cell": {"shape": "100m", "data": "huanhuan"},
        "title": "100 M, huanhuan",
        "machine": {"cpu": "A processor", "threads": 2, "date": "2026-11-22"},
        "rows": 4,
        "lengths": [[100, 20]] * 4,
        "common_prefix": 50,
        "contestants": [
            one("script", "tutorial script"),
            one("TRL", "TRL"),
            one("Luthier, off", "Luthier", "plain"),
            one("Luthier + sharing", "Luthier", "shared_prefixes"),
        ],
        "skipped": {"unsloth": "no network"},
        "gemm": [1e11, 2e11, 3e11],
        "turns": {
            "script": turns([[30.0, 6.0], [30.0, 8.0], [30.0, 9.0]], 4096, 400),
            "TRL": [{"failed": "status 1: Boom"}],
            "Luthier, off": turns([[9.0, 4.0, 4.0]], 2048, 500),  # padded: more than the rows have
            "Luthier + sharing": turns([[9.0, 2.0, 2.0]], 1024, 250),
        },
        "preparation": {"tutorial script": 1500.0},
    }


def test_a_failed_turn_is_a_line_and_no_more(tmp_path: Path) -> None:
    broken = contestants.Contestant("nobody", "nobody", "with_nothing")
    found = contestants.turn(broken, tmp_path, rows=4, threads=1, timeout=60)
    assert list(found) == ["failed"] and found["failed"].startswith("status 2: ")


def test_a_turn_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_sleep.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(contestants, "HERE", tmp_path)
    slow = contestants.Contestant("slow", "nobody", "with_sleep")
    assert contestants.turn(slow, tmp_path, 4, 1, timeout=0.5) == {"failed": "longer than 0.5 s"}


def test_where_time_is_short_the_slowest_take_fewer_turns() -> None:
    taken = {"slow": 60.0, "quick": 5.0, "middle": 20.0}
    assert bench.affordable(taken, repetitions=2, left=200.0) == {"slow", "quick", "middle"}
    assert bench.affordable(taken, repetitions=2, left=100.0) == {"quick", "middle"}
    assert bench.affordable(taken, repetitions=1, left=-1.0) == set()


@pytest.mark.full
def test_luthier_and_the_script_take_the_same_steps(cell: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = cell
    ladder = contestants.ladder(full=False)
    script = contestants.Contestant("script", "tutorial script", "with_trainer", steps=2)
    found = [contestants.turn(one, folder, ROWS, 1, 120) for one in (script, ladder[0], ladder[-1])]
    for turned in found:
        assert "failed" not in turned, turned
        assert len(turned["seconds"]) >= 1 and turned["peak_mib"] > turned["above_imports_mib"] > 0
        np.testing.assert_allclose(turned["losses"][0], found[0]["losses"][0], rtol=1e-3)
        np.testing.assert_allclose(turned["norms"][0], found[0]["norms"][0], rtol=2e-2)
    np.testing.assert_allclose(found[2]["losses"][1], found[0]["losses"][1], rtol=1e-3)  # after an update
    assert found[2]["computed"] < sum(tokens for tokens, _ in facts["lengths"]) <= found[1]["computed"]
