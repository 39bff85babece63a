"""What is done with a run's result: compared, merged, exported, reported; one thin function a verb."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.words import RunPath, at_once, say, say_next, screen
from luthier.errors import RecipeError
from luthier.methods import METHODS
from luthier.words import quoted


class Layout(StrEnum):
    """In which an adapter is exported."""

    VENDOR = "vendor"


def compare(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, as runs/NAME; with --methods a recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="With --methods: a key of the recipe with another value."),
    ] = None,
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
    methods: Annotated[
        str | None,
        typer.Option(metavar="KIND,KIND…", help="Train these methods of a recipe side by side (`luthier methods`)."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="With --methods: how often each is trained: 2.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="With --strength or --methods: general text of your own, to measure forgetting by."),
    ] = None,
) -> None:
    """Ask base and tuned the same prompts.

    The recipe's prompts and held-out rows; a table, compare.md, compare.html and compare.json. With --strength what the
    task gains and general text loses as the adapter is scaled, without training: strength.md, .html and .json. With
    --methods each method is trained on the recipe's rows, with two seeds: methods.md, .html and .json.
    """
    if strength and methods is not None:
        raise RecipeError("--strength is of a run, --methods of a recipe: take one of them")
    if methods is not None:
        _bake_off(run, methods, overrides or [], seeds, rows, text)
        return
    if overrides or seeds is not None:
        given = overrides[0] if overrides else "--seeds"
        raise RecipeError(f"{given} goes with --methods, which trains; a run is compared as it was trained")
    with at_once():
        _compared(run, strength, rows, text)


def _compared(run: str, strength: bool, rows: int | None, text: Path | None) -> None:
    from luthier import verbs
    from luthier.run import open_run
    from luthier.runs import find_run

    opened = open_run(find_run(run).path)
    name, more = quoted(opened.folder.shown), ""
    if strength:
        least = verbs.strengths(opened, rows=rows, text=text, say=say).best
        more = "" if least is None else f" --strength {least:g}"
    elif text is not None:
        raise RecipeError("--text goes with --strength or --methods: it measures what is forgotten")
    else:
        verbs.compare(opened, rows=128 if rows is None else rows, say=say)
    merges = METHODS[opened.recipe.method.kind].merges
    say_next(f"luthier merge {name}{more} -o DIR" if merges else f"luthier chat {name}")


def _bake_off(
    recipe: str, methods: str, overrides: list[str], seeds: int | None, rows: int | None, text: Path | None
) -> None:
    if rows == 0:
        raise RecipeError("--rows: 1 at least with --methods, which are told apart by held-out rows")
    if sys.stdout.isatty():
        say("loading libraries, data and model …")
    from luthier.quiet import quiet

    quiet()
    from luthier.bakeoff import compare_methods

    given: dict[str, Any] = {
        name: value for name, value in (("seeds", seeds), ("rows", rows), ("text", text)) if value is not None
    }
    command = ["luthier", "compare", "--methods", methods, recipe, *overrides]
    command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    try:
        found = compare_methods(recipe, methods.split(","), overrides, **given, say=say, screen=screen)
    except KeyboardInterrupt:
        say(f"interrupted; go on with: {shlex.join(command)}")
        raise
    if found.figures is None:
        say(f"stopped; go on with: {shlex.join(command)}")
        sys.exit(128 + (found.stopped or 0))
    best = next((one for one in found.figures["methods"] if one["kind"] == found.figures["best"]), None)
    if best is None:
        sys.exit(1)
    name = quoted(Path(best["seeds"][0]["run"]))
    say_next(f"luthier merge {name} -o DIR" if best["mergeable"] else f"luthier chat {name}")


@at_once()
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
