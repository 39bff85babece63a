"""`luthier runs …`: one thin function a verb."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from luthier.errors import RecipeError, RunError
from luthier.words import quoted

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.history import History


class Verb(TyperCommand):
    """A verb whose usage has the arguments' names as they are: RUN, where typer writes {RUN} for what has to be."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.translate({ord("{"): None, ord("}"): None}) for piece in super().collect_usage_pieces(ctx)]


class Verbs(TyperGroup):
    """The verbs of `luthier runs`. The name of a run is none, but the next best thing."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        run = None
        if args[0] not in self.commands:
            from luthier.runs import find_run

            with suppress(RecipeError):
                run = quoted(find_run(args[0]).shown)
            if run:
                raise RecipeError(f"{args[0]} is a run, no command; try: luthier runs show {run}")
        return super().resolve_command(ctx, args)


runs_app = typer.Typer(cls=Verbs, help="Runs: list, show, watch, stop, compare, clean.")

Json = Annotated[bool, typer.Option("--json", help="A JSON line a run.")]
Name = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name alone.")]
PIPED = 80
"""Characters of a line where there is no terminal to tell its width."""
UNCUT = 1000
"""The same for the list, where a line is a run and nothing is cut."""


@runs_app.callback(invoke_without_command=True)
def runs(context: typer.Context, as_json: Json = False) -> None:
    """The runs below ./runs, newest first.

    What each is at, its last loss, its best eval loss, the time since its last sign, and what it holds on the disk.
    """
    if context.invoked_subcommand is None:
        list_runs(as_json)


@runs_app.command("list", cls=Verb)
def list_runs(as_json: Json = False) -> None:
    """The same as `luthier runs` alone."""
    from luthier.runs import ROOT, all_runs, glance, silent_for

    histories = sorted((glance(folder) for folder in all_runs()), key=silent_for)
    if as_json:
        from luthier.view.runsview import facts

        for history in histories:
            print(json.dumps(facts(history), ensure_ascii=False))
    elif histories:
        from luthier.view.runsview import show_list

        _print(lambda console: show_list(histories, console), UNCUT)
    else:
        print(f"no runs below {ROOT.absolute()}; begin one with: luthier train RECIPE, or luthier quickstart")


@runs_app.command(cls=Verb)
def show(run: Name) -> None:
    """One run on a screen.

    Its recipe, progress, losses, samples and files, and what to do next.
    """
    from luthier.history import read_history
    from luthier.runs import find_run
    from luthier.view.runsview import show_run

    history = read_history(find_run(run))
    _print(lambda console: show_run(history, console))


@runs_app.command(cls=Verb)
def watch(run: Name) -> None:
    """Follow a run that trains elsewhere.

    As its own terminal shows it. Ctrl-C leaves the run alone.
    """
    from rich.console import Console

    from luthier.runs import find_run, has_ended
    from luthier.view.panel import watch as follow

    folder = find_run(run)
    history = follow(folder, Console(highlight=False))
    if history.state == "running":
        print(f"{folder.shown} goes on by itself; back to it with: luthier runs watch {quoted(folder.shown)}")
    else:
        print(f"{folder.shown}: {has_ended(history)}")


@runs_app.command(cls=Verb)
def stop(
    run: Name,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Ask it to stop, and leave it to that.")] = False,
) -> None:
    """Stop a run, so that it can go on later.

    It finishes its step and writes a checkpoint.
    """
    from rich.console import Console

    from luthier.runs import ask_to_stop, find_run, goes_on, has_ended, wait_for_end

    folder = find_run(run)
    ask_to_stop(folder)
    print(f"{folder.shown}: asked to stop; it finishes its step and saves", flush=True)
    began = time.monotonic()
    try:
        with Console(highlight=False).status("") as line:

            def tell(history: History) -> None:
                phase = history.status.get("phase", "")
                line.update(f"step {history.step}, {phase} · {time.monotonic() - began:.0f} s")

            history = wait_for_end(folder, tell, until_heard=no_wait)
    except KeyboardInterrupt:
        print(f"\nnot waited for: {folder.shown} stops by itself; see luthier runs show {quoted(folder.shown)}")
        return
    if history.state == "failed":
        raise RunError(f"{folder.shown} failed while it stopped: {history.status['message']}; {goes_on(history)}")
    if history.state != "running":
        print(f"{folder.shown}: {has_ended(history)}")


@runs_app.command(cls=Verb)
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders, or their names.")],
    html: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("runs-compare.html"),
) -> None:
    """Runs side by side, also as a page.

    Their final figures, their curves, and what their recipes say differently.
    """
    from luthier.folder import write_atomic
    from luthier.history import read_history
    from luthier.runs import find_run
    from luthier.view.runscompare import LETTERS, compare_html, show_compared

    folders = [find_run(run) for run in runs]
    if not 2 <= len(set(folders)) <= len(LETTERS):
        raise RecipeError(f"runs compare: give two runs at least, {len(LETTERS)} at most")
    if not html.parent.is_dir():
        raise RecipeError(f"--html {html}: there is no folder {html.parent}")
    histories = [read_history(folder) for folder in dict.fromkeys(folders)]
    _print(lambda console: show_compared(histories, console))
    write_atomic(html, compare_html(histories))
    print(f"page: {html}")


@runs_app.command(cls=Verb)
def clean(
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN", help="These runs only.")] = None,
    dead: Annotated[
        bool, typer.Option("--dead", help="Also runs that broke off before they had a checkpoint or an adapter.")
    ] = False,
    whole: Annotated[bool, typer.Option("--all", help="Remove the named runs, whatever they hold.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Free space: checkpoints of runs that are done.

    Their results stay. It says what would go and how much, and asks. Runs that train are left alone, and checkpoints
    that a run can go on from.

    Example: luthier runs clean --all town-2
    """
    from luthier.runs import all_runs, find_run, leftovers, removal, remove, sweep, why_kept
    from luthier.view.runsview import show_removals
    from luthier.words import size

    if whole and not runs:
        raise RecipeError("runs clean --all removes whole runs: name them")
    folders = [find_run(run) for run in runs] if runs else all_runs()
    planned = [found for folder in folders if (found := removal(folder, dead=dead, whole=whole))]
    rest = [] if runs else leftovers()
    chosen = {one.folder for one in planned}
    kept = [f"{folder.shown} stays: {why_kept(folder)}" for folder in folders if runs and folder not in chosen]
    _print(lambda console: show_removals(planned, rest, kept, console))
    if not planned and not rest:
        return
    if not yes and not _agreed():
        print("nothing removed")
        return
    freed, left = sum(map(sweep, rest)), list[str]()
    for one in planned:
        try:
            freed += remove(one, dead=dead, whole=whole)
        except RunError as error:
            left.append(str(error))
    print(f"{size(freed)} freed")
    if left:
        raise RunError("\n".join(left))


def _print(show: Callable[[Console], None], piped: int = PIPED) -> None:
    """What `show` prints. Without a terminal in lines of `piped` characters at most, and no blanks at their ends."""
    from rich.console import Console

    if sys.stdout.isatty():
        show(Console(highlight=False))
        return
    console = Console(highlight=False, width=piped)
    with console.capture() as captured:
        show(console)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise RecipeError("nothing removed: there is no terminal to ask on; add --yes")
    try:
        return input("Remove? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
