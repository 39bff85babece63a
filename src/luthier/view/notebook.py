"""In a notebook: what a cell shows of data, of a run and of a comparison, while it trains as well.

What is shown is a piece of HTML with its own style, which touches nothing beside it: light and dark as the notebook is,
without a script and without anything from outside.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from luthier.folder import RunFolder
from luthier.history import Follower, History
from luthier.html import STYLE as PAGE
from luthier.html import Html, figures, join, table, tag
from luthier.replies import Comparison, said
from luthier.view import charts, panelparts
from luthier.view.curves import curves
from luthier.view.panelparts import NOTHING
from luthier.view.sidebyside import HELD_OUT, ON_SCREEN, PROMPTS, flips_first, marked, side_table, summary
from luthier.view.sidebyside import STYLE as SIDES
from luthier.words import duration

if TYPE_CHECKING:
    from luthier.data.inspect import Look

Say = Callable[[str], None]
Watch = Callable[[Path], None]

TICK = 1.0  # seconds from drawing to drawing, at least
SHARE = 0.02  # of a core's time, at most: a drawing of 20,000 steps takes 0.1 s
LAST = 3  # lines that stay in sight while the run runs
LIGHT = '[data-jp-theme-light="true"] *, .vscode-light *, [theme="light"] *'
DARK = '[data-jp-theme-light="false"] &, .vscode-dark &, [theme="dark"] &'
"""JupyterLab, VS Code and Colab say which they are; any other notebook is as the reader's screen is."""
DARK_COLOURS = re.compile(r"@media \(prefers-color-scheme: dark\) \{(.*?\}) \}\n", re.S)
WHOLE_PAGE = re.compile(r"(?<![-.\w])(:root|body)(?= *\{)")
STYLE = """
& { color-scheme: light; max-width: 64rem; margin: .3rem 0; padding: .9rem 1.1rem; border: 1px solid var(--line);
  border-radius: .5rem; font-size: 14px }
table { margin: 0; font-size: inherit; border: 0; table-layout: auto } p, dl { margin: .5rem 0 }
tr, tbody tr:nth-child(n), tbody tr:hover { background: none } figure { margin: 0 }
th, td { max-width: none; vertical-align: top; text-align: left; line-height: 1.5 }
dt, dd { float: none; width: auto; font-weight: inherit; padding: 0 } pre { font: inherit; color: inherit }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right }
h2, h3 { color: inherit; line-height: inherit; font-weight: 600 } h2 { font-size: 1.05rem; margin: 1.3rem 0 .4rem }
.figures { margin: .6rem 0 1rem } .figures dd { font-size: 1.25rem; font-weight: 600; line-height: 1.4 }
.sides { table-layout: fixed }
.top { display: flex; flex-wrap: wrap; gap: .2rem .8rem; align-items: baseline; margin: 0 }
.top b { font-size: 1.1rem }
.state { border: 1px solid; border-radius: 1rem; padding: 0 .65rem; font-size: .85rem; font-weight: 600;
  color: var(--good) }
.state.failed, .state.dead, .state.hung { color: var(--bad) } .state.running, .state.stopped { color: var(--ink) }
progress { width: 100%; height: .5rem; accent-color: var(--good); margin: .5rem 0 0; display: block }
.run { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: .6rem 2rem;
  margin: .9rem 0; align-items: start }
.run dl { margin: 0 }
.run dl div { display: flex; justify-content: space-between; gap: 1rem; padding: .15rem 0;
  border-bottom: 1px solid var(--line) }
.run dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.2rem 2rem;
  margin: .8rem 0 }
.said { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; padding: 0; background: none }
"""


def shell() -> Any | None:
    """The shell of the notebook's kernel that this process is; None where it is none. It imports nothing."""
    ipython = sys.modules.get("IPython")
    found = ipython.get_ipython() if ipython else None
    return found if hasattr(found, "kernel") else None


def train_call(recipe: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> str:
    """As a cell says it: luthier.train("town.yaml", ["train.lr=1e-4"])."""
    arguments = [json.dumps(str(recipe), ensure_ascii=False)]
    arguments += [json.dumps(list(overrides), ensure_ascii=False)] if overrides else []
    return f"luthier.train({', '.join([*arguments, *['resume=True'] * resume])})"


# -- pieces of a page ------------------------------------------------------------------------------------------------


def fragment(*parts: str, style: str = "") -> Html:
    """The parts as one piece that brings its style along: `html.STYLE` and `style`, for itself alone."""
    return tag("div", tag("style", Html(_scoped(PAGE + style + STYLE))), *parts, class_="luthier")


@cache
def _scoped(style: str) -> str:
    """A page's style for what is within .luthier, its dark colours where the notebook is dark.

    Said twice (.luthier.luthier), it comes before a notebook's own rules for tables and lists.
    """
    colours = "".join(DARK_COLOURS.findall(style))
    dark = f"& {{ color-scheme: dark }} {colours}"
    whole = (
        f"{DARK_COLOURS.sub('', style)}@media (prefers-color-scheme: dark) {{ &:not({LIGHT}) {{ {dark} }} }}\n"
        f"{DARK} {{ {dark} }}\n"
    )
    return f".luthier.luthier {{ {WHOLE_PAGE.sub('&', whole)} }}"


@dataclass(frozen=True)
class Looked:
    """What `look` found: the facts, the page that it wrote, and, in a notebook, the lines that were not printed."""

    facts: Look
    page: Path
    said: Sequence[str] = ()

    def __repr__(self) -> str:
        report = self.facts.report
        return f"<{report['train_rows']:,} rows to train on, {report['eval_rows']:,} held out; page: {self.page}>"

    def _repr_html_(self) -> str:
        from luthier.view.lookpage import STYLE as LOOK
        from luthier.view.lookpage import look_parts

        last = [tag("p", self.said[-1])] if self.said else []
        return fragment(*look_parts(self.facts), *last, _lines(self.said), style=LOOK)


def comparison_html(comparison: Comparison) -> str:
    """The figures, the recipe's prompts and the most telling held-out rows; what the base did not write is marked."""
    parts = [figures(summary(comparison))]
    if comparison.prompts:
        parts += [tag("h2", PROMPTS), side_table(comparison.prompts)]
    held = flips_first(comparison.held_out)
    if held:
        parts += [tag("h2", HELD_OUT), side_table(held[:ON_SCREEN])]
    if len(held) > ON_SCREEN:
        more = f"… and {len(held) - ON_SCREEN:,} more held-out rows in compare.html, in the run's folder"
        parts.append(tag("p", more, class_="soft"))
    return fragment(*parts, style=SIDES)


def run_html(history: History, said: Sequence[str] = ()) -> str:
    """How a run stands: its state, curves and figures, the newest samples, and the lines that were `said`."""
    running = history.state == "running"
    first, *others = curves(history)
    more = tag("details", tag("summary", "more curves"), tag("div", *others, class_="pictures"))
    parts = [
        _top(history),
        _remark(history),
        tag("div", first, tag("dl", *_facts(history)), class_="run") if history.metrics else "",
        _samples(history.samples),
        tag("pre", "\n".join(said[-LAST:]), class_="said soft") if running and said else "",
        more if others and not running else "",  # what is unfolded would fold at the next drawing
        _lines(said),
    ]
    return fragment(*parts, style=charts.STYLE + SIDES)


def _lines(said: Sequence[str]) -> Html:
    if not said:
        return Html("")
    return tag("details", tag("summary", "what was said"), tag("pre", "\n".join(said), class_="said soft"))


def _top(history: History) -> Html:
    state, phase = history.state, history.status.get("phase")
    shown = "hung" if history.hung is not None else phase if state == "running" and phase else state
    parts = [tag("b", history.folder.name), tag("span", shown, class_=f"state {'hung' if shown == 'hung' else state}")]
    if history.steps:
        parts.append(tag("span", f"step {history.step:,} of {history.steps:,}"))
    if history.left is not None:
        parts.append(tag("span", f"about {duration(history.left)} left", class_="soft"))
    bar = tag("progress", value=str(history.step), max=str(history.steps)) if history.steps else Html("")
    return join([tag("p", *parts, class_="top"), bar])


def _remark(history: History) -> Html:
    """What does not go as it should, or what was said at the end, and what goes on with it."""
    told = panelparts.hang(history) or history.status.get("message") or ""
    if history.state in ("done", "stopped") and told:
        told = f"kept: {told}"
    if history.state in ("stopped", "failed", "dead"):
        told += f"{'; ' * bool(told)}go on with: {train_call(history.folder.shown, resume=True)}"
    return tag("p", told, class_="soft") if told else Html("")


def _facts(history: History) -> Iterator[Html]:
    last, evals, best = history.last, history.eval_losses, history.best_eval
    facts = [
        ("loss", f"{last['loss']:.4f}" if last else NOTHING),
        ("eval loss", f"{evals[-1][1]:.4f} {panelparts.direction(evals)}" if evals else NOTHING),
        ("best eval", f"{best[1]:.4f} at step {best[0]:,}" if best else NOTHING),
        ("learning rate", f"{last['lr']:.2e}" if last else NOTHING),
        *panelparts.facts(history),
    ]
    for gpu in history.status.get("gpu") or []:
        (name, _), *told = panelparts.gpu_facts(gpu)
        facts.append((name, " · ".join(text.strip() for text, _ in told if text != NOTHING)))
    for name, value in facts:
        if value != NOTHING:
            yield tag("div", tag("dt", name), tag("dd", value))


def _samples(lines: Sequence[dict[str, Any]]) -> Html:
    """Of every prompt the reply before training and the newest one, in which the words that are new are marked."""
    if not lines:
        return Html("")
    step, first = lines[-1]["step"], lines[0]["step"]
    before = {str(line["prompt"]): line["reply"] for line in lines if line["step"] == first != step}
    rows = []
    for line in (line for line in lines if line["step"] == step):
        since = before.get(str(line["prompt"]))
        reply = join([marked(line["reply"], since), "" if line["stopped"] else tag("span", " …", class_="soft")])
        rows.append([said(line["prompt"]), *([marked(since or "")] if before else []), reply])
    head = [f"step {number:,}" if number else "before training" for number in (first, step)]
    return table(["prompt", *(head if before else head[1:])], rows, class_="sides" if before else "")


# -- one cell --------------------------------------------------------------------------------------------------------


_shown: list[tuple[int, Path]] = []
"""The run that a cell shows while it trains, with the cell's number."""


def is_shown(path: Path) -> bool:
    """Does the cell that runs now show this run already?"""
    ours = shell()
    return ours is not None and (ours.execution_count, path) in _shown


class Cell:
    """One output of a notebook's cell, drawn anew about once a second, by a thread of its own, until it ends."""

    def __init__(self) -> None:
        self.shell, self.name = shell(), uuid4().hex
        self.lines: list[str] = []
        self.follower: Follower | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="cell", daemon=True)

    def say(self, line: str) -> None:
        """A line among those that the cell shows. Paths are as short as the notebook would write them."""
        self.lines.append(line.replace(f"{Path.cwd()}/", ""))

    def watch(self, path: Path) -> None:
        """Show the run in this folder from now on."""
        assert self.shell is not None
        self.follower = Follower(RunFolder(path))
        _shown[:] = [(self.shell.execution_count, path)]

    def draw(self, update: bool = True) -> None:
        """Send the output as it is now; the first time it takes its place in the cell."""
        if self.follower is not None:
            whole = run_html(self.follower.look(), self.lines)
        else:
            told = "\n".join(self.lines[-LAST:]) or ("no run was begun" if self.over.is_set() else "starting")
            whole = fragment(tag("pre", told, class_="said soft"))
        data = {"text/html": whole, "text/plain": "\n".join(self.lines)}
        assert self.shell is not None
        self.shell.display_pub.publish(data, transient={"display_id": self.name}, update=update)

    def _follow(self) -> None:
        pause = TICK
        while not self.over.wait(pause):
            began = time.thread_time()
            self.draw()
            pause = max(TICK, (time.thread_time() - began) / SHARE)


@contextmanager
def shown(say: Say, watch: Watch | None) -> Iterator[tuple[Say, Watch | None]]:
    """In the block, what a run in another process is told by: in a notebook by one output of the cell, which stays.

    Anywhere else, or where the caller has a way of his own, by what he gives.
    """
    if shell() is None or watch is not None or say is not print:
        yield say, watch
        return
    one = Cell()
    one.draw(update=False)
    one.thread.start()
    try:
        yield one.say, one.watch
    finally:
        one.over.set()
        one.thread.join()
        one.draw()
