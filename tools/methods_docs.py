"""Write docs/methods.md from the table of methods and the matrix: `.venv/bin/python tools/methods_docs.py`.

What stands between the marks of the bake-off is kept: it is written by hand, from measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from luthier.matrix import COLUMNS, FAMILIES, FORMATS, result
from luthier.methods import METHODS
from luthier.view.methodstable import SCALES, Notes, cells, keys, rate

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- bake-off -->", "<!-- /bake-off -->"

HEAD = """\
# Methods

<!-- Written by tools/methods_docs.py from src/luthier/methods.py and matrix.py. Edit those, then run it. -->

What `method.kind` may be, at which learning rate, with which keys, and what works with what. The same on the screen:
`luthier methods`, and for one of them `luthier methods KIND`; both take `--json`. Every key is described in
[recipe.md](recipe.md).
"""

RATES = """\
The rate is AdamW's where `train.lr` is `auto`, for a step of some dozens of rows; a run takes it to the model at hand,
and prints it with its reason. (rms: the root mean square of the model's embeddings.)
"""

MATRIX = """\
## What works with what

Every cell is tried on a tiny real model of each of these families, in all {count} combinations of method, family and
format: {families}.

{columns}

In each cell the method also trains three steps through the engine, in which the loss falls and every trainable tensor
moves; it is saved, loaded onto a fresh base with the same logits, and answers with the same tokens. (Over a base in
bf16 PiSSA, OLoRA, the norms and whole models train in more digits than what is loaded has: there the logits are the
same to a few roundings of bf16.) `make test` tries a sample in which each method and each family meets each format,
`make test-full` every cell. Packed rows are held
against rows by themselves to 1e-5 of the loss and of every gradient in fp32; activations that are computed again, and a
step behind a checkpoint, to the last bit in every format; a merged model against base and adapter to 1e-4 of a logit.
A merge is into the unquantised base, also of what was trained on a quantised one.
"""


def methods_page(kept: str) -> str:
    """The whole page, as Markdown. kept: what stands between the marks, marks and all."""
    parts = [HEAD]
    for tuned, heading, said in (
        (True, "## Tried here\n", RATES),
        (False, "## Through PEFT\n", "With PEFT's own settings, which a run says; the rates are first guesses.\n"),
    ):
        rows = [_row(kind) for kind, method in METHODS.items() if method.tuned == tuned]
        parts += [heading, said, _table(("kind", "", "rate", "keys beside `kind`", "result"), rows)]
    return "\n".join([*parts, *_matrix(), kept]) + "\n"


def kept_of(page: str) -> str:
    """What a page has between the marks, marks and all; the marks alone where it has none."""
    if BEGIN not in page:
        return f"{BEGIN}\n{END}"
    return BEGIN + page.partition(BEGIN)[2].partition(END)[0] + END


def _row(kind: str) -> tuple[str, ...]:
    method = METHODS[kind]
    taken = ", ".join(f"`{key}`" for key in keys(method))
    return f"`{kind}`", method.title, f"{rate(method)} {SCALES[method.scale]}: {method.why}", taken, result(kind)


def _matrix() -> list[str]:
    """The table of all methods, and the reasons for no."""
    count = len(METHODS) * len(FAMILIES) * len(FORMATS)
    families = ", ".join(f"`{name}` ({words})" for name, words in FAMILIES.items())
    columns = "\n".join(f"- **{column}**: {words}" for column, words in COLUMNS.items())
    notes, rows = Notes(), []
    for kind in METHODS:
        found = cells(kind, list(FAMILIES), notes)
        rows.append((f"`{kind}`", *(f"{words}<sup>{number}</sup>" if number else words for words, number in found)))
    head = ("", *(f"{words}: {column}" for words in FORMATS.values() for column in COLUMNS))
    reasons = "\n".join(f"{number}. {line}" for number, line in notes.lines(named=True))
    return [MATRIX.format(count=count, families=families, columns=columns), _table(head, rows), reasons + "\n"]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(methods_page(kept_of(PAGE.read_text(encoding="utf-8") if PAGE.exists() else "")), encoding="utf-8")
    print(f"{PAGE} written")
