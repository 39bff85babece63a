"""The panel: what it says of a run at any width, and how it stands on a real terminal."""

from __future__ import annotations

import codecs
import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.cells import cell_len, chop_cells
from rich.console import Console

from luthier.folder import RunFolder
from luthier.history import place, read_history
from luthier.view.panel import is_live, panel, watch
from luthier.view.panelparts import curve

GPU = {"name": "NVIDIA A10", "index": 0, "memory_gib": 14.5, "memory_total_gib": 23.7, "utilisation": 100}
GPU |= {"temperature": 79, "temperature_limit": 90, "normal": True, "power_w": 312.0, "energy_wh": 12.3}
KEYS = "step epoch time loss eval_loss lr grad_norm tokens supervised rows passes tokens_per_second memory_gib gpu"
SAMPLES = [
    ("Where will Inga meet Zeno?", "In Windgate, and Zeno brings walnut cake.", True),
    ([{"role": "user", "content": "佩拉和托本在哪里见面？"}], "在灰水镇，托本带大麦粥。", True),
    ("A story, [red]please[/red]", "Once\n\x1b[31mupon a time " * 40, False),
]


def line(step: int, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, of a step where it has a loss."""
    facts = {"step": step, "epoch": step / 100, "time": 0.0, "memory_gib": 16.2}
    if "loss" in values:
        facts |= {"lr": 9.6e-5, "grad_norm": 1.234, "tokens": 1000, "supervised": 284, "rows": 16, "passes": 2}
        facts["tokens_per_second"] = 12340.0
    return dict.fromkeys(KEYS.split()) | facts | values


def alive() -> dict[str, Any]:
    me = psutil.Process()
    return {"pid": me.pid, "born": me.create_time(), "place": place()}


def begin(path: Path, lines: list[dict[str, Any]] | None = None, samples: Any = SAMPLES, **status: Any) -> RunFolder:
    """A run's folder: of S1's figures, unless they are changed."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "checkpoints").mkdir(exist_ok=True)
    (path / "recipe.yaml").write_text("train: {log_every: 10}\n")
    if lines is None:
        lines = [line(0, eval_loss=5.9), *(line(k, loss=4.09 + 20 / k) for k in range(1, 40))]
        lines += [line(40, loss=4.0912, eval_loss=4.5), line(80, loss=4.0912, eval_loss=4.4321)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    rows = [{"step": k, "prompt": p, "reply": r, "stopped": s} for k in (0, 80) for p, r, s in samples]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    now = time.time()
    told = {"state": "running", "phase": "training", "step": 120, "steps": 3108, "steps_per_epoch": 1036}
    told |= {"time": now, "progress": now, "hung": False, "usual": 4.1, "seconds": 7500.0, "left": 52220.0}
    told |= alive() | {"memory_gib": 14.5, "gpu": [GPU], "message": ""}
    (path / "status.json").write_text(json.dumps(told | status))
    return RunFolder(path)


def shown(folder: RunFolder, width: int = 80, height: int | None = None, now: float | None = None) -> str:
    """The panel as a terminal of that width gets it; every line of it is as wide as the terminal."""
    console = Console(width=width, height=99, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(panel(read_history(folder, now), width, height))
    text = capture.get()
    assert {cell_len(row) for row in text.splitlines()} == {width}
    return text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize(
    "name", ["town", "城镇事实-2", "a" * 90, "镇" * 80], ids=["english", "chinese", "long", "long chinese"]
)
def test_every_line_is_as_wide_as_the_terminal(tmp_path, width, name):
    rows = shown(begin(tmp_path / name, gpu=[GPU, GPU | {"index": 1, "normal": False}]), width).splitlines()
    assert rows[0].startswith(f"╭─ {name[:20]}") and rows[0].endswith(" training ─╮")
    assert all(row.startswith("│ ") and row.endswith(" │") for row in rows[1:-1])
    assert rows[-1] == "╰" + "─" * (width - 2) + "╯"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_what_it_says(tmp_path, width):
    """S1's table: the card's memory, load and judged temperature, total steps, steps done, time left, loss."""
    text = shown(begin(tmp_path / "town"), width)
    for fact in (
        r"step 120 of 3,108 ",
        r" 4 % ",
        r"loss +4\.0912 ",
        r"eval loss +4\.4321 falling ",
        r"best eval +4\.4321 at step 80 ",
        r"learning rate +9\.60e-05 ",
        r"GPU 0 +14\.5 of 23\.7 GiB +100 % +79 °C normal ",
        r"epoch +0\.12 of 3 ",
        r"elapsed +2 h 05 min ",
        r"left +14 h 30 min ",
        r"gradient norm +1\.23 ",
        r"speed +12,340 tokens/s, 4\.1 s a step ",
        r"supervised +28\.4 % of the tokens ",
        r"memory +14\.5 GiB, 16\.2 at most ",
        r"samples +Where will Inga",
        r"at step 80 +佩拉和托本",
        r"→ 在灰水镇",
    ):
        assert re.search(fact, text), fact
    assert bool(re.search("312 W +12.3 Wh", text)) == (width >= 60)
    assert ("NVIDIA A10" in text) == (width > 80)
    assert len(text.splitlines()) == {60: 22, 80: 22, 120: 19, 200: 17}[width]  # 24 rows and one card: all is there


def test_numbers_and_hot_cards(tmp_path):
    hot = {"index": 1, "temperature": 88, "normal": False, "energy_wh": 1230.0, "utilisation": 7}
    hot |= {"power_w": 45.4, "memory_gib": 0.99}
    blind = {"index": 2} | dict.fromkeys(("memory_gib", "utilisation", "temperature", "normal", "power_w", "energy_wh"))
    folder = begin(tmp_path / "town", step=3108, steps=12000, gpu=[GPU, GPU | hot, GPU | blind])
    rows = shown(folder, 120).splitlines()
    assert "step 3,108 of 12,000" in rows[1] and " 26 % │" in rows[1]
    assert [row[2:].split("NVIDIA")[0].rstrip() for row in rows if row.startswith("│ GPU")] == [
        "GPU 0          14.5 of 23.7 GiB  100 %  79 °C normal          312 W  12.3 Wh",
        "GPU 1           1.0 of 23.7 GiB    7 %  88 °C hot (limit 90)   45 W  1.2 kWh",
        "GPU 2          –                 –      –                     –      –",
    ]


def test_states(tmp_path):
    now = time.time()
    hung = shown(begin(tmp_path / "a", step=112, hung=True, progress=now - 42), now=now)
    assert hung.splitlines()[0].endswith(" hung ─╮")
    assert "│ step 113 shows no progress for 42 s; usual 4.1 s  " in hung
    late = {"phase": "evaluating", "hung": True, "progress": now - 90, "usual": 0.25}
    assert "evaluating after step 120 shows no progress for 1 min 30 s; usual 0.25 s" in shown(
        begin(tmp_path / "b", **late), now=now
    )
    dead = shown(begin(tmp_path / "c", pid=2**22 - 3, time=now - 720), 120, now=now)
    assert " dead ─╮" in dead and "its process ended without a word, 12 min 00 s ago; no checkpoint yet; go on" in dead
    failed = shown(begin(tmp_path / "d", state="failed", phase="ended", message="disk full " * 20))
    assert " failed ─╮" in failed and failed.count("disk") == failed.count("full") == 20
    stopped = shown(begin(tmp_path / "e", state="stopped", phase="ended", message="adapter/ holds step 80"))
    assert " stopped ─╮" in stopped and "│ kept: adapter/ holds step 80 " in stopped
    done = shown(begin(tmp_path / "f", state="done", phase="ended", step=3108, message="完" * 60))
    assert " done ─╮" in done and "100 % │" in done and done.count("完") == 60
    for phase, words in {"saving": "saving a checkpoint", "sampling": "sampling", "preflight": "preflight"}.items():
        assert f" {words} ─╮" in shown(begin(tmp_path / phase, phase=phase))


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "empty").mkdir()
    rows = shown(RunFolder(tmp_path / "empty")).splitlines()
    assert rows[0].endswith(" no step yet ─╮") and len(rows) == 3
    begun = shown(begin(tmp_path / "town", [], [], step=0, usual=None, left=None, phase="preflight", gpu=None))
    assert "step 0 of 3,108" in begun and re.search(r"loss +– ", begun) and re.search(r"left +– ", begun)
    assert not re.search("GPU|samples", begun)
    first = shown(begin(tmp_path / "town", [line(1, loss=3.0)], [], step=1))
    assert re.search(r"loss +3\.0000 ", first) and re.search(r"eval loss +– ", first)


def test_data_cannot_steer_the_terminal(tmp_path):
    bad = [("\x1b]0;title\x07[bold]\ud800", "\x1b[2J\u202e\r\nback", True)]
    text = shown(begin(tmp_path / "town", samples=bad), 120)
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    assert "␛]0;title␇[bold]? → ␛[2J\\u202e␍ back" in text


def test_of_many_replies_all_are_seen_in_turn(tmp_path):
    samples = [(f"Who is {k}?", f"Nobody {k}.", True) for k in range(5)]
    folder, seen = begin(tmp_path / "town", samples=samples), set[str]()
    for turn in range(5):
        found = re.findall(r"Nobody \d", shown(folder, now=time.time() + 8 * turn))
        assert len(found) == 3
        seen |= set(found)
    assert len(seen) == 5
    ended = begin(tmp_path / "town", samples=samples, state="done")
    assert all(
        re.findall(r"Nobody (\d)", shown(ended, now=time.time() + k)) == ["0", "1", "2"] for k in range(0, 40, 8)
    )


def test_in_a_low_terminal_the_last_lines_go(tmp_path):
    folder = begin(tmp_path / "town")
    for height in (14, 18, 30):
        rows = shown(folder, height=height).splitlines()
        assert len(rows) == min(height, 22)
        assert rows[-1].startswith("╰") and "step 120" in rows[1] and any("GPU 0" in row for row in rows)


def test_the_curve():
    assert curve([4.0, 2.0], 4, 2) == (3.0, 4.0, ["⠑⢄  ", "  ⠑⢄"])  # smoothed: the last is a mean of both
    assert curve([2.0, 2.0, 2.0], 3, 2) == (2.0, 2.0, ["   ", "⣀⣀⣀"])
    low, high, rows = curve([5 * math.exp(-k / 5000) for k in range(20_000)], 150, 4)
    assert high == pytest.approx(5.0, rel=0.02) and low == pytest.approx(5 * math.exp(-4), rel=0.1)
    assert {len(row) for row in rows} == {150} and rows[0][0] != " " and rows[3][-1] != " "


@pytest.mark.parametrize(
    ("losses", "edges"),
    [([5.891, 0.0076], ("5.89", "0.0076")), ([12345.6, 100.0], ("12,346", "100")), ([2.0, 1.6], ("2.00", "1.60"))],
)
def test_the_curve_s_range_stands_beside_it(tmp_path, losses, edges):
    lines = [line(k + 1, loss=loss) for k, loss in enumerate([losses[0]] + [losses[1]] * 40)]
    rows = shown(begin(tmp_path / "town", lines, []), 60).splitlines()[3:7]
    assert [re.findall(r"(\S+) ┤", row) for row in rows] == [[edges[0]], [], [], [edges[1]]]
    assert "…" not in "".join(rows)


# A real terminal


class Terminal:
    """As much of a terminal as the panel asks for: rows of text, a cursor, and lines that break anew when resized."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.rows, self.y, self.x, self.cursor = width, [""] * height, 0, 0, True
        self.master, self.slave = pty.openpty()
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.resize(width)

    def resize(self, width: int) -> None:
        broken = [chop_cells(row, width) or [""] for row in self.rows]
        self.y = sum(map(len, broken[: self.y]))
        self.rows, self.width = [part for parts in broken for part in parts], width
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))

    def feed(self, text: str) -> None:
        for code, char in re.findall(r"(\x1b\[[?\d;]*[a-zA-Z])|(.)", text, re.S):
            count = int(code[2:-1]) if code[2:-1].isdigit() else 1
            if code in ("\x1b[?25l", "\x1b[?25h"):
                self.cursor = code.endswith("h")
            elif code.endswith("K"):
                self.rows[self.y] = ""
            elif code.endswith(("A", "B")):
                self.y = max(0, self.y - count) if code.endswith("A") else self.y + count
            elif char == "\r":
                self.x = 0
            elif char == "\n":
                self.down()
            elif char:
                if self.x + cell_len(char) > self.width:
                    self.x = 0
                    self.down()
                self.rows[self.y] = self.rows[self.y][: self.x].ljust(self.x) + char
                self.x += 1
            assert code or char

    def down(self) -> None:
        self.y += 1
        if self.y == len(self.rows):
            self.rows.append("")

    def read(self, until: Any, seconds: float = 20.0) -> list[str]:
        """What is on the screen as soon as it is as wanted."""
        end = time.monotonic() + seconds
        while not until(self.text):
            assert time.monotonic() < end, "\n".join(self.text)
            if select.select([self.master], [], [], 0.05)[0]:
                self.feed(self.decoder.decode(os.read(self.master, 65536)))
        return self.text

    def run(self, folder: RunFolder, **environment: str) -> subprocess.Popen[bytes]:
        variables = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder.path)],
            stdin=subprocess.PIPE,
            stdout=self.slave,
            stderr=self.slave,
            env=variables | {"TERM": "xterm-256color"} | environment,
        )
        return self.process

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.master)
        os.close(self.slave)

    @property
    def text(self) -> list[str]:
        return [row.rstrip() for row in self.rows if row.strip()]


SCRIPT = """
import sys, time
from pathlib import Path
from rich.console import Console
from luthier.view.panel import is_live, live
console, folder = Console(highlight=False), Path(sys.argv[1])
assert is_live(console)
with live(console) as screen:
    screen.say("first")
    screen.watch(folder)
    sys.stdin.readline()
    screen.say("[bold]second " + "word " * 30)
    print("a stray one")
    sys.stdin.readline()
print("last")
"""


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(120, 40)
    yield made
    made.close()


def ended(rows: list[str]) -> bool:
    return rows[-1:] == ["last"] or "Interrupt" in "".join(rows[-1:])


def test_lines_stand_above_and_the_panel_stays_in_its_final_state(tmp_path, terminal):
    folder = begin(tmp_path / "town")
    process = terminal.run(folder)
    terminal.read(lambda rows: rows[-1:] and rows[-1].startswith("╰"))
    assert terminal.cursor  # a process that a signal ends could not give it back
    terminal.resize(80)  # its rows are broken in two, as most terminals do
    rows = terminal.read(lambda rows: any(len(row) == 80 for row in rows) and rows[-1].startswith("╰"))
    assert [row[:7] for row in rows if row[0] in "f╭╰"] == ["first", "╭─ town", "╰──────"]
    terminal.go_on()
    terminal.read(lambda rows: "a stray one" in rows)
    begin(tmp_path / "town", state="done", phase="ended", message="adapter/ holds step 80")
    terminal.go_on()
    rows = terminal.read(ended)
    assert process.wait(10) == 0 and terminal.cursor
    assert rows[0] == "first" and rows[1].startswith("[bold]second word") and rows[2].startswith("  word word")
    assert " ".join(" ".join(rows[1:4]).split()) == "[bold]second " + " ".join(["word"] * 30)
    assert rows[4] == "a stray one" and rows[5].startswith("╭─ town") and rows[5].endswith(" done ─╮")
    assert "adapter/ holds step 80" in rows[7]
    assert rows[-2].startswith("╰") and rows[-1] == "last" and sum("╭" in row for row in rows) == 1


def test_an_interrupt_leaves_the_terminal_as_it_was(tmp_path, terminal):
    folder = begin(tmp_path / "town")
    process = terminal.run(folder, NO_COLOR="1")
    terminal.read(lambda rows: rows[-1:] and rows[-1].startswith("╰"))
    process.send_signal(signal.SIGINT)
    rows = terminal.read(ended)
    assert process.wait(10) != 0 and terminal.cursor
    top = next(number for number, row in enumerate(rows) if row.startswith("╭"))
    assert rows[top - 1] == "first" and rows[top + 18].startswith("╰") and rows[top + 19].startswith("Traceback")


def test_a_panel_that_breaks_leaves_the_lines(tmp_path, terminal):
    folder = begin(tmp_path / "town")
    process = terminal.run(folder)
    terminal.read(lambda rows: rows[-1:] and rows[-1].startswith("╰"))
    (folder.path / "status.json").write_text('{"state": "running"}')  # no heartbeat, no place
    time.sleep(2.5)  # the panel looks at it every two seconds at least
    terminal.go_on()
    rows = terminal.read(lambda rows: rows[-1] == "a stray one")
    terminal.go_on()
    rows = terminal.read(ended)
    assert process.wait(10) == 0
    said = [row[:13] for row in rows if row[0] not in "│╭╰"]
    assert said[0] == "first" and said[1] == "[bold]second " and said[-2:] == ["a stray one", "last"]
    assert "Traceback" not in "".join(rows)


def test_a_panel_is_for_terminals_that_it_fits_on():
    def terminal(**about: Any) -> Console:
        return Console(**{"width": 80, "height": 24, "force_terminal": True, "_environ": {"TERM": "xterm"}} | about)

    assert is_live(terminal()) and is_live(terminal(no_color=True)) and is_live(terminal(width=60, height=16))
    assert not is_live(terminal(width=59)) and not is_live(terminal(height=15))
    assert not is_live(terminal(force_terminal=False)) and not is_live(terminal(_environ={"TERM": "dumb"}))


def test_without_a_terminal_a_run_is_watched_in_plain_lines(tmp_path):
    """As training prints them: from the newest on, every ten steps, with each evaluation; a hung step is told once."""
    folder, end = begin(tmp_path / "town", hung=True), time.monotonic() + 20

    def said(lines: int) -> list[str]:
        while len(found := (tmp_path / "said").read_text("utf-8").splitlines()) < lines:
            assert time.monotonic() < end, found
            time.sleep(0.02)
        return found

    console = Console(width=40, file=(tmp_path / "said").open("w", encoding="utf-8"))
    thread = threading.Thread(target=watch, args=(folder, console), daemon=True)
    thread.start()
    said(3)
    with folder.metrics.open("a") as file:
        file.writelines(json.dumps(line(k, loss=2.0, eval_loss=4.5 if k == 90 else None)) + "\n" for k in range(81, 92))
    said(5)
    begin(tmp_path / "town", state="done", phase="ended")
    thread.join(20)
    console.file.close()
    assert [one.split(" for ")[0] for one in said(5)] == [
        "step    80/3108  epoch 0.08  loss  4.0912  lr 9.6e-05  grad     1.23     12,340 tok/s  left 14 h 30 min",
        "eval    80/3108  epoch 0.08  loss  4.4321  best so far",
        "step 121 shows no progress",
        "step    90/3108  epoch 0.09  loss  2.0000  lr 9.6e-05  grad     1.23     12,340 tok/s  left 14 h 30 min",
        "eval    90/3108  epoch 0.09  loss  4.5000  not below 4.4321 of step 80",
    ]
