"""The verbs that start from a recipe or a run: what the command line and Python call. (`train` is run.train.)"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import hub
from luthier.errors import RecipeError
from luthier.folder import RunFolder, read_json, write_atomic, write_json
from luthier.loaded import Loaded, Prompt, Say, load_data, load_encoder, load_folder, write_note
from luthier.methods import METHODS, whole
from luthier.quiet import quiet
from luthier.recipe import load_prompts, read_prompts
from luthier.replies import said
from luthier.resume import read_recipe, today_of
from luthier.run import Run, load_run, open_run, result_folder, train
from luthier.sections import GenerateSection
from luthier.view.notebook import Looked, shell, train_call
from luthier.workbench import held

if TYPE_CHECKING:
    from luthier.merge import MergeReport
    from luthier.plan import Plan
    from luthier.replies import Comparison
    from luthier.strength import Strengths


def look(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    rows: int = 3,
    seed: int = 0,
    html: Path | None = None,
    say: Say = print,
) -> Looked:
    """Show the data of a recipe (or a run folder) as the model sees it, on the screen and as a page; gives both.

    In a notebook the cell shows what is given, and nothing is printed. The last line says what to do next.
    Errors: RecipeError, DataError, ModelError, HubError.
    """
    quiet()
    from rich.console import Console

    from luthier.data.inspect import look as inspect
    from luthier.view.lookpage import look_html, show

    path = Path(recipe)
    page = html or Path(f"{path.stem}-look.html")
    if not page.parent.is_dir():
        raise RecipeError(f"--html {page}: there is no folder {page.parent}")
    said: list[str] = []
    cell = shell() is not None and say is print
    say = said.append if cell else say
    loaded = read_recipe(path, overrides)
    _, _, encoder = load_encoder(loaded, say, today_of(RunFolder.open(path) if path.is_dir() else None))
    shown = loaded.model_copy(update={"data": loaded.data.model_copy(update={"bad_rows": "skip"})})
    data = load_data(shown, encoder, say)
    facts = inspect(data, encoder, loaded.data, rows, seed)
    if not cell:
        show(facts, Console())
    write_atomic(page, look_html(facts, recipe=path.name, model=loaded.model.name))
    say(f"page: {page}")
    if (bad := data.report["bad"]) and loaded.data.bad_rows == "error":
        rows_are = "1 bad row; put it right" if bad == 1 else f"{bad:,} bad rows; put them right"
        say(f"luthier train would stop: {rows_are}, or set data.bad_rows: skip")
    elif path.is_file():
        command = shlex.join(["luthier", "train", str(recipe), *overrides])
        say(f"next: {train_call(recipe, overrides) if cell else command}")
    return Looked(facts, page, said)


def plan(recipe: str | Path, overrides: Sequence[str] = (), *, structure: bool = False, say: Say = print) -> Plan:
    """Say what a recipe's run would take, without the model's weights; gives the plan.

    Errors: RecipeError, ModelError, DataError and HubError, as `train` would refuse it.
    """
    quiet()
    from luthier.plan import plan as reckon
    from luthier.plantext import lines

    found = reckon(recipe, overrides, say=say)
    for line in lines(found, structure):
        say(line)
    return found


def generate(
    target: str,
    *,
    adapter: Path | None,
    base: bool,
    prompts: Sequence[str],
    prompt_file: Path | None,
    standard_input: Callable[[], str] | None,
    options: dict[str, Any],
    as_json: bool,
    stream: bool,
    write: Callable[[str], None],
    say: Say,
) -> None:
    """Answer prompts and write the replies: streamed, as text, or as JSON lines.

    Prompts are those given, else standard input, else the recipe's. Errors: RecipeError where there is none.
    """
    quiet()
    loaded, section = _loaded(target, adapter, base, options, say)
    asked: list[Prompt] = list(prompts)
    if prompt_file is not None:
        asked += read_prompts(prompt_file)
    if not asked and standard_input is not None and (text := standard_input().rstrip("\n")):
        asked = [text]
    asked = asked or load_prompts(section)
    if not asked:
        raise RecipeError(f"{target}: no prompt; give --prompt, --prompt-file or standard input")
    live = stream and not as_json and len(asked) == 1
    replies = loaded.answer(asked, section, write if live else None)
    if live:
        write("\n")
        return
    for prompt, reply in zip(asked, replies, strict=True):
        if as_json:
            line = {"prompt": prompt, "reply": reply.text, "stopped": reply.stopped, "tokens": len(reply.ids)}
            write(json.dumps(line, ensure_ascii=False) + "\n")
        elif len(asked) == 1:
            write(reply.text.strip("\n") + "\n")
        else:
            write(f"{said(prompt)}\n→ {reply.text.strip()}\n\n")


def chat(
    target: str,
    *,
    adapter: Path | None,
    base: bool,
    system: str | None,
    read: Callable[[], str | None],
    write: Callable[[str], None],
    say: Say,
) -> None:
    """A conversation, turn by turn, each reply streamed. `read` gives the user's next line, None at the end."""
    quiet()
    loaded, section = _loaded(target, adapter, base, {}, say)
    opening = system if system is not None else loaded.encoder.section.system
    start: list[dict[str, Any]] = [{"role": "system", "content": opening}] if opening else []
    history = list(start)
    alone = loaded.encoder.template.alone
    say("/new starts over, /exit or Ctrl-D ends" + "; each question stands alone: so the run was trained" * alone)
    while (line := read()) is not None and line.strip() != "/exit":
        if alone or line.strip() == "/new":
            history = list(start)
        if line.strip() == "/new":
            continue
        if not line.strip():
            continue
        history.append({"role": "user", "content": line})
        reply = loaded.answer([history], section, write)[0]
        write("\n")
        history.append({"role": "assistant", "content": reply.text.strip()})


def compare(run: Run, *, rows: int = 128, say: Say = print) -> Comparison:
    """Base against tuned on the recipe's prompts and on held-out rows; compare.{md,html,json} in the run folder.

    Errors: RecipeError where there is nothing to ask; RunError where the adapter changes nothing.
    """
    quiet()
    from rich.console import Console

    from luthier.compare import compare as ask
    from luthier.view.report import about, write_report
    from luthier.view.sidebyside import compare_html, markdown, show

    tuned = load_run(run, say=say)
    comparison = ask(
        _base_side(run, tuned, say),
        _let_go(tuned.model) if whole(run.recipe.method.kind) else nullcontext(tuned.model),
        prompts=load_prompts(run.recipe.generate),
        data=load_data(run.recipe, tuned.encoder, _silent),
        encoder=tuned.encoder,
        tokenizer=tuned.tokenizer,
        section=run.recipe.generate,
        end_ids=tuned.end_ids,
        rows=rows,
        say=say,
    )
    if shell() is None:
        show(comparison, Console())
    page = run.folder.path / "compare.html"
    write_json(page.with_suffix(".json"), comparison.as_json())
    told = {"name": run.folder.name, "about": about(run.folder)}
    write_atomic(page.with_suffix(".md"), markdown(comparison, **told))
    write_atomic(page, compare_html(comparison, **told))
    write_report(run.folder)
    say(f"page: {page}")
    return comparison


def strengths(run: Run, *, rows: int | None = None, text: Path | None = None, say: Say = print) -> Strengths:
    """The run's adapter at several strengths, task against forgetting; strength.{md,html,json} in the run folder.

    Errors: RecipeError for a method that has no strength, or where nothing can be measured; DataError for a bad `text`.
    """
    quiet()
    from luthier.strength import ROWS, strengths_of

    return strengths_of(run, rows=ROWS if rows is None else rows, text=text, say=say)


@contextmanager
def _let_go(model: Any) -> Iterator[Any]:
    """The model; behind the block its memory is free, whoever still holds it, so that the base has room."""
    from luthier.models.quantize import let_go

    yield model
    let_go(model)


@contextmanager
def _base_side(run: Run, tuned: Loaded, say: Say) -> Iterator[Any]:
    """The model that the run started from: its adapter switched off, or where base weights trained the base itself."""
    from luthier.models.adapters import adapter_off

    if whole(run.recipe.method.kind):
        yield load_run(run, base=True, say=say).model
        return
    with adapter_off(tuned.model):
        yield tuned.model


def merge(run: Run, out: Path, *, strength: float | str = 1.0, say: Say = print) -> MergeReport:
    """The run's base and adapter as one model folder, the adapter at `strength`, verified in a fresh process from disk.

    Errors: RecipeError for a bad strength; ModelError for a folder that is taken; RunError where the merged model is
    not the same model.
    """
    quiet()
    from luthier.merge import merge as merge_folders
    from luthier.models.device import pick_device
    from luthier.models.scaling import strength_of
    from luthier.verify import POSITIONS, verify, write_rows

    asked = strength_of(strength)
    if asked == 0:
        raise RecipeError("--strength 0 is the base itself: there is nothing to merge")
    if reason := METHODS[run.recipe.method.kind].reason:
        raise RecipeError(f"{run.folder.shown}: {run.recipe.method.kind} cannot be merged: {reason}")
    path, _, encoder = load_encoder(run.recipe, say, today_of(run.folder))
    data = load_data(run.recipe, encoder, _silent)
    report = merge_folders(
        path,
        result_folder(run),
        out,
        run.recipe.merge.dtype,
        say=say,
        ends=encoder.end_ids,
        note=lambda folder: write_note(folder, encoder, run.recipe.data),
        trained=held(run.recipe, pick_device("auto")),
        strength=asked,
    )
    parts = [part for part in (data.eval, data.train) if part is not None]
    examples = (part[i] for part in parts for i in range(len(part)))
    with tempfile.TemporaryDirectory() as scratch, _noted(run, out):
        rows = Path(scratch) / "rows.npz"
        there = write_rows(((example.ids, example.supervised) for example in examples), rows)
        if there < POSITIONS:
            say(f"the data has {there} supervised tokens; the merge is verified on those instead of {POSITIONS:,}")
        verify(out, rows, say)
    return report


@contextmanager
def _noted(run: Run, out: Path) -> Iterator[None]:
    """Behind the block the run's merges.json and report.html tell of the merged model, verified or not."""
    from luthier.models.adapters import MERGE_NOTE
    from luthier.view.report import write_report

    try:
        yield
    finally:
        note = json.loads((out / MERGE_NOTE).read_text("utf-8"))
        line = {key: note.get(key) for key in ("dtype", "verified", "figures", "quantised", "strength")}
        known = read_json(run.folder.merges) or []
        write_json(run.folder.merges, [*known, {"out": str(out), "time": round(time.time(), 3), **line}])
        write_report(run.folder)


def export(run: Run, out: Path, *, say: Say = print) -> None:
    """The run's adapter as a PEFT folder for the layers of the model's vendor.

    Errors: ModelError where that is what it is already, or the folder is taken.
    """
    quiet()
    from luthier.export import export as write

    model = run.recipe.model
    write(hub.model_path(model.name, model.revision, Path.cwd(), say), result_folder(run), out, say=say)


def quickstart(
    folder: Path, *, say: Say = print, screen: Callable[[], AbstractContextManager[dict[str, Any]]] | None = None
) -> Run:
    """The journey of the README in `folder`: copy, look, train, compare, merge, verify. Errors: RunError.

    `screen` gives what else `train` is told of how the run is shown.
    """
    quiet()
    began = time.monotonic()
    recipe = _copied(folder, say)
    _heading(say, "1 · The data as the model sees it", f"luthier look {recipe.name}")
    look(recipe, rows=2, say=say)
    _heading(say, "2 · Training", f"luthier train {recipe.name}")
    with screen() if screen else nullcontext({"say": say}) as how:
        run = train(recipe, **how)
    if run.outcome is not None and run.outcome.stopped is not None:
        return run
    shown = run.folder.path.relative_to(folder)
    _heading(say, "3 · Base and tuned on prompts that were held out", f"luthier compare {shown}")
    compare(run, say=say)
    out = folder / f"{run.folder.name}-merged"
    _heading(say, "4 · One model of its own", f"luthier merge {shown} -o {out.name}")
    merge(run, out, say=say)
    say(f"\nDone in {time.monotonic() - began:.0f} s. Next, try:")
    say(f'  luthier generate {out.name} --prompt "{load_prompts(run.recipe.generate)[0]}"')
    say(f"  luthier chat {shown}")
    say(f"  luthier train {recipe.name} method.r=4 train.epochs=2")
    return run


def _copied(folder: Path, say: Say) -> Path:
    """The embedded recipe, data and model, copied where they are not there yet; the recipe's path."""
    source = resources.files("luthier") / "assets"
    with resources.as_file(source) as assets:
        given = assets / "quickstart"
        wanted = {"quickstart.yaml": given / "recipe.yaml", "tiny": assets / "tiny"}
        wanted |= {name: given / name for name in ("train.jsonl", "heldout.jsonl", "valley.txt")}
        for name, path in wanted.items():
            if (folder / name).exists():
                say(f"{name}: there already, taken as it is")
            elif path.is_dir():
                shutil.copytree(path, folder / name)
            else:
                shutil.copyfile(path, folder / name)
    return folder / "quickstart.yaml"


def _heading(say: Say, title: str, command: str) -> None:
    say(f"\n── {title} ── {command}\n")


def _loaded(
    target: str, adapter: Path | None, base: bool, options: dict[str, Any], say: Say
) -> tuple[Loaded, GenerateSection]:
    """What answers, and how: a run with its recipe's settings, or a model with the defaults; options on top."""
    if (Path(target) / "recipe.yaml").is_file():
        if adapter is not None:
            raise RecipeError(f"{target} is a run and has its adapter; --adapter goes with a model")
        run = open_run(target)
        section = _settings(run.recipe.generate.model_dump(), options)
        asked = replace(run, recipe=run.recipe.model_copy(update={"generate": section}))
        return load_run(asked, base=base, say=say), section
    if base:
        raise RecipeError(f"--base goes with a run; {target} is a model")
    section = _settings({}, options)
    return load_folder(target, adapter, say, section), section


def _settings(settings: dict[str, Any], options: dict[str, Any]) -> GenerateSection:
    """The generate section with the command line's options on top. Errors: RecipeError."""
    from pydantic import ValidationError

    if "max_new_tokens" in options and "max_length" not in options:
        settings = {**settings, "max_length": None}
    try:
        section = GenerateSection.model_validate({**settings, **options})
    except ValidationError as error:
        problem = error.errors()[0]
        raise RecipeError(f"--{str(problem['loc'][0]).replace('_', '-')}: {problem['msg']}") from None
    idle = [key for key in ("temperature", "top_k", "top_p") if key in options]
    if idle and not section.sample:
        raise RecipeError(f"--{idle[0].replace('_', '-')} has no effect without --sample")
    return section


def _silent(_: str) -> None:
    """For the run's own data: what is to be said of it was said when it was trained on."""
