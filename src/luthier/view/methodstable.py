"""The methods on the terminal: the table of all, one of them on a screen; and as facts for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.matrix import COLUMNS, FAMILIES, FORMATS, result, verdict
from luthier.methods import METHODS, Method

KEYS = (
    *("r", "alpha", "dropout", "bias", "target", "modules_to_save"),
    *("virtual_tokens", "init", "placement", "size", "layers"),
)
"""The keys of `method` beside kind, as the recipe has them: sections.py is 0.1 s of pydantic."""
SHORT = {"packed": "pack", "checkpointing": "ckpt", "merge": "mrg", "resume": "res"}
RATES = "Rates: AdamW's for 7 billion weights; rms: of the embeddings' root mean square"
SCALES = {
    "width": "for a model of 7 billion weights, more for a narrower one",
    "size": "of the model's embeddings",
    "none": "for a model of any width",
}
"""What a rate goes by, as `Method.scale` names it; training/optim.py computes it."""
BETWEEN, APART = " ", "  "
BLOCK = len(BETWEEN.join(SHORT.values()))  # characters of a format's columns
TRIED = "Defaults tried here"
GUESSED = "Through PEFT, with its own settings: the rate is a first guess"
SOFT, BOLD, GOOD, BAD = "bright_black", "bold", "green", "yellow"
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
LEGEND = "pack: packed rows · ckpt: activation checkpointing · mrg: luthier merge · res: train --resume"


def facts(method: Method) -> dict[str, Any]:
    """A method as its JSON line; `matrix` has by format, family and column null for yes, or the reason."""
    cells = {
        words: {
            family: {column: why or None for column, why in verdict(method.kind, family, held).items()}
            for family in FAMILIES
        }
        for held, words in FORMATS.items()
    }
    return {
        "kind": method.kind,
        "title": method.title,
        "tuned": method.tuned,
        "rate": method.rate,
        "scale": method.scale,
        "why": method.why,
        "keys": keys(method),
        "result": result(method.kind),
        "merges": method.merges,
        "reason": method.reason or None,
        "matrix": cells,
    }


def keys(method: Method) -> list[str]:
    """The recipe's keys that a method takes, in the recipe's order."""
    return [key for key in KEYS if key in method.fields]


def rate(method: Method) -> str:
    """2e-4, or 1 rms: a share of the embeddings' root mean square."""
    if method.scale == "size":
        return f"{method.rate:g} rms"
    digits, _, power = f"{method.rate:e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


class Notes:
    """Reasons for no, each with a number, in the order in which they are met."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[str]] = {}

    def number(self, reason: str, kind: str) -> str:
        kinds = self.kinds.setdefault(reason, [])
        if kind not in kinds:
            kinds.append(kind)
        return str([*self.kinds].index(reason) + 1)

    def lines(self, *, named: bool) -> list[tuple[str, str]]:
        """(number, "loha, lokr: reason"), or the reason alone."""
        return [
            (str(number), f"{', '.join(kinds)}: {reason}" if named else reason)
            for number, (reason, kinds) in enumerate(self.kinds.items(), 1)
        ]


def cells(kind: str, families: Sequence[str], notes: Notes) -> list[tuple[str, str]]:
    """(yes, no or how many of the families, the numbers of the reasons) by formats × columns."""
    found = []
    for held in FORMATS:
        verdicts = [verdict(kind, family, held) for family in families]
        for column in COLUMNS:
            reasons = [one[column] for one in verdicts if one[column]]
            works = len(families) - len(reasons)
            words = "no" if not works else "yes" if not reasons else f"{works}/{len(families)}"
            numbers = dict.fromkeys(notes.number(reason, kind) for reason in reasons)
            found.append((words, ",".join(numbers)))
    return found


# -- the terminal ----------------------------------------------------------------------------------------------------


def show_methods(console: Console) -> None:
    """A line a method, those with settings of PEFT's own last; below it the reasons, each once."""
    notes = Notes()
    kinds, titles = max(map(len, METHODS)), max(len(method.title) for method in METHODS.values())
    rates = max(len(rate(method)) for method in METHODS.values())
    lead, blocks = kinds + 2 + rates, (BLOCK + len(APART)) * len(FORMATS)
    titled = lead + titles + 2 + blocks <= console.width  # not on 80 columns
    _print_head(console, lead + (titles + 2 if titled else 0))
    for tuned, heading in ((True, TRIED), (False, GUESSED)):
        console.print(Text(heading, BOLD))
        for method in (method for method in METHODS.values() if method.tuned == tuned):
            names = [method.kind.ljust(kinds), *([method.title.ljust(titles)] if titled else [])]
            line = Text("  ".join([*names, rate(method).rjust(rates)]))
            console.print(_line(line, cells(method.kind, list(FAMILIES), notes)))
    console.print()
    _print_notes(notes, console, named=True)
    console.print(Text(f"Each is for all of {len(FAMILIES)} families: {', '.join(FAMILIES)}.", SOFT))
    console.print(Text(f"{LEGEND}.", SOFT))
    console.print(Text(f"{RATES}.", SOFT))
    console.print(Text("One method by family, with its keys: luthier methods KIND", SOFT))


def show_method(method: Method, console: Console) -> None:
    """One method: what it is and leaves behind, its rate, its keys, and its cells by family."""
    console.print(Text.assemble((method.title, BOLD), f"  method.kind: {method.kind}"))
    console.print(Text(TRIED if method.tuned else GUESSED, SOFT))
    console.print()
    taken = ", ".join(f"method.{key}" for key in keys(method))
    merging = f"no: {method.reason}" if method.reason else "yes: luthier merge RUN -o DIR"
    about = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    about.add_column(style=SOFT, no_wrap=True)
    about.add_column(overflow="fold")
    about.add_row("rate", Text(f"{rate(method)} {SCALES[method.scale]}: {method.why}"))
    about.add_row("keys", Text(taken or "none beside method.kind"))
    about.add_row("result", Text(result(method.kind)))
    about.add_row("merge", Text(merging))
    console.print(about)
    console.print()
    notes, width = Notes(), max(map(len, FAMILIES))
    _print_head(console, width)
    for family in FAMILIES:
        console.print(_line(Text(family.ljust(width)), cells(method.kind, [family], notes)))
    console.print()
    _print_notes(notes, console, named=False)
    console.print(Text(f"{LEGEND}.", SOFT))


def _print_head(console: Console, lead: int) -> None:
    """Two lines: the formats, and under each of them its columns. lead: characters before the first."""
    formats = APART.join(words.ljust(BLOCK) for words in FORMATS.values())
    columns = APART.join([BETWEEN.join(SHORT.values())] * len(FORMATS))
    for line in (formats, columns):
        console.print(Text(f"{' ' * lead}{APART}{line}".rstrip(), SOFT))


def _line(lead: Text, found: Sequence[tuple[str, str]]) -> Text:
    """`lead` and behind it the cells, each below its column."""
    line, widths = lead.copy(), [len(short) for short in SHORT.values()]
    for place, (words, numbers) in enumerate(found):
        cell = Text.assemble((words, GOOD if words == "yes" else BAD), (numbers.translate(RAISED), SOFT))
        cell.pad_right(max(0, widths[place % len(widths)] - len(cell)))
        line.append(BETWEEN if place % len(widths) else APART).append_text(cell)
    line.rstrip()
    return line


def _print_notes(notes: Notes, console: Console, *, named: bool) -> None:
    """The reasons, behind their numbers."""
    if not notes.kinds:
        return
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
    grid.add_column(no_wrap=True, style=SOFT)
    grid.add_column(overflow="fold")
    for number, line in notes.lines(named=named):
        grid.add_row(number.translate(RAISED), Text(line))
    console.print(grid)
    console.print()
