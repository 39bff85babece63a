"""The command line: one thin function a verb. A verb's libraries are imported when it is called."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.methods import methods
from luthier.cli.recipe import recipe_app
from luthier.cli.results import compare, export, merge, report
from luthier.cli.runs import runs_app
from luthier.cli.words import Overrides, Recipe, aside, at_once, say, say_next, screen
from luthier.errors import LuthierError, RecipeError
from luthier.methods import METHODS, whole
from luthier.training.launch import speaks
from luthier.words import quoted

if TYPE_CHECKING:
    from luthier.run import Run

app = typer.Typer(
    name="luthier",
    help="Fits a language model to one task: one recipe from a data file to a tried, compared and merged model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(recipe_app, name="recipe")
app.add_typer(runs_app, name="runs")


def main() -> None:
    """Entry point: a mistake of the user's is one line and exit 2; `--debug` shows the traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # text may hold what a terminal cannot show
    atexit.register(gc.freeze)  # at the end Python looks for garbage in all that torch is made of: a second of nothing
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except LuthierError as error:
        if debug:
            raise
        if speaks(error):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if debug:
            raise
        from luthier.folder import FULL

        full = error.errno in FULL
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: {what}{'; free some space' * full}", file=sys.stderr)
        sys.exit(1 if full else 2)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"luthier {version('luthier')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback (anywhere in the line).")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """For the help alone: main takes --debug out of the line, --version has its callback."""


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="hf:owner/name (the default), modelscope:owner/name, or a folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    data: Annotated[bool, typer.Option("--data", help="It is a data set, not a model.")] = False,
) -> None:
    """Fetch a model (or a data set); print where it lies."""
    from luthier import hub

    if data:
        for file in hub.data_files(name, Path.cwd(), aside):
            say(str(file))
    else:
        say(str(hub.model_path(name, revision, Path.cwd(), aside)))


@app.command()
@at_once()
def look(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many random rows to show.")] = 3,
    seed: Annotated[int, typer.Option(help="Which random rows.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the page here instead of NAME-look.html.")] = None,
) -> None:
    """Show the data as the model will see it.

    Random rows with what is taught, lengths, drops, duplicates, end tokens; also as a page.
    """
    from luthier import verbs

    verbs.look(recipe, overrides or [], rows=rows, seed=seed, html=html, say=say)


@app.command()
@at_once()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    structure: Annotated[bool, typer.Option("--structure", help="Show the model's tree as well.")] = False,
) -> None:
    """What a recipe's run would take.

    Memory by part, steps, tokens, disk, the share that trains; of the model only its configuration is needed.
    """
    from luthier import verbs

    verbs.plan(recipe, overrides or [], structure=structure, say=say)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, or with --resume a run folder.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    no_proof: Annotated[
        bool, typer.Option("--no-proof", help="Do not compare gradients with the reference before step 1.")
    ] = False,
) -> None:
    """Train a recipe into a run folder.

    Checkpoints, metrics and the adapter lie in runs/NAME. Ctrl-C finishes the step and saves.
    """
    if sys.stdout.isatty():
        say("loading libraries, data and model …")  # which takes some seconds
    from luthier.run import train as train_run

    with screen() as shown:
        run = train_run(recipe, overrides or [], resume=resume, proof=not no_proof, **shown)
    _exit_if_stopped(run)
    outcome, folder = run.outcome, run.folder.shown
    assert outcome is not None
    method = METHODS[run.recipe.method.kind]
    say(f"{'model' if whole(method.kind) else 'adapter'}: {outcome.saved}")
    say(f"page: {folder / 'report.html'}")
    name = quoted(folder)
    merging = [f"luthier merge {name} -o DIR"] if method.merges else []
    say_next(f"luthier compare {name}", *merging, f"luthier chat {name}")


@app.command()
def generate(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a model by folder or name.")],
    adapter: Annotated[Path | None, typer.Option(help="An adapter folder, on top of MODEL.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A .txt file is one prompt, its whole text; a .jsonl file has one a line.")
    ] = None,
    raw: Annotated[
        bool | None, typer.Option("--raw/--turn", help="The prompt as it is, or as the user's turn.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a RUN: the model that it started from.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest prompt and answer together.")] = None,
    sample: Annotated[bool | None, typer.Option("--sample/--greedy", help="Draw tokens at random.")] = None,
    temperature: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    top_k: Annotated[int | None, typer.Option(help="With --sample.")] = None,
    top_p: Annotated[float | None, typer.Option(help="With --sample.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Hold the linear layers in int8 or nf4, or none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line a prompt.")] = False,
) -> None:
    """Answer prompts with a run or a model.

    Prompts are --prompt, --prompt-file or standard input; else those of the run's recipe.
    """
    from luthier import verbs
    from luthier.runs import run_or_model

    options = {
        "raw": raw,
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop": stop or None,
        "seed": seed,
        "quantize": quantize,
    }
    said = None if sys.stdin.isatty() else lambda: _utf8(sys.stdin.read)
    verbs.generate(
        run_or_model(target),
        adapter=adapter,
        base=base,
        prompts=prompt or [],
        prompt_file=prompt_file,
        standard_input=said,
        options={key: value for key, value in options.items() if value is not None},
        as_json=as_json,
        stream=sys.stdout.isatty(),
        write=_write,
        say=aside,
    )


@app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a model by folder or name.")],
    adapter: Annotated[Path | None, typer.Option(help="An adapter folder, on top of MODEL.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, instead of the run's.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a RUN: the model that it started from.")] = False,
) -> None:
    """Talk with a run or a model.

    /new starts over, /exit or Ctrl-D ends.
    """
    from luthier import verbs
    from luthier.runs import run_or_model

    target = run_or_model(target)
    verbs.chat(target, adapter=adapter, base=base, system=system, read=_read_turn, write=_write, say=aside)


for verb in (compare, merge, export, report, methods):
    app.command()(verb)


@app.command()
def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the hubs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line a finding.")] = False,
) -> None:
    """What keeps a run from starting here, with the fix.

    Python, libraries, torch and its device, memory, disks, settings, the hubs; exit 1 where no run could start.
    """
    from luthier.doctor.examine import report as examine

    sys.exit(examine(Path.cwd(), online=not offline, as_json=as_json))


@app.command()
def quickstart() -> None:
    """The whole journey on an embedded tiny model.

    Copies recipe, data and model to the current folder; looks, trains, compares, merges, verifies.
    """
    from luthier import verbs

    _exit_if_stopped(verbs.quickstart(Path.cwd(), say=say, screen=screen))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_turn() -> str | None:
    """One line from the user; None at the end."""
    try:
        return _utf8(lambda: input("> " if sys.stdin.isatty() else ""))
    except EOFError:
        return None


def _utf8(read: Callable[[], str]) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise RecipeError(f"standard input: not UTF-8 (byte {error.start}); send UTF-8") from None


def _exit_if_stopped(run: Run) -> None:
    """A signal that ended the training ends the process, after the line that says how to go on."""
    outcome = run.outcome
    if outcome is not None and outcome.stopped is not None:
        say(f"stopped at step {outcome.steps}; go on with: luthier train {quoted(run.folder.shown)} --resume")
        sys.exit(128 + outcome.stopped)
