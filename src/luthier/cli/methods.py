"""`luthier methods`: what can be trained, on what, and with what at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.errors import RecipeError
from luthier.methods import METHODS, Method

if TYPE_CHECKING:
    from rich.console import Console

PIPED = 104
"""Characters of a line where there is no terminal to tell its width."""


def methods(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="One of them, as lora.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line a method.")] = False,
) -> None:
    """The methods, and what works with which.

    By number format (fp32/bf16, int8, NF4): packing, checkpointing, merge, resume. One method is shown by family, with
    its learning rate, its keys and what it leaves behind.
    """
    chosen = None if kind is None else _known(kind)
    from luthier.view.methodstable import facts, show_method, show_methods

    if as_json:
        for method in METHODS.values() if chosen is None else (chosen,):
            print(json.dumps(facts(method), ensure_ascii=False))
    elif chosen is None:
        _print(show_methods)
    else:
        _print(lambda console: show_method(chosen, console))


def _known(kind: str) -> Method:
    """Errors: RecipeError with the nearest name."""
    if kind in METHODS:
        return METHODS[kind]
    word = kind.lower().replace("-", "_")
    titles = {method.title.lower(): method.kind for method in METHODS.values()}
    near = get_close_matches(word, [*METHODS, *titles], n=1)
    known = f"did you mean {titles.get(near[0], near[0])}?" if near else f"there are {', '.join(METHODS)}"
    raise RecipeError(f"methods: {kind} is no method; {known}")


def _print(show: Callable[[Console], None]) -> None:
    """What `show` prints; without a terminal in lines of PIPED characters, and no blanks at their ends."""
    from rich.console import Console

    if sys.stdout.isatty():
        show(Console(highlight=False))
        return
    console = Console(highlight=False, width=PIPED)
    with console.capture() as captured:
        show(console)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
