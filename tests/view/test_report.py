"""The report of a run, from a folder that was written by hand: every part, every state, and what is not there."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from luthier.folder import RunFolder
from luthier.history import place, read_history
from luthier.recipe import load_recipe, save_recipe
from luthier.replies import Comparison, Pair, Question, Reply
from luthier.view.report import about, report_html, write_report

EVIL = "<script>alert(1)</script> \x1b[31m 春"
BEGAN = 1_795_291_000.0


@dataclass
class Read(HTMLParser):
    """The page as a reader has it: its text by section, the rows of its tables, its figures."""

    page: str
    sections: dict[str, str] = field(default_factory=dict)
    rows: list[list[str]] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)
    marked: list[str] = field(default_factory=list)
    elements: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.value = self.here = ""
        self.feed(self.page)
        self.sections[""] = self.sections[""].strip()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.add(name)
        if name not in ("meta", "br"):
            self.open.append(name)
        if name == "h2":
            self.here = ""
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")
        if name == "mark":
            self.marked.append("")

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.here += data
        elif not {"style", "title"} & set(self.open):
            self.sections[self.here] = self.sections.get(self.here, "") + data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if "mark" in self.open:
            self.marked[-1] += data
        if self.open[-1:] == ["dd"]:
            self.value = data
        if self.open[-1:] == ["dt"]:
            self.figures.setdefault(data, self.value)


def lines(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")


def step(number: int, **given: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    trained = {"loss": 4.0 / number, "lr": 1e-3 / number, "grad_norm": 0.5 + number} if number else {}
    trained |= {"tokens": 1000, "supervised": 250} if number else {}
    keys = (
        "loss",
        "eval_loss",
        "lr",
        "grad_norm",
        "tokens",
        "supervised",
        "rows",
        "passes",
        "tokens_per_second",
        "gpu",
    )
    line = {"step": number, "epoch": number / 10, "time": BEGAN + number, "memory_gib": 1.5}
    return line | dict.fromkeys(keys) | trained | ({"tokens_per_second": 2000.0} if number else {}) | given


def status(**given: Any) -> dict[str, Any]:
    ended = {"state": "done", "phase": "ended", "step": 10, "steps": 10, "steps_per_epoch": 10, "time": BEGAN + 20}
    ended |= {"progress": BEGAN + 20, "hung": False, "usual": 0.5, "seconds": 10.0, "left": 0.0, "pid": 1, "born": 0.0}
    return ended | {"place": place(), "memory_gib": 1.5, "gpu": None, "message": "best of step 10 by eval loss"} | given


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that is done, with nothing beside what every run has."""
    path = tmp_path / "town"
    (path / "checkpoints" / "step-000010").mkdir(parents=True)
    given = path / "given.yaml"
    given.write_text(
        "model: {name: hf:a/b}\ndata: {train: hf:c/d, max_length: 64}\nmethod: {r: 4, target: [q_proj, v_proj]}\n"
        "train: {steps: 10, lr: 0.01}\ngenerate: {prompts: ['Who are you?', '你是谁？']}\n"
    )
    save_recipe(load_recipe(given), path / "recipe.yaml")
    given.unlink()
    metrics = [step(0, eval_loss=5.0), *(step(n) for n in range(1, 10)), step(10, eval_loss=0.25)]
    lines(path / "metrics.jsonl", metrics)
    (path / "status.json").write_text(json.dumps(status()))
    return RunFolder(path)


def put(folder: RunFolder, **parts: Any) -> Read:
    """The report once these JSON files are in the folder."""
    for name, value in parts.items():
        (folder.path / f"{name}.json").write_text(json.dumps(value))
    return Read(report_html(folder))


def test_the_head_and_the_curves(folder: RunFolder) -> None:
    read = put(folder, environment={"python": "3.11", "model": {"parameters": 2000, "trainable": 50}})
    assert read.sections[""].startswith("towndonebegun ")
    assert " · step 10 of 10" in read.sections[""]
    assert "a/b · LoRA of rank 4, alpha 16, on q_proj, v_proj" in read.sections[""]
    assert "Kept: best of step 10 by eval loss" in read.sections[""]
    assert read.figures["eval loss, first → best (step 10)"] == "5.0000 → 0.2500"
    assert read.figures["tokens trained on, 25 % of them taught"] == "10,000"
    assert read.figures["of 2,000 parameters trained"] == "2.5 %"
    assert read.figures["training time"] == "10.0 s"
    titles = re.findall(r"<figcaption><span><b>(.*?)</b>", read.page)
    assert titles == ["loss", "loss", "learning rate", "gradient norm"]  # what stays as it is has no chart
    assert re.findall(r'<figure class="(.*?)">', read.page) == ["chart wide", "chart", "chart", "chart"]
    assert "<title>10\ntraining loss 0.4\neval loss 0.25</title>" in read.page
    assert "held-out loss" not in read.page
    assert list(read.sections) == ["", "Curves", "What next", "Recipe", "Time and memory", "Environment"]


def test_an_even_number_of_charts_leaves_no_gap(folder: RunFolder) -> None:
    lines(folder.metrics, [step(n, memory_gib=1.0 + n) for n in range(11)])
    assert re.findall(r'<figure class="(.*?)">', put(folder).page) == ["chart"] * 4


def test_two_steps_make_no_curve(folder: RunFolder) -> None:
    lines(folder.metrics, [step(0, eval_loss=5.0), step(1), step(2)])
    assert "Curves" not in put(folder).sections
    lines(folder.metrics, [step(0, eval_loss=5.0), step(1), step(2), step(3)])
    assert "Curves" in put(folder).sections


def test_what_can_be_done_next(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.path.parent)
    commands = [row[0] for row in put(folder).rows if row[0].startswith("luthier")]
    assert commands == [
        "luthier compare town",
        "luthier chat town",
        'luthier generate town --prompt "…"',
        "luthier merge town -o DIR",
        "luthier train town/recipe.yaml KEY=VALUE",
    ]
    compared = Comparison([Pair(Question("prompt 1", "p", [1]), reply("a"), reply("b"))], 1.0)
    assert "luthier compare town" not in [row[0] for row in put(folder, compare=compared.as_json()).rows]
    assert "What next" not in put(folder, status=status(state="stopped")).sections


def test_about_a_run(folder: RunFolder) -> None:
    said = about(folder)
    assert said.startswith(
        "hf:a/b · LoRA of rank 4, alpha 16, on q_proj, v_proj · kept: best of step 10 by eval loss · "
    )
    assert f"{datetime.now().astimezone():%B %Y}" in said
    put(folder, status=status(message="last"))
    assert " · kept: the last, of step 10 · " in about(folder)
    put(folder, status=status(state="failed", message="the disk is full"))
    assert "kept" not in about(folder) and "disk" not in about(folder)


def test_the_runs_other_pages_are_linked(folder: RunFolder) -> None:
    assert "Beside this page" not in put(folder).page
    (folder.path / "strength.html").write_text("")
    page = put(folder).page
    assert '<p>Beside this page: <a href="strength.html">the adapter at several strengths</a></p>' in page
    (folder.path / "compare.html").write_text("")
    links = '<a href="compare.html">every answer of base and tuned</a> · <a href="strength.html">the adapter at'
    assert links in put(folder).page


def test_what_the_recipe_says_otherwise_than_the_defaults(folder: RunFolder) -> None:
    read = put(folder)
    assert read.rows[read.rows.index(["key", "this run", "default"]) + 1 :] == [
        ["model.name", "hf:a/b", "has none"],
        ["data.train", "hf:c/d", "has none"],
        ["data.max_length", "64", "2048"],
        ["method.r", "4", "8"],
        ["method.target", "q_proj\nv_proj", "auto"],
        ["train.steps", "10", "null"],
        ["train.lr", "0.01", "auto"],
        ["generate.prompts", "Who are you?\n你是谁？", "[]"],
    ]
    assert folder.recipe.read_text("utf-8") in read.sections["Recipe"]


def told(read: Read) -> dict[str, str]:
    """The small facts by their names."""
    return dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", read.page))


def test_time(folder: RunFolder) -> None:
    said = put(folder, status=status(seconds=12.5)).sections["Time and memory"]
    assert "training time in all12.5 s" in said
    assert "a step, median0.5 s" in said
    assert "steps alone5.0 s (40 %)" in said
    assert "evaluations, samples, checkpoints7.5 s" in said
    assert "tokens a second, in the steps2,000" in said and said.count("tokens a second") == 1
    assert said.count("peak memory") == 1 and "peak memory1.5 GiB" in said
    assert "energy" not in said


@pytest.mark.parametrize(
    ("whole", "pace", "expected"),
    [
        (1.767, 1e4 / 0.14, ("1.77 s", "0.14 s (8 %)", "1.63 s")),
        (12.447, 1e4 / 11.26, ("12.4 s", "11.3 s (90 %)", "1.1 s")),
        (100.4, 1e4 / 50.4, ("1 min 40 s", "50 s (50 %)", "50 s")),
        (7384.0, 1e4 / 6970.0, ("2 h 03 min", "1 h 56 min (94 %)", "7 min")),
        (3.0, 1e4 / 5.0, ("5.00 s", "5.00 s (100 %)", "0.00 s")),  # killed: its status lags behind its steps
    ],
)
def test_the_parts_of_the_time_add_up(folder: RunFolder, whole: float, pace: float, expected: tuple[str, ...]) -> None:
    lines(folder.metrics, [step(0), *(step(n, tokens_per_second=pace) for n in range(1, 11))])
    read = put(folder, status=status(seconds=whole))
    named = ("training time in all", "steps alone", "evaluations, samples, checkpoints")
    facts = told(read)
    assert tuple(facts[name] for name in named) == expected
    assert read.figures["training time"] == expected[0]


def test_the_speed_is_the_one_of_every_screen(folder: RunFolder) -> None:
    lines(folder.metrics, [step(n, tokens_per_second=1000.0 * n) for n in range(1, 11)])
    speed = read_history(folder).speed
    assert told(put(folder))["tokens a second, in the steps"] == f"{speed:,.0f}" == "3,414"


def test_energy_and_gpus(folder: RunFolder) -> None:
    def gpu(index: int, number: int) -> dict[str, Any]:
        known = {"name": "NVIDIA X", "index": index, "memory_gib": 14.5, "memory_total_gib": 23.7, "utilisation": 99}
        asked = {"temperature": 60 + number, "temperature_limit": 90, "normal": True, "power_w": None}
        return known | asked | {"energy_wh": 0.5 * number if index == 0 else 1.0}

    lines(folder.metrics, [step(n, gpu=[gpu(0, n), gpu(1, n)]) for n in range(11)])
    read = put(folder, environment={"device": "cuda:0"})
    assert read.figures["energy of the GPUs"] == "6 Wh"
    assert "energy a token trained on2.16 J" in read.sections["Time, memory and energy"]
    assert "GPU memory, GiB14.5" in read.sections["Time, memory and energy"]
    assert "GPU 1NVIDIA X, 23.7 GiB" in read.sections["Environment"].replace("\n", "")
    titles = re.findall(r"<figcaption><span><b>(GPU .*?)</b>", read.page)
    assert titles == ["GPU temperature, °C"]  # memory and utilisation stayed as they were
    assert "<title>10\nGPU 0 70\nGPU 1 70</title>" in read.page


def test_samples_over_time(folder: RunFolder) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": EVIL}]
    said = {0: "我是模型。", 5: "我是甄嬛。", 8: "我是甄嬛。", 10: ""}
    given = [{"step": n, "prompt": talk, "reply": text, "stopped": n != 5} for n, text in said.items()]
    other = {"step": 10, "prompt": EVIL, "stopped": True}
    lines(folder.samples, [*given, {**other, "reply": "told before it was killed"}, {**other, "reply": "told"}])
    read = put(folder)
    assert read.rows[:4] == [
        ["before", "我是模型。"],
        ["5 – 8", "我是甄嬛。did not stop"],
        ["10", "(nothing)"],
        ["10", "told"],
    ]
    assert read.marked == ["甄嬛"]
    assert "system: Be brief.\nuser: <script>alert(1)</script> ␛[31m 春" in read.sections["Samples on the way"]
    assert "script" not in read.elements


def test_of_many_evaluations_a_few_are_shown(folder: RunFolder) -> None:
    lines(folder.samples, [{"step": n, "prompt": "p", "reply": f"reply {n}", "stopped": True} for n in range(100)])
    read = put(folder)
    rows = [row for row in read.rows if row[1].startswith("reply ")]
    assert [row[0] for row in rows] == ["before", "11", "22", "33", "44", "55", "66", "77", "88", "99"]
    assert "10 of 100 evaluations" in read.sections["Samples on the way"]


def reply(text: str) -> Reply:
    return Reply(text, [7] * 4, True)


def test_base_against_tuned(folder: RunFolder) -> None:
    asked = Pair(Question("prompt 1", EVIL, [1]), reply("in the old town"), reply("in the new town"))
    held = [Pair(Question(f"e:{n}", f"q{n}", [1], "yes"), reply("no"), reply("yes")) for n in range(12)]
    lost = Pair(Question("e:99", "last", [1], "yes"), reply("yes"), reply("no"))
    comparison = Comparison([asked, *held, lost], 12.5)
    read = put(folder, compare=comparison.as_json())
    assert read.figures["of 13 held-out rows answered exactly"] == "7.69 % → 92.3 %"
    assert read.figures["rows right before, wrong now"] == "1"
    assert read.figures["largest difference of a logit"] == "12.5"
    assert "0 would mean that the tuning does nothing" in read.sections["Base against tuned"]
    rows = [row for row in read.rows if row[1] in ("✗ no", "✓ yes", "in the old town")]
    assert rows[0] == [EVIL.replace("\x1b", "␛"), "in the old town", "in the new town"]
    assert rows[1] == ["last= yese:99", "✓ yes", "✗ no"]
    assert len(rows) == 14
    assert read.marked[:2] == ["new", "no"]
    assert "3 more held-out rows" in read.sections["Base against tuned"]
    assert Comparison.from_json(json.loads(json.dumps(comparison.as_json()))) == comparison


DATA = {
    "sources": [
        {"path": "/far/away/train.jsonl", "part": "train", "sha256": "ab" * 32, "rows": 9, "weight": 2.0}
        | {"format": "alpaca", "columns": {}, "how": "alpaca: prompt = instruction"}
    ],
    "template": "auto",
    "end_ids": [2],
    "today": "2026-11-21",
    "train_rows": 6,
    "eval_rows": 1,
    "longest": 50,
    "train_tokens": 200,
    "supervised_tokens": 50,
    "bad": 1,
    "dropped_for_length": 2,
    "cut": 0,
    "answer_tokens_lost": 0,
    "one_example_a_turn": 0,
    "borders_encoded_apart": 0,
}


def test_data(folder: RunFolder) -> None:
    rejected = [
        ("no answer \u2028 here", EVIL),
        ("12 tokens too long (76 in all)", ""),
        ("1 tokens too long (65 in all)", ""),
    ]
    lines(
        folder.rejected,
        [{"file": "train.jsonl", "line": n, "reason": r, "row": row} for n, (r, row) in enumerate(rejected)],
    )
    read = put(folder, data=DATA | {"lengths": {"counts": [4, 2], "edges": [10, 25, 51]}})
    assert read.figures["rows to train on"] == "6"
    assert read.figures["tokens, 25 % of them taught"] == "200"
    assert "<title>10 – 24: 4</title>" in read.page
    assert ["train.jsonl", "train", "9", "2", "alpaca: prompt = instruction", "abababababab…"] in read.rows
    assert ["1", "rows that could not be used, left out"] in read.rows
    assert ["2", "rows too long, dropped"] in read.rows
    assert ["… tokens too long (… in all)", "2", "train.jsonl:1"] in read.rows
    assert ["no answer \u2028 here", "1", "train.jsonl:0\n<script>alert(1)</script> ␛[31m 春"] in read.rows
    assert "script" not in read.elements


def test_data_without_drops_and_lengths(folder: RunFolder) -> None:
    read = put(folder, data=DATA | {"bad": 0, "dropped_for_length": 0})
    assert "Every row was used, whole." in read.sections["Data"]
    assert "histogram" not in re.sub(r"<style>.*?</style>", "", read.page, flags=re.S)


PROOF = {
    "path": "engine",
    "tried": {"engine": {"loss": 2e-7, "difference": 1.9e-6, "of": "layers.0.q_proj"}},
    "rows": ["t:1", "t:2"],
    "gradients": 56,
    "without_gradient": [],
    "format": "fp32",
    "dropout": True,
    "tolerance": {"loss": 1e-4, "gradients": 1e-4},
    "seconds": 0.25,
}


def test_proof(folder: RunFolder) -> None:
    read = put(folder, proof=PROOF)
    assert (
        "The run took Luthier's engine. Before step 1 the loss and 56 gradients of 2 of its own rows (t:1, t:2)"
        in (read.sections["Proof of the engine"])
    )
    assert "the loss and 1 gradient of 2 of its own rows" in put(folder, proof=PROOF | {"gradients": 1}).page
    assert "in fp32, dropout on; it took 0.2 s" in read.sections["Proof of the engine"]
    assert ["engine", "1.9e-06", "1e-04", "layers.0.q_proj"] in read.rows
    tried = {"engine": {"loss": 0.5, "difference": 0.5, "of": "x"}, "own_logits": {"reason": "cannot be packed"}}
    read = put(folder, proof=PROOF | {"path": "plain", "tried": tried, "gradients": 0})
    assert "took the plain path" in read.sections["Proof of the engine"]
    assert "Before step 1 the loss of 2" in read.sections["Proof of the engine"]
    assert ["own logits", "cannot be packed", "", ""] in read.rows


def test_merges(folder: RunFolder) -> None:
    figures = {"positions": 1004, "max_logit_difference": 1.3e-5, "mean_kl": 3.9e-14, "top1_agreement": 1.0}
    merge = {"out": EVIL, "time": BEGAN, "dtype": "fp32", "verified": True, "figures": figures}
    held = {"trained": {"quantize": "nf4"}, "figures": figures | {"max_logit_difference": None}, "reason": None}
    unproven = {"out": "b", "time": BEGAN, "dtype": "bf16", "verified": None, "figures": None, "quantised": held}
    unproven |= {"strength": 0.75}
    read = put(folder, merges=[merge, unproven])
    rows = read.rows[-4:] if read.rows[-4][0] == "folder" else read.rows[-3:]
    assert rows[-3][0] == EVIL.replace("\x1b", "␛")
    assert rows[-3][2:] == ["fp32", "✓ verified", "1.3e-05", "3.9e-14", "100 %", "1,004"]
    assert rows[-2][2:] == ["bf16, at strength 0.75", "not verified", "–", "–", "–", "–"]
    assert rows[-1][3:] == [
        "beside the nf4 model that was trained (told, not judged)",
        "–",
        "3.9e-14",
        "100 %",
        "1,004",
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"state": "failed", "message": f"the disk is full {EVIL}"},
            "the disk is full <script>alert(1)</script> ␛[31m 春newest checkpoint: step 10; go on with: luthier train",
        ),
        ({"state": "stopped", "message": "stopped at step 10"}, "stopped at step 10newest checkpoint: step 10; go on"),
        (
            {"state": "running", "pid": 2**22 + 1},
            "Its process is gone, and could not say why.newest checkpoint: step 10",
        ),
    ],
    ids=["failed", "stopped", "dead"],
)
def test_what_is_said_of_a_run_that_is_not_done(folder: RunFolder, given: dict[str, Any], expected: str) -> None:
    read = put(folder, status=status(**given))
    assert expected in read.sections[""]
    assert "Kept:" not in read.sections[""]
    assert "script" not in read.elements


def test_a_failed_run_without_a_checkpoint_is_begun_anew(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.path.parent)
    (folder.checkpoints / "step-000010").rmdir()
    said = put(folder, status=status(state="failed", message="out of memory")).sections[""]
    assert "luthier train town/recipe.yaml KEY=VALUE" in said and "--resume" not in said
    assert "luthier train town --resume" in put(folder, status=status(state="stopped")).sections[""]


def test_a_run_that_runs(folder: RunFolder) -> None:
    import psutil

    now = time.time()
    alive = {"state": "running", "phase": "evaluating", "pid": psutil.Process().pid, "time": now, "progress": now - 95}
    alive |= {"born": psutil.Process().create_time(), "left": 600.0, "hung": True}
    read = put(folder, status=status(**alive))
    assert re.search(r"It runs \(evaluating, about (10 min 00 s|9 min 5\d s) left\)", read.sections[""])
    assert "There has been no sign of progress for 1 min 35 s." in read.sections[""]


def test_a_run_that_has_hardly_begun(folder: RunFolder) -> None:
    for path in (folder.metrics, folder.status):
        path.unlink()
    read = put(folder)
    assert read.sections[""].startswith("towndead")
    assert list(read.sections) == ["", "Recipe"]


def test_nothing_comes_from_outside(folder: RunFolder) -> None:
    path = write_report(folder)
    assert path == folder.path / "report.html"
    text = path.read_text("utf-8")
    assert not re.search(r"https?:|src=|href=|url\(|@import|<link|<script", text)
    assert "prefers-color-scheme: dark" in text
    assert " id=" not in text  # two reports on one page, as in a notebook, do not get in each other's way
    assert [file.name for file in folder.path.glob(".report*")] == []


def test_a_long_run_is_a_small_page_and_quick(folder: RunFolder) -> None:
    draw = random.Random(0)
    lines(folder.metrics, [step(n, loss=draw.random(), grad_norm=draw.random()) for n in range(1, 100_001)])
    began = time.process_time()
    page = report_html(folder)
    assert time.process_time() - began < 15
    assert len(page.encode()) < 1_000_000
    assert "<title>100,000\ntraining loss" in page


def test_it_needs_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'pandas', 'pyarrow', 'numpy'}"
    code = f"import sys\nimport luthier.view.report\nprint(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
