"""What is done with a run's result: compared, merged, exported, reported; one thin function a verb."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.words import RunPath, say, say_next
from luthier.errors import RecipeError
from luthier.methods import METHODS
from luthier.words import quoted


class Layout(StrEnum):
    """In which an adapter is exported."""

    VENDOR = "vendor"


def compare(
    run: RunPath,
    rows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Held-out rows to answer, beside the recipe's prompts: 128, or with --strength 64.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        bool, typer.Option("--strength", help="The adapter at 0, 1/4, 1/2, 3/4, 1 and 1 1/4 of its strength.")
    ] = False,
    text: Annotated[
        Path | None, typer.Option(help="With --strength: general text of your own, to measure forgetting by.")
    ] = None,
) -> None:
    """Ask base and tuned the same prompts.

    The recipe's prompts and held-out rows; a table, compare.md, compare.html and compare.json. With --strength what the
    task gains and general text loses as the adapter is scaled, without training: strength.md, .html and .json.
    """
    from luthier import verbs
    from luthier.run import open_run
    from luthier.runs import find_run

    opened = open_run(find_run(str(run)).path)
    name, more = quoted(opened.folder.shown), ""
    if strength:
        least = verbs.strengths(opened, rows=rows, text=text, say=say).best
        more = "" if least is None else f" --strength {least:g}"
    elif text is not None:
        raise RecipeError("--text goes with --strength: it measures what is forgotten")
    else:
        verbs.compare(opened, rows=128 if rows is None else rows, say=say)
    merges = METHODS[opened.recipe.method.kind].merges
    say_next(f"luthier merge {name}{more} -o DIR" if merges else f"luthier chat {name}")


def merge(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the merged model.")],
    strength: Annotated[
        str, typer.Option(metavar="NUMBER", help="How much of the adapter: 1 is all of it, 0.7 forgets less.")
    ] = "1",
) -> None:
    """Base + adapter → one model folder, verified."""
    from luthier import verbs
    from luthier.run import open_run
    from luthier.runs import find_run

    verbs.merge(open_run(find_run(str(run)).path), out, strength=strength, say=say)
    say_next(f'luthier generate {quoted(out)} --prompt "…"', f"luthier chat {quoted(out)}")


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the adapter.")],
    _layout: Annotated[Layout, typer.Option("--layout", help="Whose layers it fits.")] = Layout.VENDOR,
) -> None:
    """A run's adapter for the vendor's own layers.

    ChatGLM3's query_key_value is three layers here; every other family's adapter fits as it is.
    """
    from luthier import verbs
    from luthier.run import open_run
    from luthier.runs import find_run

    verbs.export(open_run(find_run(str(run)).path), out, say=say)


def report(run: RunPath) -> None:
    """Write report.html: a run on one page.

    A run writes it when it ends, a comparison and a merge write it again; this one at any time.
    """
    from luthier.runs import find_run
    from luthier.view.report import write_report

    say(f"page: {write_report(find_run(str(run)))}")
