"""A comparison for people: base and tuned side by side on the terminal, in Markdown and as a self-contained page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.compare import Comparison, Pair, Question
from luthier.generate import Reply
from luthier.html import Html, figures, join, page, table, tag, visible

ON_SCREEN = 10  # held-out rows on the terminal, flips first; the page has them all
LONG = 400  # characters of an answer on the terminal
GOOD, BAD, SOFT = "green", "red", "bright_black"
HAN = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Chinese and Japanese: no blanks between words
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+|\s+|.", re.S)
TITLE = "Base and tuned on the same prompts"
STYLE = """
.sides { table-layout: fixed; min-width: 40rem }
.right { color: var(--good) } .wrong { color: var(--bad) }
.sides td { padding-right: 1.25rem }
"""


def summary(comparison: Comparison) -> list[tuple[str, str]]:
    """The figures as (value, name), values as "base → tuned" where both have one."""
    found = comparison.figures()
    base, tuned, held = found["base"], found["tuned"], found["held_out"]
    exact = [
        (f"{base['exact_share']:.0%} → {tuned['exact_share']:.0%}", f"of {held:,} held-out rows answered exactly"),
        (f"{found['wrong_to_right']:,}", "rows wrong before, right now"),
        (f"{found['right_to_wrong']:,}", "rows right before, wrong now"),
    ]
    both = [
        (f"{base['stopped_share']:.0%} → {tuned['stopped_share']:.0%}", "of the answers stopped by themselves"),
        (f"{base['mean_tokens']:,.0f} → {tuned['mean_tokens']:,.0f}", "tokens in an answer, on average"),
        (f"{comparison.logit_difference:.3g}", "largest difference of a logit"),
    ]
    return [(value.replace("%", " %"), name) for value, name in [*(exact if held else []), *both]]


def flips_first(pairs: Sequence[Pair]) -> list[Pair]:
    """Rows in the order of interest: right before and wrong now, then the reverse, then both wrong, then both right."""
    return sorted(pairs, key=lambda pair: (pair.flip != -1, pair.flip != 1, pair.question.right(pair.tuned)))


# -- the terminal ----------------------------------------------------------------------------------------------------


def show(comparison: Comparison, console: Console) -> None:
    """Print it: the recipe's prompts, the most telling held-out rows, the figures."""
    held = flips_first(comparison.held_out)
    for pairs in (comparison.prompts, held[:ON_SCREEN]):
        if pairs:
            console.print(_table(pairs))
    if len(held) > ON_SCREEN:
        console.print(Text(f"… and {len(held) - ON_SCREEN:,} more held-out rows in compare.html", SOFT))
    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column(justify="right", no_wrap=True)
    for value, name in summary(comparison):
        grid.add_row(Text(value, "bold"), name)
    console.print()
    console.print(grid)


def _table(pairs: Sequence[Pair]) -> Table:
    grid = Table(show_lines=True, border_style=SOFT, header_style="bold", expand=True)
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
    text.append(_short(reply.text) or "(nothing)")
    return text if reply.stopped else text.append(f"\n[did not stop: {len(reply.ids):,} tokens]", SOFT)


def _short(text: str) -> str:
    text = visible(text.strip())
    return text if len(text) <= LONG else f"{text[:LONG]}… (+{len(text) - LONG:,} characters)"


# -- Markdown --------------------------------------------------------------------------------------------------------


def markdown(comparison: Comparison) -> str:
    """compare.md: the figures, then a table of the prompts and one of the held-out rows."""
    lines = [f"# {TITLE}", "", *(f"- **{value}** {name}" for value, name in summary(comparison))]
    if comparison.prompts:
        lines += ["", "## The recipe's prompts", "", "| prompt | base | tuned |", "|---|---|---|"]
        lines += [_line(p.question.text, _told(p, p.base), _told(p, p.tuned)) for p in comparison.prompts]
    if comparison.held_out:
        lines += ["", "## Held-out rows", "", "| row | prompt | its answer | base | tuned |", "|---|---|---|---|---|"]
        for pair in flips_first(comparison.held_out):
            question = pair.question
            cells = (question.origin, question.text, question.reference or "")
            lines.append(_line(*cells, _told(pair, pair.base), _told(pair, pair.tuned)))
    return "\n".join(lines) + "\n"


def _told(pair: Pair, reply: Reply) -> str:
    mark = "" if pair.question.reference is None else "✓ " if pair.question.right(reply) else "✗ "
    return mark + reply.text.strip() + ("" if reply.stopped else " […]")


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
        parts += [tag("h2", "The recipe's prompts"), _side_table(comparison.prompts)]
    if comparison.held_out:
        parts += [tag("h2", "Held-out rows"), _side_table(flips_first(comparison.held_out))]
    note = "Greedy answers where the recipe does not sample; what the base did not write is marked."
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
        parts.append(tag("span", "(nothing)", class_="soft"))
    if not reply.stopped:
        parts.append(tag("div", f"did not stop: {len(reply.ids):,} tokens", class_="soft"))
    return join(parts)


def new_words(before: str, after: str) -> Iterator[tuple[str, bool]]:
    """`after` in stretches, each with whether it is new against `before`; word by word, Chinese by characters."""
    old, words = WORD.findall(before.strip()), WORD.findall(after)
    for kind, _, _, start, stop in SequenceMatcher(None, old, words).get_opcodes():
        if start < stop:
            yield "".join(words[start:stop]), kind != "equal"
