"""A comparison for people: base and tuned side by side on the terminal, in Markdown and as a self-contained page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from operator import itemgetter

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.html import Html, figures, join, page, table, tag, visible
from luthier.replies import Comparison, Pair, Question, Reply

ON_SCREEN = 10  # held-out rows on the terminal, those that got worse first; the page has them all
DIFFERENCE = "0 would mean that the tuning does nothing"
LONG = 300  # characters of an answer on the terminal
GOOD, BAD, SOFT = "green", "red", "bright_black"
HAN = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Chinese and Japanese: no blanks between words
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+|\s+|.", re.S)
LETTER = re.compile(r"\w")
LONE = re.compile(r"(\w)(\W*)")  # a character alone, and the stops that end the text
POPULAR = 1000  # words; in a longer text those that occur often are not compared one by one
TITLE, PROMPTS, HELD_OUT = "Base and tuned on the same prompts", "The recipe's prompts", "Held-out rows"
# A run of blanks; a Chinese character with the stops that follow it; or a word.
BREAKABLE = re.compile(r"\s+|[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef][，。、；：？！）》」』”’…]*|[^\s\u2e80-\u9fff]+")
NOTHING, NO_STOP = "(nothing)", "did not stop"
STYLE = """
.sides { table-layout: fixed; min-width: 40rem }
.right { color: var(--good) } .wrong { color: var(--bad) }
.sides td { padding-right: 1.25rem }
"""


def summary(comparison: Comparison) -> list[tuple[str, ...]]:
    """The figures as (value, name) or (value, name, what it means), values as "base → tuned" where both have one."""
    found = comparison.figures()
    base, tuned, held = found["base"], found["tuned"], found["held_out"]
    rows: list[tuple[str, ...]] = [
        (_percent(base["stopped_share"], tuned["stopped_share"]), "of the answers stopped by themselves"),
        (f"{base['mean_tokens']:,.0f} → {tuned['mean_tokens']:,.0f}", "tokens in an answer, on average"),
        (f"{comparison.logit_difference:.3g}", "largest difference of a logit", DIFFERENCE),
    ]
    if not held:
        return rows
    return [
        (_percent(base["exact_share"], tuned["exact_share"]), f"of {held:,} held-out rows answered exactly"),
        (f"{found['wrong_to_right']:,}", "rows wrong before, right now"),
        (f"{found['right_to_wrong']:,}", "rows right before, wrong now"),
        *rows,
    ]


def _percent(base: float, tuned: float) -> str:
    return f"{100 * base:.3g} % → {100 * tuned:.3g} %"


def flips_first(pairs: Sequence[Pair]) -> list[Pair]:
    """Rows in the order of interest: right before and wrong now, still wrong, only now right, right both times."""
    return sorted(pairs, key=lambda pair: (pair.flip != -1, pair.question.right(pair.tuned), pair.flip != 1))


# -- the terminal ----------------------------------------------------------------------------------------------------


def show(comparison: Comparison, console: Console) -> None:
    """Print it: the recipe's prompts, the most telling held-out rows, the figures."""
    held = flips_first(comparison.held_out)
    for title, pairs in ((PROMPTS, comparison.prompts), (HELD_OUT, held[:ON_SCREEN])):
        if pairs:
            console.print(_table(title, pairs, console.width))
    if len(held) > ON_SCREEN:
        console.print(Text(f"… and {len(held) - ON_SCREEN:,} more held-out rows in compare.html", SOFT))
    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column(justify="right", no_wrap=True)
    for value, name, *_ in summary(comparison):
        grid.add_row(Text(value, "bold"), name)
    console.print()
    console.print(grid)


def _table(title: str, pairs: Sequence[Pair], width: int) -> Table:
    """Three columns of one width; `width` is the screen's. Cells come wrapped: see `wrapped`."""
    grid = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_lines=True,
        border_style=SOFT,
        header_style="bold",
    )
    narrow = (width - 10) // 3  # three cells with a blank on each side, four lines between them
    columns = {"prompt": width - 10 - 2 * narrow, "base": narrow, "tuned": narrow}
    for name, column in columns.items():
        grid.add_column(name, width=column, no_wrap=True)
    for pair in pairs:
        cells = (_question(pair.question), _cell(pair, pair.base), _cell(pair, pair.tuned))
        grid.add_row(*(_styled(cell, column) for cell, column in zip(cells, columns.values(), strict=True)))
    return grid


def _styled(lines: Sequence[tuple[str, str]], width: int) -> Text:
    """(text, style) pairs, each on lines of its own; a mark has its colour."""
    text = Text("\n").join(Text(wrapped(line, width), style) for line, style in lines)
    text.highlight_words(["✓"], GOOD)
    text.highlight_words(["✗"], BAD)
    return text


def _question(question: Question) -> list[tuple[str, str]]:
    lines = [(_short(question.text), "")]
    return lines if question.reference is None else [*lines, (f"= {_short(question.reference)}", SOFT)]


def _cell(pair: Pair, reply: Reply) -> list[tuple[str, str]]:
    said = _mark(pair, reply) + (_short(reply.text) or NOTHING)
    return [(said, "")] if reply.stopped else [(said, ""), (f"[{NO_STOP}: {len(reply.ids):,} tokens]", SOFT)]


def wrapped(text: str, width: int) -> str:
    """Lines of at most `width` cells: broken at blanks, and between Chinese characters, but not before their stops.

    rich breaks at blanks alone and begins a new line for a long stretch without any, as a Chinese sentence is.
    """
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in BREAKABLE.findall(paragraph):
            if line and cell_len((line + word).rstrip()) > width:
                lines.append(line.rstrip())
                line = word.lstrip()
            else:
                line += word
            while cell_len(line.rstrip()) > width:
                first, *_ = chop_cells(line, width)
                lines.append(first)
                line = line[len(first) :]
        lines.append(line.rstrip())
    return "\n".join(lines)


def _short(text: str) -> str:
    text = visible(text.strip())
    return text if len(text) <= LONG else f"{text[:LONG]}… (+{len(text) - LONG:,} characters)"


# -- Markdown --------------------------------------------------------------------------------------------------------


def markdown(comparison: Comparison, *, name: str = "", about: str = "") -> str:
    """compare.md: the figures, then a table of the prompts and one of the held-out rows. name, about: of the run."""
    lines = [f"# {escaped(_title(name))}", "", *([escaped(about), ""] if about else [])]
    for value, what, *meant in summary(comparison):
        lines.append(f"- **{value}** {what}" + "".join(f" <sub>({more})</sub>" for more in meant))
    if comparison.prompts:
        lines += ["", f"## {PROMPTS}", "", "| prompt | base | tuned |", "|---|---|---|"]
        lines += [_line(p.question.text, _told(p, p.base), _told(p, p.tuned)) for p in comparison.prompts]
    if comparison.held_out:
        lines += ["", f"## {HELD_OUT}", "", "| row | prompt | its answer | base | tuned |", "|---|---|---|---|---|"]
        for pair in flips_first(comparison.held_out):
            question = pair.question
            cells = (question.origin, question.text, question.reference or "")
            lines.append(_line(*cells, _told(pair, pair.base), _told(pair, pair.tuned)))
    return "\n".join(lines) + "\n"


def _mark(pair: Pair, reply: Reply) -> str:
    if pair.question.reference is None:
        return ""
    return "✓ " if pair.question.right(reply) else "✗ "


def _told(pair: Pair, reply: Reply) -> str:
    return _mark(pair, reply) + (reply.text.strip() or NOTHING) + ("" if reply.stopped else f" [{NO_STOP}]")


def _line(*cells: str) -> str:
    return "| " + " | ".join(map(escaped, cells)) + " |"


def escaped(text: str) -> str:
    """A text as a cell: nothing in it is Markdown or HTML, and it stays on one line."""
    text = re.sub(r"([\\`*_\[\]<>|~#&$])", r"\\\1", visible(text.strip()))
    return text.replace("\n", "<br>")


# -- the page --------------------------------------------------------------------------------------------------------


def compare_html(comparison: Comparison, *, name: str = "", about: str = "") -> str:
    """compare.html: the figures, the prompts, every held-out row; words that the base did not write are marked.

    name: the run's. about: a line on its model and adapter, as `report.about` gives it.
    """
    parts: list[str] = [figures(summary(comparison))]
    if comparison.prompts:
        parts += [tag("h2", PROMPTS), side_table(comparison.prompts)]
    if comparison.held_out:
        parts += [tag("h2", HELD_OUT), side_table(flips_first(comparison.held_out))]
    note = "Held-out rows are answered greedily. What the tuned model wrote and the base did not is marked."
    return page(_title(name), join([about, tag("br"), note]) if about else note, *parts, style=STYLE)


def _title(name: str) -> str:
    return f"{name}: base and tuned" if name else TITLE


def side_table(pairs: Sequence[Pair]) -> Html:
    """Prompt, base and tuned in three columns; it needs `STYLE`."""
    rows = [(_asked(p.question), _answer(p, p.base), _answer(p, p.tuned, since=p.base)) for p in pairs]
    return table(["prompt", "base", "tuned"], rows, class_="sides")


def _asked(question: Question) -> Html:
    parts: list[str] = [question.text]
    if question.reference is not None:
        parts += [tag("div", f"= {question.reference}", class_="soft"), tag("div", question.origin, class_="soft ids")]
    return join(parts)


def _answer(pair: Pair, reply: Reply, since: Reply | None = None) -> Html:
    parts: list[str] = []
    if pair.question.reference is not None:
        right = pair.question.right(reply)
        parts.append(tag("span", "✓ " if right else "✗ ", class_="right" if right else "wrong"))
    parts.append(marked(reply.text, None if since is None else since.text))
    if not reply.stopped:
        parts.append(tag("div", f"{NO_STOP}: {len(reply.ids):,} tokens", class_="soft"))
    return join(parts)


def marked(text: str, since: str | None = None) -> Html:
    """An answer, with the words marked that an earlier one does not have."""
    said = text.strip()
    if not said:
        return tag("span", NOTHING, class_="soft")
    return join(
        [said] if since is None else [tag("mark", part) if new else part for part, new in new_words(since, said)]
    )


def new_words(before: str, after: str) -> list[tuple[str, bool]]:
    """`after` in stretches, each with whether it is new against `before`; word by word, Chinese by characters.

    A single character that stayed between new ones is new as well: that a text has it, too, is mere chance.
    """
    old, words = WORD.findall(before), WORD.findall(after)
    found = SequenceMatcher(None, old, words, autojunk=len(words) > POPULAR).get_opcodes()
    stretches = _merged(("".join(words[start:stop]), kind != "equal") for kind, _, _, start, stop in found)
    joined = stretches[:1]
    for i, (text, new) in enumerate(stretches[1:], start=2):
        if not new and i < len(stretches):
            new = len(LETTER.findall(text)) < 2
        elif not new and (alone := LONE.fullmatch(text)):
            joined.append((alone[1], True))
            text = alone[2]
        joined.append((text, new))
    return _merged(joined)


def _merged(stretches: Iterable[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Those of one kind that follow each other as one; none is empty."""
    kinds = groupby((stretch for stretch in stretches if stretch[0]), key=itemgetter(1))
    return [("".join(text for text, _ in same), new) for new, same in kinds]
