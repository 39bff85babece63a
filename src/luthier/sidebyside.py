"""A comparison for people: base and tuned side by side on the terminal, in Markdown and as a self-contained page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.compare import Comparison, Pair, Question
from luthier.generate import Reply
from luthier.html import Html, figures, join, page, table, tag, visible

ON_SCREEN = 10  # held-out rows on the terminal, flips first; the page has them all
LONG = 300  # characters of an answer on the terminal
GOOD, BAD, SOFT = "green", "red", "bright_black"
HAN = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Chinese and Japanese: no blanks between words
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+|\s+|.", re.S)
TITLE, PROMPTS, HELD_OUT = "Base and tuned on the same prompts", "The recipe's prompts", "Held-out rows"
NOTHING, NO_STOP = "(nothing)", "did not stop"
STYLE = """
.sides { table-layout: fixed; min-width: 40rem }
.right { color: var(--good) } .wrong { color: var(--bad) }
.sides td { padding-right: 1.25rem }
"""


def summary(comparison: Comparison) -> list[tuple[str, str]]:
    """The figures as (value, name), values as "base → tuned" where both have one."""
    found = comparison.figures()
    base, tuned, held = found["base"], found["tuned"], found["held_out"]
    rows = [
        (_percent(base["stopped_share"], tuned["stopped_share"]), "of the answers stopped by themselves"),
        (f"{base['mean_tokens']:,.0f} → {tuned['mean_tokens']:,.0f}", "tokens in an answer, on average"),
        (f"{comparison.logit_difference:.3g}", "largest difference of a logit"),
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
    """Rows in the order of interest: right before and wrong now, then the reverse, then both wrong, then both right."""
    return sorted(pairs, key=lambda pair: (pair.flip != -1, pair.flip != 1, pair.question.right(pair.tuned)))


# -- the terminal ----------------------------------------------------------------------------------------------------


def show(comparison: Comparison, console: Console) -> None:
    """Print it: the recipe's prompts, the most telling held-out rows, the figures."""
    held = flips_first(comparison.held_out)
    for title, pairs in ((PROMPTS, comparison.prompts), (HELD_OUT, held[:ON_SCREEN])):
        if pairs:
            console.print(_table(title, pairs))
    if len(held) > ON_SCREEN:
        console.print(Text(f"… and {len(held) - ON_SCREEN:,} more held-out rows in compare.html", SOFT))
    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column(justify="right", no_wrap=True)
    for value, name in summary(comparison):
        grid.add_row(Text(value, "bold"), name)
    console.print()
    console.print(grid)


def _table(title: str, pairs: Sequence[Pair]) -> Table:
    grid = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_lines=True,
        border_style=SOFT,
        header_style="bold",
        expand=True,
    )
    for name in ("prompt", "base", "tuned"):
        grid.add_column(name, ratio=1, overflow="fold")
    for pair in pairs:
        grid.add_row(_question(pair.question), _cell(pair, pair.base), _cell(pair, pair.tuned))
    return grid


def _question(question: Question) -> Text:
    text = Text(_short(question.text))
    if question.reference is not None:
        text.append(f"\n= {_short(question.reference)}", SOFT)
    return text


def _cell(pair: Pair, reply: Reply) -> Text:
    text = Text()
    if pair.question.reference is not None:
        text.append(*(("✓ ", GOOD) if pair.question.right(reply) else ("✗ ", BAD)))
    text.append(_short(reply.text) or NOTHING)
    return text if reply.stopped else text.append(f"\n[{NO_STOP}: {len(reply.ids):,} tokens]", SOFT)


def _short(text: str) -> str:
    text = visible(text.strip())
    return text if len(text) <= LONG else f"{text[:LONG]}… (+{len(text) - LONG:,} characters)"


# -- Markdown --------------------------------------------------------------------------------------------------------


def markdown(comparison: Comparison) -> str:
    """compare.md: the figures, then a table of the prompts and one of the held-out rows."""
    lines = [f"# {TITLE}", "", *(f"- **{value}** {name}" for value, name in summary(comparison))]
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


def _told(pair: Pair, reply: Reply) -> str:
    mark = "" if pair.question.reference is None else "✓ " if pair.question.right(reply) else "✗ "
    return mark + (reply.text.strip() or NOTHING) + ("" if reply.stopped else f" [{NO_STOP}]")


def _line(*cells: str) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """A text as a cell: nothing in it is Markdown or HTML, and it stays on one line."""
    text = re.sub(r"([\\`*_\[\]<>|~#&$])", r"\\\1", visible(text.strip()))
    return text.replace("\n", "<br>")


# -- the page --------------------------------------------------------------------------------------------------------


def compare_html(comparison: Comparison) -> str:
    """compare.html: the figures, the prompts, every held-out row; words that the base did not write are marked."""
    parts: list[str] = [figures(summary(comparison))]
    if comparison.prompts:
        parts += [tag("h2", PROMPTS), _side_table(comparison.prompts)]
    if comparison.held_out:
        parts += [tag("h2", HELD_OUT), _side_table(flips_first(comparison.held_out))]
    note = "Held-out rows are answered greedily. What the tuned model wrote and the base did not is marked."
    return page(TITLE, note, *parts, style=STYLE)


def _side_table(pairs: Sequence[Pair]) -> Html:
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
    said = reply.text.strip()
    parts += [said] if since is None else [tag("mark", p) if new else p for p, new in new_words(since.text, said)]
    if not said:
        parts.append(tag("span", NOTHING, class_="soft"))
    if not reply.stopped:
        parts.append(tag("div", f"{NO_STOP}: {len(reply.ids):,} tokens", class_="soft"))
    return join(parts)


def new_words(before: str, after: str) -> list[tuple[str, bool]]:
    """`after` in stretches, each with whether it is new against `before`; word by word, Chinese by characters."""
    old, words = WORD.findall(before), WORD.findall(after)
    stretches: list[tuple[str, bool]] = []
    for kind, _, _, start, stop in SequenceMatcher(None, old, words).get_opcodes():
        text, new = "".join(words[start:stop]), kind != "equal"
        if len(stretches) > 1 and new and stretches[-1][0].isspace():  # new, blank, new: one stretch
            blank, (earlier, _) = stretches.pop()[0], stretches.pop()
            text = earlier + blank + text
        if text:
            stretches.append((text, new))
    return stretches
