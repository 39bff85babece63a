"""Self-contained HTML pages: no outside resource, light and dark as the reader's screen is, fit to print.

A string that is no `Html` is escaped wherever it goes in: data cannot become markup.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from itertools import pairwise

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5d6673; --line: #d9dde3; --paper: #fff; --panel: #f5f6f8;
  --taught: #c9efd3; --special: #7c4dbe; --good: #2f7d4f; --new: #ffe9a8; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa3b0; --line: #3a404a; --paper: #16181d;
  --panel: #1f2229; --taught: #1f4a30; --special: #b794f6; --good: #6cc592; --new: #5c4a10; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "PingFang SC", "Hiragino Sans GB",
  "Microsoft YaHei", "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", sans-serif }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
h3 { font-size: 1rem; margin: 0 0 .3rem } h3 .soft { font-weight: 400 }
header p, .soft, figcaption, dt, th { color: var(--soft) } header p { margin: .2rem 0 0 }
.scroll { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600; font-size: .85rem } td, .text { white-space: pre-wrap; overflow-wrap: anywhere }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums }
.numbers td, .numbers th { white-space: nowrap }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2.25rem; margin: 1.2rem 0 }
.figures dd { margin: 0; font-size: 1.45rem; font-weight: 600 } .figures dt { font-size: .85rem }
.figures div { display: flex; flex-direction: column } .figures small { display: block; max-width: 13rem }
.histogram { margin: .6rem 0; max-width: 34rem } .histogram svg { width: 100%; height: 4.5rem; fill: var(--good) }
.histogram figcaption { display: flex; justify-content: space-between; border-top: 1px solid var(--line) }
figcaption { font-size: .8rem }
.panel { background: var(--panel); border-radius: .5rem; padding: .9rem 1.1rem; margin: .8rem 0 }
.ids, code { font: .85em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", "Noto Sans Mono CJK SC",
  monospace }
summary { cursor: pointer; color: var(--soft) }
mark { background: var(--new); color: inherit; border-radius: .2em }
@media print { :root { font-size: 12px } body { max-width: none; padding: 0; font-size: 11px }
  .panel, tr, figure, dl > div { break-inside: avoid }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact } .scroll { overflow: visible } }
"""

# NUL to US as their pictures; the rest, and what turns the direction of writing, spelt out
_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: "␡"}
_CONTROLS |= {code: f"\\u{code:04x}" for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_VOID = {"meta", "br"}  # elements without content


class Html(str):
    """Markup that goes into a page as it is."""

    __slots__ = ()


def visible(text: str) -> str:
    """Text with its control characters made visible (ESC as ␛): they would steer a terminal, and HTML forbids some.

    Line breaks and tabs stay.
    """
    return text.translate(_CONTROLS)


def escape(text: str) -> Html:
    """Text → markup that shows it."""
    return text if isinstance(text, Html) else Html(html.escape(visible(text)))


def join(parts: Iterable[str]) -> Html:
    """The parts one behind the other, each escaped unless it is markup."""
    return Html("".join(map(escape, parts)))


def tag(name: str, /, *inside: str, **attributes: str) -> Html:
    """An element: `tag("td", text, class_="number")`. An attribute that is a word of Python takes a trailing `_`."""
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>" + ("" if name in _VOID else f"{join(inside)}</{name}>"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "") -> Html:
    """A table. It scrolls by itself where it is wider than the page."""
    top = tag("thead", tag("tr", *(tag("th", cell) for cell in head)))
    body = tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))
    return tag("div", tag("table", top, body, class_=class_), class_="scroll")


def figures(given: Iterable[tuple[str, ...]]) -> Html:
    """The numbers that matter, large, each as (value, name), or as (value, name, what it means), the last in small."""
    parts = [
        tag("div", tag("dd", value), tag("dt", name, *(tag("small", said) for said in more)))
        for value, name, *more in given
    ]
    return tag("dl", *parts, class_="figures")


def even(edges: Sequence[int]) -> bool:
    """Are the bars of a histogram of one width? Where they grow, its scale is logarithmic."""
    return len({high - low for low, high in pairwise(edges)}) == 1


def histogram(counts: Sequence[int], edges: Sequence[int], last: int) -> Html:
    """Rows by length as inline SVG: counts[i] of them have edges[i] ≤ tokens < edges[i + 1] (one edge more).

    last: tokens of the longest row. The caption says where the scale is logarithmic.
    """
    step, top = 100 / len(counts), max(*counts, 1)
    bars = []
    for i, count in enumerate(counts):
        tall = max(40 * count / top, 0.5) if count else 0  # a single thing among thousands is seen, too
        said = tag("title", f"{edges[i]:,} – {min(edges[i + 1] - 1, last):,}: {count:,}")
        place = {"x": i * step, "y": 40 - tall, "width": step * 0.9, "height": tall}
        bars.append(tag("rect", said, **{name: f"{value:.2f}" for name, value in place.items()}))
    picture = tag("svg", *bars, viewBox="0 0 100 40", preserveAspectRatio="none", role="img")
    about = "rows by length in tokens" + ("" if even(edges) else "; lengths on a log scale")
    axis = tag("figcaption", *(tag("span", text) for text in (f"{edges[0]:,}", about, f"{last:,}")))
    return tag("figure", picture, axis, class_="histogram")


def page(title: str, note: str, *inside: str, style: str = "") -> str:
    """A whole page. `note`: one line below the title. `style`: CSS of this page alone."""
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            tag("style", Html(STYLE + style)),
        ]
    )
    top = tag("header", tag("h1", title), tag("p", note))
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{top}{join(inside)}</body>\n</html>\n'
