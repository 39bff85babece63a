"""A run on the terminal while it runs: its panel under the lines that are said, or plain lines where none can be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from luthier.folder import RunFolder, read_json
from luthier.history import Follower, History
from luthier.html import visible
from luthier.view import panelparts as parts
from luthier.view.panelparts import SOFT
from luthier.words import broken, eval_line, step_line

NARROWEST, LOWEST = 60, 16  # of a terminal that a panel fits into
TICK, SLOWEST = 0.3, 2.0  # seconds from look to look, at least and at most
SHARE = 0.02  # of a core's time, at most: a look at a run of 20,000 steps takes 14 ms


def panel(history: History, width: int, height: int | None = None) -> Text:
    """The run in `width` columns (60 at least) and, if it is given, at most `height` lines: the last ones go first."""
    inner = width - 4
    blocks = [[parts.progress(history, inner), *parts.remarks(history, inner)]]
    if history.status:
        blocks += [
            parts.losses(history, inner),
            parts.gpus(history.status["gpu"] or [], inner),
            parts.columns(parts.facts(history), inner),
            parts.samples(history, inner),
        ]
    lines = _stacked([block for block in blocks if block], None if height is None else height - 2)
    return _framed(history, lines, inner)


def _stacked(blocks: list[list[Text]], room: int | None) -> list[Text]:
    """The blocks with a blank line between two; in too little room without it, and without what comes last."""
    spaced = [line for block in blocks for line in (Text(), *block)][1:]
    if room is None or len(spaced) <= room:
        return spaced
    return [line for block in blocks for line in block][:room]


def _framed(history: History, lines: Sequence[Text], inner: int) -> Text:
    """The lines in a frame that says whose they are, and how the run stands."""
    state, style = parts.standing(history)
    name = parts.cropped(Text(parts.plain(history.folder.name), "bold"), inner - len(state) - 4)
    rule = "─" * (inner - name.cell_len - len(state) - 4)
    whole = Text(no_wrap=True, overflow="crop", end="")
    whole.append("╭─ ", SOFT).append_text(name).append(f" {rule} ", SOFT).append(state, style).append(" ─╮\n", SOFT)
    for line in lines:
        shown = parts.cropped(line, inner)
        shown.pad_right(inner - shown.cell_len)
        whole.append("│ ", SOFT).append_text(shown).append(" │\n", SOFT)
    return whole.append("╰" + "─" * (inner + 2) + "╯", SOFT)


# -- live -----------------------------------------------------------------------------------------------------------


def is_live(console: Console) -> bool:
    """Is there a terminal that a panel can be drawn on again and again?"""
    fits = console.width >= NARROWEST and console.height >= LOWEST
    writes = console.encoding.lower().startswith("utf")
    return console.is_terminal and not console.is_dumb_terminal and writes and fits


class Screen:
    """Lines as they are said and, from `watch` on, the panel of a run under them, drawn by a thread of its own.

    Whatever goes wrong with the panel, the lines are still said: by `plain`, as before there was one.
    """

    def __init__(self, console: Console, plain: Callable[[str], None]) -> None:
        self.console, self.plain = console, plain
        self.lock, self.over = threading.RLock(), threading.Event()
        self.follower: Follower | None = None
        self.live: Live | None = None
        self.thread: threading.Thread | None = None
        self.seen: Any = None
        self.drawn = (0, 0)
        """Columns and lines of the panel as it stands on the screen."""

    def say(self, line: str) -> None:
        """A line above the panel."""
        with self.lock:
            if self.live is not None:
                try:
                    self._climb()
                    text = visible(line.encode("utf-8", "replace").decode("utf-8"))
                    self.console.print(Text(broken(text, self.console.width)), soft_wrap=True)
                    return
                except Exception:
                    self._give_up()
        self.plain(line)

    def watch(self, path: Path) -> None:
        """Show the run in this folder from now on."""
        with self.lock:
            self.follower = Follower(RunFolder(path))
            if self.thread is not None:
                return
            self.live = Live(console=self.console, auto_refresh=False)
            try:
                self.live.start()
                self.console.show_cursor(True)  # which a process that a signal ends could not give back
            except Exception:
                self._give_up()
            else:
                self.thread = threading.Thread(target=self._follow, name="panel", daemon=True)
                self.thread.start()

    def end(self) -> None:
        """Leave the panel as the run stands now. Nothing is drawn from here on."""
        self.over.set()
        try:
            if self.thread is not None:
                self.thread.join()
                self._look(last=True)
        finally:
            self._give_up()

    def _follow(self) -> None:
        while not self.over.is_set():
            began = time.thread_time()
            self._look()
            self.over.wait(min(max(TICK, (time.thread_time() - began) / SHARE), SLOWEST))

    def _look(self, last: bool = False) -> None:
        """Draw what has changed, at most; while the run runs, its clocks go on every second."""
        try:
            follower, size = self.follower, self.console.size
            assert follower is not None
            history = follower.look()
            clock = int(history.now) if history.state == "running" else None
            seen = (follower, len(history.metrics), len(history.samples), history.status, size, clock)
            if seen == self.seen and not last:
                return
            picture = panel(history, size.width, size.height - 2)
            height = picture.plain.count("\n") + 1
            with self.lock:
                if self.live is not None and follower is self.follower and (last or not self.over.is_set()):
                    self._climb()
                    # A terminal echoes ^C and what is typed: on a free line below, where the next drawing wipes it off.
                    self.live.update(picture if last else picture + Text("\n "), refresh=True)
                    self.seen, self.drawn = seen, (size.width, height)
        except Exception:  # it must not disturb what it shows
            self._give_up()

    def _climb(self) -> None:
        """Where the terminal has become narrower, it has broken the panel's lines: wipe away all that they take now."""
        (wide, lines), width = self.drawn, self.console.width
        if wide <= width:
            return
        taken = lines * -(-wide // width)
        up = [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)] * taken
        self.console.control(
            Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), *up, (ControlType.CURSOR_DOWN, lines))
        )
        self.drawn = (width, lines)

    def _give_up(self) -> None:
        """Draw no more, and give the terminal back as it was."""
        with self.lock, suppress(Exception):
            live, self.live = self.live, None
            if live is not None:
                live.stop()


@contextmanager
def live(console: Console, plain: Callable[[str], None] = print) -> Iterator[Screen]:
    """A screen on a terminal that `is_live`. `plain` says a line where there is no panel (yet, or any more)."""
    screen = Screen(console, plain)
    try:
        yield screen
    finally:
        screen.end()


def watch(folder: RunFolder, console: Console) -> History:
    """Show a run until it ends, or until Ctrl-C, which leaves it alone; gives how it stands then.

    Where no panel can be drawn: its newest lines, and each further one as training itself would print it.
    """
    with suppress(KeyboardInterrupt):
        if not is_live(console):
            return _tail(folder, lambda line: console.print(Text(line), soft_wrap=True))
        with live(console) as screen:
            screen.watch(folder.path)
            while History(folder, read_json(folder.status) or {}, [], [], time.time()).state == "running":
                time.sleep(TICK)
    return Follower(folder).look()


def _tail(folder: RunFolder, say: Callable[[str], None]) -> History:
    import yaml

    every = yaml.safe_load(folder.recipe.read_text("utf-8"))["train"]["log_every"]
    follower, known, begun, told = Follower(folder), 0, False, set[int]()
    while True:
        history = follower.look()
        lines = [text for line in history.metrics[known:] for text in told_of(line, history, every)]
        for line in lines if begun else lines[-2:]:
            say(line)
        known, begun = len(history.metrics), True
        if (hung := parts.hang(history)) and history.step not in told:  # once, not every second
            told.add(history.step)
            say(hung)
        if history.state != "running":
            return history
        time.sleep(TICK)


def told_of(line: dict[str, Any], history: History, every: int) -> list[str]:
    """What training prints of a line of metrics.jsonl, where it does so every so many steps."""
    step, steps = line["step"], history.steps or 0
    place = (step, steps, history.status["steps_per_epoch"])
    told = []
    if line["loss"] is not None and (step in (1, steps) or step % every == 0):
        facts = (line["loss"], line["lr"], line["grad_norm"], line["tokens_per_second"])
        told.append(step_line(place, *facts, history.left))
    if line["eval_loss"] is not None:
        remark = "before training" if step == 0 else "best so far"
        best = min(((loss, at) for at, loss in history.eval_losses if 0 < at < step), default=None)
        if best is not None and line["eval_loss"] >= best[0]:
            remark = f"not below {best[0]:.4f} of step {best[1]}"
        told.append(eval_line(place, line["eval_loss"], remark))
    return told
