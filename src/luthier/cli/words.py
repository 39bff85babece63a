"""What every verb's command line has: its words, and how a line is said."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.training.launch import rank
from luthier.words import broken

GONE = {errno.EIO, errno.EPIPE}
"""What the system calls a terminal that was closed, and a pipe whose reader has ended."""

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as runs/NAME.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="A key of the recipe with another value, as train.lr=1e-4."),
]


def say(line: str) -> None:
    """A line for the screen, at once; of several processes (under torchrun) the first one's alone."""
    if rank() != 0:
        return
    try:
        print(broken(line, shutil.get_terminal_size().columns) if sys.stdout.isatty() else line, flush=True)
    except OSError as error:
        if error.errno not in GONE:
            raise
        # Nobody reads on. A closed terminal sends SIGHUP as well, which stops a run after its step; a pipe that is
        # closed (`| head`) is no reason to lose one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def aside(line: str) -> None:
    """A line that is no part of the verb's output."""
    print(line, file=sys.stderr, flush=True)


def say_next(*commands: str) -> None:
    """What to do next, a command a line."""
    for number, command in enumerate(commands):
        say(f"{'     ' if number else 'next:'} {command}")


@contextmanager
def at_once() -> Iterator[None]:
    """Ctrl-C in a verb that writes at its end alone: one line, then exit 130. Who has written something says it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        aside(f"interrupted; {str(stop) or 'nothing was written'}")
        raise


@contextmanager
def screen() -> Iterator[dict[str, Any]]:
    """How a run is shown while it trains, as `train` takes it: a panel where the terminal can draw one, else lines."""
    from rich.console import Console

    from luthier.view.panel import is_live, live

    console = Console()
    if rank() != 0 or not is_live(console):
        yield {"say": say}
        return
    with live(console, say) as panel:
        yield {"say": panel.say, "watch": panel.watch}
