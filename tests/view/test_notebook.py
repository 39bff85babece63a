"""What a notebook's cell shows of a run, of a comparison and of data, from folders that were written by hand."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.folder import RunFolder
from luthier.history import place, read_history
from luthier.replies import Comparison, Pair, Question, Reply
from luthier.view import charts, notebook
from luthier.view.notebook import fragment, run_html

ASSETS = Path(luthier.__file__).parent / "assets"
EVIL = "<script>alert(1)</script></style> \x1b[31m 春"


class Read(HTMLParser):
    """A piece as a reader has it: its text, the rows of its tables, its facts, what is marked, its style."""

    def __init__(self, piece: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.style, self.name = "", "", ""
        self.rows: list[list[str]] = []
        self.facts: dict[str, str] = {}
        self.marked: list[str] = []
        self.elements: set[str] = set()
        self.feed(piece)
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.add(name)
        self.open.append(name)
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open[-1] == "style":
            self.style += data
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open[-1] == "mark":
            self.marked.append(data)
        if self.open[-1] == "dt":
            self.name = data
        if self.open[-1] == "dd":
            self.facts[self.name] = data


def lines(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")


def step(number: int, **given: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    keys = ["loss", "eval_loss", "lr", "grad_norm", "tokens", "supervised", "rows", "passes"]
    trained = (
        {"loss": 4.0 / number, "lr": 1e-3 / number, "grad_norm": 0.5, "tokens": 1000, "supervised": 250}
        if number
        else {}
    )
    line = {"step": number, "epoch": number / 10, "time": 1000.0 + number, "memory_gib": 1.5}
    return (
        line
        | dict.fromkeys([*keys, "tokens_per_second", "gpu"])
        | trained
        | ({"tokens_per_second": 2000.0} if number else {})
        | given
    )


def sample(number: int, prompt: Any, reply: str, stopped: bool = True) -> dict[str, Any]:
    return {"step": number, "prompt": prompt, "reply": reply, "stopped": stopped}


def begin(path: Path, **given: Any) -> RunFolder:
    """A run that is done after ten steps, unless its status is told otherwise."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "recipe.yaml").write_text("")
    lines(path / "metrics.jsonl", [step(0, eval_loss=5.0), *map(step, range(1, 10)), step(10, eval_loss=0.25)])
    status = {"state": "done", "phase": "ended", "step": 10, "steps": 10, "steps_per_epoch": 10, "time": 1020.0}
    status |= {"progress": 1020.0, "hung": False, "usual": 0.5, "seconds": 10.0, "left": 0.0, "pid": 1, "born": 0.0}
    status |= {"place": place(), "memory_gib": 1.5, "gpu": None, "message": "best of step 10 by eval loss"}
    (path / "status.json").write_text(json.dumps(status | given))
    return RunFolder(path)


# -- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_that_is_done(tmp_path: Path) -> None:
    folder = begin(tmp_path / "镇")
    said = [sample(0, "Where?", "In Bonn."), sample(0, "在哪里？", "不知道。")]
    said += [sample(10, "Where?", "In Lindau."), sample(10, "在哪里？", "在柳谷。", stopped=False)]
    lines(folder.samples, said)
    read = Read(run_html(read_history(folder)))
    assert read.text.startswith("镇donestep 10 of 10kept: best of step 10 by eval loss")
    assert read.facts["loss"] == "0.4000"
    assert read.facts["eval loss"] == "0.2500 falling"
    assert read.facts["best eval"] == "0.2500 at step 10"
    assert read.facts["epoch"] == "1.00 of 1"
    assert read.facts["supervised"] == "25.0 % of the tokens"
    assert "left" not in read.facts
    assert read.rows == [
        ["prompt", "before training", "step 10"],
        ["Where?", "In Bonn.", "In Lindau."],
        ["在哪里？", "不知道。", "在柳谷。 …"],
    ]
    assert read.marked == ["Lindau", "在柳谷"]
    assert "svg" in read.elements and "learning rate by step" in read.text and "what was said" not in read.text


def test_a_run_that_runs_shows_the_last_lines_and_all_of_them(tmp_path: Path) -> None:
    import psutil

    me = psutil.Process()
    gpu = {"name": "NVIDIA A10", "index": 0, "memory_gib": 14.5, "memory_total_gib": 23.7, "utilisation": 100}
    gpu |= {"temperature": 79, "temperature_limit": 90, "normal": True, "power_w": 312.0, "energy_wh": None}
    alive = {
        "state": "running",
        "phase": "evaluating",
        "step": 17,
        "steps": 20,
        "pid": me.pid,
        "born": me.create_time(),
    }
    folder = begin(tmp_path / "town", **alive, left=30.0, message="", gpu=[gpu])
    read = Read(run_html(read_history(folder, now=1022.0), ["one", "two", "three", "four"]))
    assert read.text.startswith("townevaluatingstep 17 of 20about 28 s left")
    assert read.facts["GPU 0"] == "14.5 of 23.7 GiB · 100 % · 79 °C normal · 312 W · NVIDIA A10"
    assert "two\nthree\nfour" in read.text and "what was saidone\ntwo\nthree\nfour" in read.text
    assert "more curves" not in read.text
    assert Read(run_html(read_history(begin(tmp_path / "b", **alive, hung=True), now=1140.0))).text.startswith("bhung")


@pytest.mark.parametrize("state", ["stopped", "failed", "dead"])
def test_what_goes_on_with_a_run_that_broke_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "runs" / "town", state="running" if state == "dead" else state, born=1.0, message="")
    run = luthier.Run(RunFolder(tmp_path / "runs" / "town"), None)  # type: ignore[arg-type]
    assert repr(run) == f"<run runs/town: {state}, step 10 of 10>"
    html = run._repr_html_()
    assert html is not None
    assert Read(html).text.startswith(f'town{state}step 10 of 10go on with: luthier.train("runs/town", resume=True)')


def test_a_run_without_a_step(tmp_path: Path) -> None:
    folder = begin(tmp_path / "town")
    folder.status.unlink()
    folder.metrics.unlink()
    read = Read(run_html(read_history(folder)))
    assert read.text.startswith("towndead") and "svg" not in read.elements


def test_data_becomes_no_markup(tmp_path: Path) -> None:
    folder = begin(tmp_path / "a<b>", state="failed", message=EVIL)
    lines(folder.samples, [sample(10, [{"role": "user", "content": EVIL}], EVIL)])
    read = Read(run_html(read_history(folder), [EVIL]))
    assert "script" not in read.elements
    shown = "<script>alert(1)</script></style> ␛[31m 春"
    assert read.text.count(shown) == 4 and read.rows[1] == [shown, shown]


# -- a comparison ----------------------------------------------------------------------------------------------------


def pair(text: str, base: str, tuned: str, reference: str | None = None) -> Pair:
    answers = [Reply(said, [1, 2], True) for said in (base, tuned)]
    return Pair(Question(f"held.jsonl:{text}", text, [1], reference), *answers)


def test_a_comparison() -> None:
    held = [pair(str(n), "none", "In Lindau." if n else "none", "In Lindau.") for n in range(15)]
    comparison = Comparison([pair(EVIL, "In Bonn.", "In Lindau."), *held], 3.5)
    assert repr(comparison) == "<base and tuned on 1 prompts and 15 held-out rows, 0 → 14 exactly>"
    read = Read(comparison._repr_html_())
    assert read.text.startswith("0 % → 93.3 %of 15 held-out rows answered exactly")
    assert read.rows[1][1:] == ["In Bonn.", "In Lindau."] and "script" not in read.elements
    assert read.marked[0] == "Lindau"
    assert len([row for row in read.rows if row[0] != "prompt"]) == 1 + 10
    assert "… and 5 more held-out rows in compare.html" in read.text


# -- data ------------------------------------------------------------------------------------------------------------


def test_look_in_a_plain_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    shutil.copytree(ASSETS / "quickstart", tmp_path, dirs_exist_ok=True)
    shutil.copytree(ASSETS / "tiny", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    looked = luthier.look("recipe.yaml", rows=1)
    assert repr(looked) == "<480 rows to train on, 120 held out; page: recipe-look.html>"
    assert looked.page.is_file() and looked.facts.report["train_rows"] == 480
    printed = capsys.readouterr().out
    assert "⟦" in printed and printed.endswith("page: recipe-look.html\nnext: luthier train recipe.yaml\n")
    read = Read(looked._repr_html_())
    assert read.text.startswith("480rows to train on") and "<|im_start|>" in read.text
    assert "what was said" not in read.text


# -- style -----------------------------------------------------------------------------------------------------------


def test_a_piece_styles_itself_alone() -> None:
    style = Read(fragment(style=".x { color: red }")).style
    depths = []
    for character in style:
        depths.append((depths[-1] if depths else 0) + {"{": 1, "}": -1}.get(character, 0))
    assert style.startswith(".luthier.luthier {") and depths[-1] == 0
    assert 0 not in depths[len(".luthier.luthier {") : -1], "a rule stands outside of .luthier"
    assert re.findall(r"(?<![-.\w])(?::root|body)\b", style) == []


def test_a_piece_needs_nothing_from_outside(tmp_path: Path) -> None:
    folder = begin(tmp_path / "town")
    piece = run_html(read_history(folder))
    assert re.findall(r"(?:src|href)=|url\(|@import|<script|https?:", piece) == []


def test_dark_colours_stand_only_where_it_is_dark() -> None:
    style = Read(fragment(style=charts.STYLE)).style
    light, *dark = re.split(r"@media \(prefers-color-scheme: dark\)|\[data-jp-theme-light=\"false\"\] &", style)
    assert len(dark) == 2
    assert "--paper: #fff" in light and "--c0: #0b6bb0" in light and "color-scheme: light;" in light
    for part in dark:
        assert "--paper: #16181d" in part and "--c0: #62b1f3" in part and "color-scheme: dark" in part
    assert "#16181d" not in light
    assert dark[0].startswith(' { &:not([data-jp-theme-light="true"] *')  # a light notebook on a dark screen


# -- without a notebook ----------------------------------------------------------------------------------------------


def test_without_a_notebook_nothing_is_different(tmp_path: Path) -> None:
    assert notebook.shell() is None and not notebook.is_shown(tmp_path)
    with notebook.shown(print, None) as told:
        assert told == (print, None)


def test_a_run_is_opened_and_shown_without_torch(tmp_path: Path) -> None:
    begin(tmp_path / "town")
    shutil.copyfile(ASSETS / "quickstart" / "recipe.yaml", tmp_path / "town" / "recipe.yaml")
    code = (
        "import sys, luthier; luthier.train, luthier.look\n"
        "run = luthier.open_run('town'); run._repr_html_(), repr(run)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'datasets', 'pandas', 'IPython'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
