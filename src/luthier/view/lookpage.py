"""What `luthier look` shows: the facts of data/inspect.py on the terminal and as a self-contained page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.data.inspect import PERCENTILES, Check, Lengths, Look, Shown
from luthier.data.pieces import Piece
from luthier.html import Html, escape, even, figures, histogram, join, page, table, tag, visible

TAUGHT, SPECIAL, SOFT = "green", "magenta", "bright_black"
BLOCKS = " ▁▂▃▄▅▆▇█"
MARKS = {"fine": ("✓", "green"), "notice": ("!", "yellow"), "wrong": ("✗", "red")}
STYLE = """
.token { box-shadow: inset -1px 0 var(--line); border-radius: .15em }
.taught { background: var(--taught) }
.special { border: 1px solid var(--special); border-radius: .3em; color: var(--special); padding: 0 .2em; 
  margin: 0 1px }
.sources td:nth-child(2), .checks td:nth-child(2) { white-space: nowrap; width: 1% } 
.checks td:first-child { width: 1.5rem } .checks thead { display: none }
.fine { color: var(--good) } details ul { margin: .3rem 0; padding-left: 1.4rem; color: var(--soft) }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 0 2rem }
"""


def problems(look: Look) -> list[str]:
    """One line for each check that is wrong: the model would learn what no recipe can mean."""
    return [
        f"{check.what}: {check.count:,} of {check.of:,} ({', '.join(check.named)})"
        for check in look.checks
        if check.weight == "wrong" and check.count
    ]


# -- the terminal ----------------------------------------------------------------------------------------------------


def show(look: Look, console: Console) -> None:
    """Print it. Where there is no colour, what is taught stands in ⟦…⟧."""
    for line in _overview(look):
        console.print(Text(visible(line)))
    console.print()
    console.print(_lengths_table(look.lengths))
    console.print()
    console.print(_spreads_table(look.lengths))
    console.print()
    console.print(_checks_table(look.checks))
    bracketed = console.no_color or console.color_system is None
    console.print()
    console.print(_legend(bracketed))
    for row in look.rows:
        console.rule(Text(f"{row.origin} · {_counted(row)}", SOFT), style=SOFT, align="left")
        console.print(_coloured(row.pieces, bracketed), soft_wrap=True)  # the terminal breaks lines, not the words
        console.print(_ids(row.ids, console.width))


def _overview(look: Look) -> Iterator[str]:
    report = look.report  # its sources and rows were said when they were read
    first = f"begins with {look.first_token}" if look.first_token else "begins with no token of its own"
    yield f"template {report['template']}: a row {first}; an answer ends with {' or '.join(look.end_tokens)}"
    taught = f"{look.supervised_share:.1%}".replace("%", " %")
    yield f"{report['train_tokens']:,} tokens to train on, {taught} of them taught"


def _lengths_table(lengths: Sequence[Lengths]) -> Table:
    grid = Table(box=None, pad_edge=False, header_style=SOFT)
    grid.add_column("tokens", no_wrap=True)
    for percentile in PERCENTILES:
        grid.add_column(_name(percentile), justify="right", no_wrap=True)
    for part in lengths:
        grid.add_row(part.what, *(f"{value:,}" for value in part.percentiles))
    return grid


def _spreads_table(lengths: Sequence[Lengths]) -> Table:
    """A histogram in one line for each part, between its shortest and its longest."""
    grid = Table(box=None, pad_edge=False, show_header=False)
    for part in lengths:
        high = max(part.counts)
        bars = "".join(BLOCKS[-(-count * 8 // high)] for count in part.counts)  # rounded up: one row is seen
        scale = Text("" if even(part.edges) else "log scale", SOFT)
        grid.add_row(part.what, f"{part.edges[0]:,}", Text(bars, TAUGHT), f"{part.percentiles[-1]:,}", scale)
    return grid


def _name(percentile: int) -> str:
    return {0: "min", 100: "max"}.get(percentile, f"{percentile} %")


def _checks_table(checks: Sequence[Check]) -> Table:
    """A line for each check that found something; the others together, last."""
    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for check in checks:
        if check.count:
            about = Text("\n".join([check.what, *map(visible, check.named)]))
            about.stylize(SOFT, len(check.what))
            grid.add_row(Text(*MARKS[check.weight]), _share(check), about)
    if fine := _fine(checks):
        grid.add_row(Text(*MARKS["fine"]), "none", Text.assemble(_found_nothing(fine), (f": {'; '.join(fine)}", SOFT)))
    return grid


def _fine(checks: Sequence[Check]) -> list[str]:
    return [check.what for check in checks if not check.count]


def _found_nothing(fine: Sequence[str]) -> str:
    return f"{len(fine)} checks found nothing" if len(fine) > 1 else "1 check found nothing"


def _share(check: Check) -> str:
    return f"{check.count:,} of {check.of:,}"


def _legend(bracketed: bool) -> Text:
    if bracketed:
        return Text("Rows as the model sees them. ⟦taught⟧ is what it learns to write; the rest it reads.")
    return Text.assemble(
        "Rows as the model sees them. ",
        ("taught", TAUGHT),
        " is what it learns to write, ",
        ("special", f"{SPECIAL} reverse"),
        " tokens are boxed; the rest it reads.",
    )


def _counted(row: Shown) -> str:
    return f"{len(row.ids):,} tokens, {row.supervised:,} taught"


def _coloured(pieces: Sequence[Piece], bracketed: bool) -> Text:
    """The decoded row. A line break that is taught is drawn, as a colour does not show on it."""
    text, open_ = Text(), False
    for piece in pieces:
        if bracketed and piece.supervised != open_:
            text.append("⟦" if piece.supervised else "⟧")
            open_ = piece.supervised
        said = visible(piece.text).replace("\n", "⏎\n") if piece.supervised else visible(piece.text)
        colour = TAUGHT if piece.supervised else SPECIAL
        text.append(said, f"{colour} reverse" if piece.special else TAUGHT if piece.supervised else None)
    return text.append("⟧") if open_ else text


def _ids(ids: Sequence[int], width: int) -> Text:
    """As many as one line of the terminal holds; the page has them all."""
    words = [f" {id}" for id in ids]
    more = f" … {len(ids):,} in all"
    ends = list(accumulate(map(len, words), initial=len("ids")))
    if ends[-1] > width:
        words = [*words[: sum(end + len(more) <= width for end in ends[1:])], more]
    return Text("ids" + "".join(words), SOFT)


# -- the page --------------------------------------------------------------------------------------------------------


def look_html(look: Look, *, recipe: str = "", model: str = "") -> str:
    """The page: figures, sources, lengths, checks, and the rows token by token (a token's id when pointed at).

    recipe: the file's name, or the run's. model: its name as the recipe has it.
    """
    title = f"{recipe}: the data as the model sees it" if recipe else "The data as the model sees it"
    note = next(line for line in _overview(look) if line.startswith("template "))
    name = model if ":" in model else Path(model).name
    return page(title, f"model {name} · {note}" if name else note, *look_parts(look), style=STYLE)


def look_parts(look: Look) -> list[Html]:
    """What is on the page; it needs `STYLE`."""
    report = look.report
    top = figures(
        [
            (f"{report['train_rows']:,}", "rows to train on"),
            (f"{report['eval_rows']:,}", "rows held out"),
            (f"{report['train_tokens']:,}", "tokens"),
            (f"{look.supervised_share:.1%}".replace("%", " %"), "of them taught"),
            (f"{report['longest']:,}", "tokens in the longest row"),
        ]
    )
    return [
        top,
        tag("h2", "Sources"),
        _sources(report["sources"]),
        tag("h2", "Checks"),
        _checks(look.checks),
        tag("h2", "Rows, drawn at random"),
        _legend_html(),
        *map(_row_html, look.rows),
        tag("h2", "Lengths in tokens"),
        table(["", *map(_name, PERCENTILES)], map(_length_row, look.lengths), class_="numbers"),
        tag("div", *map(_bars, look.lengths), class_="columns"),
    ]


def _sources(sources: Sequence[dict[str, Any]]) -> Html:
    rows = [
        (source["path"], source["part"], f"{source['rows']:,}", f"{source['weight']:g}", source["how"])
        for source in sources
    ]
    return table(["file", "part", "rows", "weight", "format and columns"], rows, class_="sources")


def _checks(checks: Sequence[Check]) -> Html:
    rows = [
        [MARKS[check.weight][0], _share(check), join([check.what, tag("div", "\n".join(check.named), class_="soft")])]
        for check in checks
        if check.count
    ]
    parts = [table(["", "", ""], rows, class_="checks")] if rows else []
    if fine := _fine(checks):
        title = tag("summary", tag("span", "✓", class_="fine"), f" {_found_nothing(fine)}")
        parts.append(tag("details", title, tag("ul", *(tag("li", what) for what in fine))))
    return join(parts)


def _length_row(part: Lengths) -> list[str]:
    return [part.what, *(f"{value:,}" for value in part.percentiles)]


def _bars(part: Lengths) -> Html:
    return tag("div", tag("h3", part.what), histogram(part.counts, part.edges, part.percentiles[-1]))


def _legend_html() -> Html:
    taught = tag("span", "taught", class_="token taught")
    special = tag("span", "special", class_="token special")
    return tag(
        "p",
        "The model learns to write what is ",
        taught,
        ", and reads the rest; ",
        special,
        " tokens are boxed. Point at a token to see its id.",
        class_="soft",
    )


def _row_html(row: Shown) -> Html:
    ids = tag("details", tag("summary", "ids"), tag("div", " ".join(map(str, row.ids)), class_="ids"))
    title = tag("h3", row.origin, tag("span", f" · {_counted(row)}", class_="soft"))
    text = tag("div", *map(_token, row.pieces), class_="text")
    return tag("section", title, text, ids, class_="panel")


def _token(piece: Piece) -> Html:
    kinds = "token" + " taught" * piece.supervised + " special" * piece.special
    end = tag("span", "⏎", class_="soft")
    said = join(escape(part) if part != "\n" else join([end, "\n"]) for part in re.split("(\n)", piece.text))
    return tag(
        "span", said, class_=kinds, title=("id " if len(piece.ids) == 1 else "ids ") + " ".join(map(str, piece.ids))
    )
