"""The verbs that start from a recipe or a run: what the command line and Python call. (`train` is run.train.)"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.errors import RecipeError
from luthier.folder import write_atomic, write_json
from luthier.quiet import quiet
from luthier.recipe import load_prompts, load_recipe
from luthier.run import (
    Loaded,
    Prompt,
    Run,
    Say,
    load_data,
    load_encoder,
    load_folder,
    load_run,
    open_run,
    result_folder,
    today_of,
    train,
    write_note,
)
from luthier.sections import GenerateSection

if TYPE_CHECKING:
    from luthier.compare import Comparison
    from luthier.merge import MergeReport


def look(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    rows: int = 3,
    seed: int = 0,
    html: Path | None = None,
    say: Say = print,
) -> Path:
    """Show the data of a recipe (or a run folder) as the model sees it, on the screen and as a page; gives its path.

    Errors: RecipeError, DataError, ModelError, HubError.
    """
    quiet()
    from rich.console import Console

    from luthier import look as pages
    from luthier.data.inspect import look as inspect

    path = Path(recipe)
    loaded = load_recipe(path / "recipe.yaml" if path.is_dir() else path, overrides)
    _, _, encoder = load_encoder(loaded, say, today_of(None))
    data = load_data(loaded, encoder, say)
    facts = inspect(data, encoder, loaded.data, rows, seed)
    pages.show(facts, Console())
    page = html or Path(f"{path.stem}-look.html")
    write_atomic(page, pages.look_html(facts))
    return page


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
        asked += load_prompts(GenerateSection(prompts=str(prompt_file)))
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
            write(f"{_said(prompt)}\n→ {reply.text.strip()}\n\n")


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
    say("/new starts over, /exit or Ctrl-D ends")
    while (line := read()) is not None and line.strip() != "/exit":
        if line.strip() == "/new":
            history = list(start)
            continue
        if not line.strip():
            continue
        history.append({"role": "user", "content": line})
        reply = loaded.answer([history], section, write)[0]
        write("\n")
        history.append({"role": "assistant", "content": reply.text.strip()})


def compare(run: Run, *, rows: int = 128, say: Say = print) -> Comparison:
    """Base against tuned on the recipe's prompts and on held-out rows; compare.{md,html,json} in the run folder.

    Errors: RunError where the adapter changes nothing.
    """
    raise NotImplementedError


def merge(run: Run, out: Path, *, say: Say = print) -> MergeReport:
    """The run's base and adapter as one model folder, verified in a fresh process.

    Errors: ModelError for a folder that is taken; RunError where the merged model is not the same model.
    """
    raise NotImplementedError


def quickstart(folder: Path, *, say: Say = print) -> Run:
    """The journey of the README in `folder`: copy, look, train, compare, merge, verify."""
    raise NotImplementedError


def _loaded(
    target: str, adapter: Path | None, base: bool, options: dict[str, Any], say: Say
) -> tuple[Loaded, GenerateSection]:
    """What answers, and how: a run with its recipe's settings, or a model with the defaults; options on top."""
    if (Path(target) / "recipe.yaml").is_file():
        if adapter is not None:
            raise RecipeError(f"{target} is a run and has its adapter; --adapter goes with a model")
        run = open_run(target)
        loaded, settings = load_run(run, base=base, say=say), run.recipe.generate.model_dump()
    else:
        if base:
            raise RecipeError(f"--base goes with a run; {target} is a model")
        loaded, settings = load_folder(target, adapter, say), {}
    return loaded, _settings(settings, options)


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


def _said(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


__all__ = ["Path", "nullcontext", "resources", "result_folder", "shutil", "train", "write_json", "write_note"]
