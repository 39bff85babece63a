"""An adapter at several strengths for people: terminal, Markdown, page with the plot of score against forgetting."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from luthier.html import Html, figures, join, page, table, tag
from luthier.view.charts import STYLE as CHARTS
from luthier.view.charts import Series, line_chart, shown
from luthier.view.sidebyside import NO_STOP, NOTHING, SOFT, escaped
from luthier.view.tradeoff import tradeoff

if TYPE_CHECKING:
    from luthier.replies import Question
    from luthier.strength import Strengths

Found = Mapping[str, Any]
HEAD = ("strength", "held-out loss", "exact", "stopped", "general text", "change")
NOTE = (
    "General text: its perplexity, and the change from the base's, which is the forgetting. Below a figure its 95 % "
    "bounds: Wilson's for the share of rows answered exactly, by bootstrap over rows and passages for the others. "
    "Nothing was trained again: every weight goes that fraction of its way from base to tuned."
)
STYLE = (
    CHARTS
    + """
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem 1.25rem; margin: 1rem 0 }
.numbers small { display: block; color: var(--soft) }
.answers td:first-child { width: 24% } .wrong { color: var(--bad) } .right { color: var(--good) }
"""
)


def advice(strengths: Strengths) -> str:
    """What the figures say."""
    found, at = strengths.figures(), strengths.best
    full = found[1.0]
    changes = f"the perplexity of general text changes by {_change(full)}"
    if found[0.0]["perplexity"] > strengths.words:
        return (
            f"The base does not know this general text: to guess among its {strengths.words:,} tokens is better. Give "
            "text that it knows (--text FILE)."
        )
    if full["perplexity_change_bounds"][0] <= 0:
        return f"At strength 1 no forgetting is certain: {changes} ({_range(full['perplexity_change_bounds'], '+')})."
    if at is None:
        return f"At strength 1 {changes}; no lower one does the task as well."
    score = "answers no fewer rows exactly" if full["exact"] is not None else "has no worse held-out loss"
    return f"Strength {at:g} {score} than 1; at 1 {changes}, at {at:g} by {_change(found[at])}."


# -- figures in words ------------------------------------------------------------------------------------------------


def _cells(at: float, found: Found) -> list[tuple[str, str]]:
    """A row of the table, each cell a figure and its bounds."""
    loss, exact, stopped = found["loss"], found["exact_share"], found["stopped_share"]
    base = at == 0
    return [
        (f"{at:g}", ""),
        ("–", "") if loss is None else (f"{loss:.4f}", "{:.2g} to {:.2g}".format(*found["loss_bounds"])),
        ("–", "") if exact is None else (_share(exact), _range(found["exact_bounds"])),
        ("–" if stopped is None else _share(stopped), ""),
        (shown(found["perplexity"]), ""),
        ("base", "") if base else (_change(found), _range(found["perplexity_change_bounds"], "+")),
    ]


def _share(value: float, sign: str = "") -> str:
    """0.123 → 12.3 %; what is far above 1 without digits behind the point."""
    return _minus(f"{100 * value:{sign}.1f} %" if abs(value) < 10 else f"{100 * value:{sign},.0f} %")


def _change(found: Found) -> str:
    return _share(found["perplexity_change"], "+")


def _range(bounds: Sequence[float], sign: str = "") -> str:
    digits = 0 if max(map(abs, bounds)) >= 0.1 else 1
    low, high = (_minus(f"{100 * bound:{sign},.{digits}f}") for bound in bounds)
    return f"{low} to {high} %"


def _minus(figure: str) -> str:
    return figure.replace("-", "−")


# -- the terminal ----------------------------------------------------------------------------------------------------


@contextmanager
def bar(things: int, what: str = "at each strength") -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, elsewhere nothing; it gives what to call behind each of the things to do."""
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        "{task.percentage:>3.0f} %",
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=things)
        yield lambda: progress.advance(task)


def show(strengths: Strengths, console: Console) -> None:
    """Print the table, and what it says."""
    found = strengths.figures()
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in HEAD:
        grid.add_column(name, justify="right", no_wrap=True)
    for at, here in found.items():
        cells = _cells(at, here)
        grid.add_row(*(Text(value) + Text(f"\n{bounds}" if bounds else "", SOFT) for value, bounds in cells))
    console.print(grid)
    console.print()
    console.print(advice(strengths), highlight=False)


# -- Markdown --------------------------------------------------------------------------------------------------------


def markdown(strengths: Strengths, *, name: str, about: str) -> str:
    """strength.md: the table, what it says, and what the recipe's prompts were answered at each strength."""
    found = strengths.figures()
    lines = [f"# {escaped(_title(name))}", "", escaped(about), "", f"**{escaped(advice(strengths))}**", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---:|" * len(HEAD)]
    for at, here in found.items():
        cells = (f"{value}<br><sub>{bounds}</sub>" if bounds else value for value, bounds in _cells(at, here))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", NOTE, "", _about_text(strengths)]
    for i, question in _prompts(strengths):
        lines += ["", f"**{escaped(question.text)}**", "", "| strength | answer |", "|---:|---|"]
        lines += [f"| {at:g} | {escaped(said)} |" for at, said in _answers(strengths, i)]
    return "\n".join(lines) + "\n"


# -- the page --------------------------------------------------------------------------------------------------------


def strength_html(strengths: Strengths, *, name: str, about: str) -> str:
    """strength.html: what the figures say, the plot, the table, and the prompts' answers at each strength."""
    found = strengths.figures()
    parts: list[str] = [figures(_summary(found)), tag("p", tag("b", advice(strengths))), _plots(found)]
    rows = [
        [join([value, tag("small", bounds)]) if bounds else value for value, bounds in _cells(at, here)]
        for at, here in found.items()
    ]
    parts += [tag("h2", "At each strength"), table(HEAD, rows, "numbers")]
    parts.append(tag("p", f"{NOTE} {_about_text(strengths)}", class_="soft"))
    if prompts := _prompts(strengths):
        parts.append(tag("h2", "The recipe's prompts"))
    for i, question in prompts:
        answers = [(f"{at:g}", said) for at, said in _answers(strengths, i)]
        parts += [tag("h3", question.text), table(["strength", "answer"], answers, "answers")]
    return page(_title(name), about, *parts, style=STYLE)


def _summary(found: Mapping[float, Found]) -> list[tuple[str, ...]]:
    base, full = found[0.0], found[1.0]
    said: list[tuple[str, ...]] = []
    if full["exact_share"] is not None:
        exact = f"{_share(base['exact_share'])} → {_share(full['exact_share'])}"
        said.append((exact, f"of {full['answered']} held-out rows answered exactly"))
    if full["loss"] is not None:
        said.append((f"{base['loss']:.3f} → {full['loss']:.3f}", "held-out loss"))
    return [*said, (_change(full), "perplexity of general text", "at full strength; more is forgetting")]


def _plots(found: Mapping[float, Found]) -> Html:
    """Score against forgetting, and both by strength."""
    score, name = ("exact_share", "answered exactly, %") if found[1.0]["exact_share"] is not None else ("loss", "")
    change = [(100 * at, 100 * here["perplexity_change"]) for at, here in found.items()]
    charts = []
    if found[1.0][score] is not None:
        times = 100 if name else 1
        values = [(100 * at, times * here[score]) for at, here in found.items()]
        y = name or "held-out loss"
        labels = [f"{at:g}" for at in found]
        points = [(x, value) for (_, x), (_, value) in zip(change, values, strict=True)]
        charts.append(tradeoff(points, labels, x="forgetting, %", y=y))
        charts.append(line_chart([Series(y, values, "dots")], x="strength, %", y=y, zero=True))
    charts.append(line_chart([Series("", change, "dots")], x="strength, %", y="forgetting, %", zero=True))
    return tag("div", *charts, class_="pair")


def _title(name: str) -> str:
    return f"{name}: strength of the adapter"


def _about_text(strengths: Strengths) -> str:
    base = strengths.scores[0.0]
    tokens = sum(tokens for _, tokens in base.texts)
    rows = f"Held-out loss over {len(base.rows)} rows" if base.rows else "No held-out rows (data.eval)"
    return f"{rows}; general text: {strengths.text}, {len(base.texts)} pieces with {tokens:,} tokens."


def _prompts(strengths: Strengths) -> list[tuple[int, Question]]:
    return [(i, question) for i, question in enumerate(strengths.questions) if question.reference is None]


def _answers(strengths: Strengths, i: int) -> list[tuple[float, str]]:
    replies = [(at, score.replies[i]) for at, score in strengths.scores.items()]
    return [(at, (r.text.strip() or NOTHING) + ("" if r.stopped else f" [{NO_STOP}]")) for at, r in replies]
