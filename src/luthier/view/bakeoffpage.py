"""A bake-off for people: methods on the same rows, seeds and steps. Terminal, Markdown, page with its plots. No torch.

All of it from methods.json alone; `bakeoffwords` has the verdict and the tables' rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.html import Html, figures, join, page, table, tag, visible
from luthier.view.bakeoffwords import (
    COSTS,
    MOST,
    SCORES,
    SEED,
    TRAINED,
    Found,
    Row,
    about,
    change_of,
    costs,
    finished,
    knows,
    loss_of,
    measure,
    note,
    scores,
    seed_rows,
    share,
    trained_rows,
    verdict,
    whole_rows,
)
from luthier.view.charts import STYLE as CHARTS
from luthier.view.charts import Series, line_chart, steep
from luthier.view.sidebyside import HELD_OUT, LONG, NOTHING, PROMPTS, SOFT, escaped
from luthier.view.tradeoff import Mark, scatter

ON_SCREEN = 3  # prompts whose answers the terminal shows; the page has them all
OPEN_ROWS = 10  # held-out rows that the page shows at once; the others unfold
LINES = 4  # in one chart: as many as it has colours and marks
FAR = 3.0  # a change of the perplexity beyond it (to four times the base's) asks for a log scale
EACH, FAILED, WITH, BY_SEED = "Each method", "What failed", "Trained with", "Each seed"
STYLE = (
    CHARTS
    + """
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1.4rem 2rem;
  margin: 1rem 0 }
.pair text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round }
.pair .plain { fill: var(--soft) } .pair .raw { opacity: .7 }
.numbers small { display: block; color: var(--soft) }
.right { color: var(--good) } .wrong { color: var(--bad) }
.with { min-width: 40rem } .with td:not(:nth-child(n+3)) { white-space: nowrap; padding-right: 1.25rem }
.asked { margin: 1.4rem 0 .5rem; max-height: 9rem; overflow: auto }
.said { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(14rem, 100%), 1fr)); gap: .6rem }
.said .panel { margin: 0; padding: .6rem .8rem; max-height: 18rem; overflow: auto }
@media print { .asked, .said .panel { max-height: none } }
"""
)


# -- the terminal ----------------------------------------------------------------------------------------------------


def show(found: Found, console: Console) -> None:
    """Print what the first prompts were answered, how well each method does, what it costs, and the verdict."""
    for answer in [one for one in found["answers"] if one["reference"] is None][:ON_SCREEN]:
        console.print(Text(_cut(answer["prompt"]), "bold"))
        grid = Table.grid(padding=(0, 2, 0, 0))
        for who, text in _said(found, answer):
            grid.add_row(Text(who, SOFT), Text(_cut(text)))
        console.print(grid)
        console.print()
    tried = [[(method["title"], ""), *scores(found, method["figures"])] for method in finished(found)]
    _print(console, ("method", *SCORES), [*tried, [("base", ""), *scores(found, found["base"])]])
    if done := finished(found):
        _print(console, ("method", *COSTS), [[(method["title"], ""), *costs(method)] for method in done])
    for title, why in _failed(found):
        console.print(Text(f"{title} failed: {visible(why)}"))
    console.print(Text(verdict(found)))


def _print(console: Console, head: Sequence[str], rows: Iterable[Row]) -> None:
    """A table with the bounds below the figures."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, name in enumerate(head):
        grid.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(value) + Text(f"\n{below}" if below else "", SOFT) for value, below in row))
    console.print(grid)
    console.print()


def _cut(text: str) -> str:
    text = " ".join(visible(text).split())
    return text if len(text) <= LONG else text[: LONG - 1] + "…"


# -- answers ---------------------------------------------------------------------------------------------------------


def _questions(found: Found) -> list[tuple[str, list[Found]]]:
    """The recipe's prompts, and the held-out rows: first those that some methods answer exactly and others do not."""
    prompts = [one for one in found["answers"] if one["reference"] is None]
    held = [one for one in found["answers"] if one["reference"] is not None]
    held.sort(key=lambda one: len({_right(one, text) for who, text in _said(found, one) if who != "base"}) < 2)
    return [(name, answers) for name, answers in ((PROMPTS, prompts), (HELD_OUT, held)) if answers]


def _said(found: Found, answer: Found) -> Iterator[tuple[str, str]]:
    """(who, what) to one question, the best method first and the base last."""
    replies = answer["replies"]
    for method in finished(found):
        if method["kind"] in replies:
            yield method["title"], replies[method["kind"]].strip() or NOTHING
    yield "base", replies["base"].strip() or NOTHING


def _right(answer: Found, text: str) -> bool:
    return bool(text == answer["reference"].strip())


def _mark(answer: Found, text: str) -> str:
    return "" if answer["reference"] is None else "✓ " if _right(answer, text) else "✗ "


def _failed(found: Found) -> list[tuple[str, str]]:
    return [(method["title"], method["failed"]) for method in found["methods"] if method["failed"]]


def _title(found: Found) -> str:
    return f"{found['name']}: methods side by side"


# -- Markdown --------------------------------------------------------------------------------------------------------


def markdown(found: Found) -> str:
    """The verdict, the tables, and what the prompts and held-out rows were answered."""
    lines = [f"# {escaped(_title(found))}", "", escaped(found["about"]), "", f"**{escaped(verdict(found))}**", ""]
    lines += [escaped(about(found)), "", f"## {EACH}", "", *_table(("method", *SCORES, *COSTS), whole_rows(found))]
    lines += ["", note(found)]
    if failed := _failed(found):
        lines += ["", f"## {FAILED}", "", *_table(("method", "why"), _rows(failed))]
    for name, answers in _questions(found):
        lines += ["", f"## {name}"]
        for answer in answers:
            reference = [] if answer["reference"] is None else [f"= {escaped(answer['reference'])}", ""]
            lines += ["", f"**{escaped(answer['prompt'])}**", "", *reference]
            told = [(who, _mark(answer, text) + text) for who, text in _said(found, answer)]
            lines += _table(("method", "answer"), _rows(told))
    lines += ["", f"## {WITH}", "", *_table(TRAINED, trained_rows(found))]
    lines += ["", f"## {BY_SEED}", "", *_table(SEED, seed_rows(found))]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Row]) -> list[str]:
    written = [
        [f"{escaped(value)}<br><sub>{below}</sub>" if below else escaped(value) for value, below in row] for row in rows
    ]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *written)]


def _rows(plain: Iterable[Sequence[str]]) -> list[Row]:
    return [[(cell, "") for cell in row] for row in plain]


# -- the page --------------------------------------------------------------------------------------------------------


def bakeoff_html(found: Found) -> str:
    """The verdict, the key figures, the plots, the tables, and every answer side by side."""
    parts: list[str] = [tag("p", tag("b", verdict(found))), figures(_headline(found)), _plots(found)]
    parts += [tag("h2", EACH), table(("method", *SCORES, *COSTS), map(_cells, whole_rows(found)), "numbers")]
    parts.append(tag("p", note(found), class_="soft"))
    if failed := _failed(found):
        parts += [tag("h2", FAILED), table(("method", "why"), failed)]
    for name, answers in _questions(found):
        parts += [tag("h2", name), *(_answers(found, one) for one in answers[:OPEN_ROWS])]
        if rest := answers[OPEN_ROWS:]:
            folded = [_answers(found, one) for one in rest]
            parts.append(tag("details", tag("summary", f"{len(rest):,} more"), *folded))
    parts += [tag("h2", WITH), table(TRAINED, map(_cells, trained_rows(found)), "with")]
    parts += [tag("h2", BY_SEED), table(SEED, map(_cells, seed_rows(found)), "numbers")]
    return page(_title(found), join([found["about"], tag("br"), about(found)]), *parts, style=STYLE)


def _cells(row: Row) -> list[str]:
    return [join([value, tag("small", below)]) if below else value for value, below in row]


def _headline(found: Found) -> Iterator[tuple[str, ...]]:
    if done := finished(found):
        best, base, now = done[0], found["base"], done[0]["figures"]
        yield best["title"], "did best"
        if now["exact_share"] is not None:
            exact = f"{share(base['exact_share'])} → {share(now['exact_share'])}"
            yield exact, f"of {now['answered']:,} held-out rows answered exactly", "base → best"
        yield f"{loss_of(base)} → {loss_of(now)}", "held-out loss", "base → best"
        if knows(found):
            yield change_of(best), "perplexity of general text", "of the best; more is forgetting"
    yield f"{len(found['methods'])} × {len(found['seeds'])}", "methods and seeds"


def _answers(found: Found, answer: Found) -> Html:
    """A question, and below it a panel for each method's answer."""
    reference = [] if answer["reference"] is None else [tag("div", f"= {answer['reference']}", class_="soft")]
    panels = []
    for who, text in _said(found, answer):
        colour = "right" if answer["reference"] is not None and _right(answer, text) else "wrong"
        said = tag("div", tag("span", _mark(answer, text), class_=colour), text, class_="text")
        panels.append(tag("div", tag("div", who, class_="soft"), said, class_="panel"))
    asked = tag("h3", answer["prompt"], *reference, class_="asked text")
    return join([asked, tag("div", *panels, class_="said")])


# -- the plots -------------------------------------------------------------------------------------------------------


def _plots(found: Found) -> Html:
    """The score against forgetting and against what trains, and the held-out loss on the way."""
    done = finished(found)
    charts = [_against_forgetting(found, done)] if done and knows(found) else []
    if done:
        charts.append(_against_size(found, done))
    return tag("div", *charts, *_curves(done), class_="pair")


def _against_forgetting(found: Found, done: Sequence[Found]) -> Html:
    """In percent; on a log scale where a method forgot so much that the others would lie on one spot."""
    far = any(one["figures"]["perplexity_change_bounds"][1] > FAR for one in done)

    def place(change: float) -> float:
        return min(1 + change, MOST) if far else 100 * change

    marks = [Mark("base", (place(0.0), _up(found, found["base"])[0]), plain=True)]
    for method in done:
        at, bounds = method["figures"]["perplexity_change"], method["figures"]["perplexity_change_bounds"]
        score, up = _up(found, method["figures"])
        marks.append(Mark(method["title"], (place(at), score), (place(bounds[0]), place(bounds[1])), up))
    x = "perplexity of general text, times the base's" if far else "forgetting, %"
    return scatter(marks, x=x, y=_up_name(found), log=far)


def _against_size(found: Found, done: Sequence[Found]) -> Html:
    marks = []
    for method in done:
        score, up = _up(found, method["figures"])
        marks.append(Mark(method["title"], (method["trainable"], score), None, up))
    return scatter(marks, x="numbers that train", y=_up_name(found), log=True)


def _up(found: Found, figures: Found) -> tuple[float, tuple[float, float]]:
    """What the plots' y axis tells of a model, and its bounds."""
    key, times = ("exact", 100.0) if measure(found) == "exact_share" else ("loss", 1.0)
    low, high = figures[f"{key}_bounds"]
    return times * figures[measure(found)], (times * low, times * high)


def _up_name(found: Found) -> str:
    return "answered exactly, %" if measure(found) == "exact_share" else "held-out loss"


def _curves(done: Sequence[Found]) -> Iterator[Html]:
    """The held-out loss by step, the mean of the seeds; of more methods than a chart has lines, more charts."""
    series = [Series(method["title"], points, "dots") for method in done if len(points := _curve(method)) > 1]
    values = [value for one in series for _, value in one.points]
    for start in range(1, max(len(series), 2 if series else 1), LINES - 1):
        beside = [series[0], *series[start : start + LINES - 1]]
        yield line_chart(beside, x="step", y="held-out loss", log=steep(values))


def _curve(method: Found) -> list[tuple[float, float]]:
    curves = [dict(map(tuple, one["curve"])) for one in method["seeds"]]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in steps]
