"""The recipe file: read with every problem at once, saved as it was understood, compared, shown, begun.

recipe.yaml + key=value → `yamlfile` (values, lines) → `checks` (each by itself) → `conflicts` (two together) → Recipe
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from luthier.checks import check
from luthier.conflicts import conflicts, idle
from luthier.errors import DataError, RecipeError
from luthier.folder import write_atomic
from luthier.methods import METHODS
from luthier.sections import DataSection, GenerateSection, MethodSection, Recipe, Section
from luthier.vocabulary import Node, find, node_of, schema
from luthier.yamlfile import Key, Problem, read_document, write_value

HUBS = ("hf:", "modelscope:")
WIDE = 100  # characters; a list that makes a longer line is written an item a line

# What `new_recipe` writes out: the keys that are turned most; of the method those that its kind takes.
STARTER: dict[str, tuple[str, ...]] = {
    "model": ("name", "dtype"),
    "data": ("train", "eval", "system", "supervise", "max_length", "too_long"),
    "method": tuple(MethodSection.model_fields),
    "train": ("batch", "epochs", "lr", "schedule", "warmup", "activation_checkpointing", "eval_every", "save_every"),
    "generate": ("prompts", "max_new_tokens", "sample"),
}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Read a recipe, and the `key=value` overrides on top of it.

    Paths in both are relative to the recipe's file and come back absolute. `check_files`: a file that is not there is
    a problem too; False is for a run's own recipe, whose data may have moved since.

    Errors: RecipeError with a line for each problem: file, line, key, what is wrong, the bound and the remedy.
    """
    document = read_document(Path(path))
    for override in overrides:
        document.override(override)
    written, problems = check(document.values)
    told = {problem.key for problem in document.problems}
    problems = [*document.problems, *(problem for problem in problems if problem.key not in told)]
    wrong = {problem.key[:2] for problem in problems}
    misspelt = {problem.key[0] for problem in problems if find(problem.key) is None}

    def sound(key: Key) -> bool:
        """Whether the key's value is what was meant: a default is not where the section has an unknown key."""
        given = key in document.lines or key[0] not in misspelt
        return given and not any(key[: len(bad)] == bad for bad in wrong)

    folder = Path(path).absolute().parent
    recipe = _located(written, folder)
    for conflict in conflicts(recipe):
        keys = [tuple(key.split(".")) for key in conflict.keys]
        if all(map(sound, keys)):
            problems.append(Problem(keys[0], conflict.what))
    if check_files:
        problems += [problem for problem in _missing(written, folder) if sound(problem.key)]
    if problems:
        raise RecipeError(document.report(problems))
    return recipe


def with_method(recipe: Recipe, kind: str, seed: int) -> Recipe:
    """The same recipe for another kind of method, with its defaults and its rate; for its own kind as it is.

    Errors: RecipeError where the rest of the recipe cannot be with that kind.
    """
    given = recipe.model_dump(exclude_unset=True)
    if kind != recipe.method.kind:
        given["method"] = {"kind": kind}
        given.get("train", {}).pop("lr", None)
        for section, _, name in (key.partition(".") for key in idle(Recipe.model_validate(given))):
            given.get(section, {}).pop(name, None)
    given["train"] = {**given.get("train", {}), "seed": seed}
    chosen = Recipe.model_validate(given)
    for conflict in conflicts(chosen):
        raise RecipeError(f"{kind}: {conflict.keys[0]}: {conflict.what}")
    return chosen


def run_name(recipe: Recipe, path: str | Path) -> str:
    """The name of the run's folder: the recipe's own, or the stem of its file."""
    return recipe.run or Path(path).stem


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default filled in, atomically; `load_recipe` gives an equal one."""
    write_atomic(path, _as_yaml(recipe, mark_defaults=False))


def show_recipe(path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> str:
    """The recipe as `load_recipe` understands it, as YAML; `# default` stands behind what it leaves to Luthier."""
    return _as_yaml(load_recipe(path, overrides, check_files=check_files), mark_defaults=True)


def recipe_difference(old: Recipe, new: Recipe) -> list[str]:
    """What two recipes say differently, a line each: "train.lr: 0.0001 -> 0.0002"."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {write_value(before[key])} -> {write_value(after[key])}" for key in before if before[key] != after[key]
    ]


def recipe_schema() -> Node:
    """JSON Schema (draft 2020-12) of a recipe, with a description of every key, for editors."""
    return schema()


def new_recipe(model: str = "hf:Qwen/Qwen2.5-0.5B-Instruct", train: str = "data.jsonl", kind: str = "lora") -> str:
    """A recipe to start from, as YAML: the keys that are turned most, each with what it does.

    kind: of the method. Errors: RecipeError for one that is unknown.
    """
    if kind not in METHODS:
        near = get_close_matches(kind, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(METHODS)}"
        raise RecipeError(f"--kind: there is no method {kind}; {hint}")
    chosen: dict[str, Any] = {
        "model": {"name": model},
        "data": {"train": train, "eval": 0.05},
        "method": {"kind": kind},
        "generate": {"prompts": ["Who are you?"]},
    }
    recipe = Recipe.model_validate(chosen)
    lines = [
        "# A Luthier recipe. Every key: `luthier recipe schema`. What the model will see of it: `luthier look FILE`."
    ]
    for section, names in STARTER.items():
        lines += ["", f"{section}:"]
        for name in names:
            if f"{section}.{name}" in idle(recipe):
                continue
            about = _of_kind(kind, section, name)
            lines += textwrap.wrap(about, 116, initial_indent="  # ", subsequent_indent="  # ", break_on_hyphens=False)
            lines += _entry(name, getattr(getattr(recipe, section), name), indent="  ")
    return "\n".join(lines) + "\n"


def _of_kind(kind: str, section: str, name: str) -> str:
    """What a key does, as far as it concerns a kind of method: of its own keys the first sentence."""
    about, method = _about((section, name)), METHODS[kind]
    if (section, name) == ("method", "kind"):
        defaults = "" if method.tuned else ", with PEFT's own defaults"
        return f"{method.title}{defaults}; `luthier methods` shows all {len(METHODS)}."
    if (section, name) == ("train", "lr"):
        return f"Peak learning rate; auto is the method's own: {method.why}."
    if section != "method":
        return about
    kinds, others = "|".join(METHODS), "|".join(other for other in METHODS if other != kind)
    takers, apart = rf" \((?:(?:{kinds})[,)] ?)+", rf" \((?:{others})\b[^)]*:[^)]*\)"  # (lora, dora), (rslora: …)
    return re.sub(f"{takers}|{apart}", "", about.partition(". ")[0].rstrip(".") + ".")


def load_prompts(section: GenerateSection) -> list[str | list[dict[str, str]]]:
    """The prompts of a recipe, given in it or by a file (`read_prompts`)."""
    return read_prompts(Path(section.prompts)) if isinstance(section.prompts, str) else list(section.prompts)


def read_prompts(path: Path) -> list[str | list[dict[str, str]]]:
    """The prompts in a file: texts, or conversations ({"role": …, "content": …} each) to be answered.

    A .jsonl file has one a line: a text, or an object with `prompt` or `messages`. Any other is one prompt, its whole
    text. Errors: DataError naming file and line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not text.strip():
        raise DataError(f"{path}: holds no prompt")
    if path.suffix != ".jsonl":
        return [text]
    lines = enumerate(text.split("\n"), start=1)
    return [_prompt(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _prompt(line: str, place: str) -> str | list[dict[str, str]]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: broken JSON: {error.msg} (column {error.colno})") from None
    if isinstance(value, dict):
        value = value.get("prompt", value.get("messages"))
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(_is_message(message) for message in value):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    raise DataError(
        f'{place}: not a prompt; a line is a text, {{"prompt": "…"}} or {{"messages": [{{"role": …, "content": …}}]}}'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


# -- writing ---------------------------------------------------------------------------------------------------------


def _as_yaml(recipe: Recipe, mark_defaults: bool) -> str:
    """The whole recipe in the order of its sections; keys that have no effect are left out (given, they are errors)."""
    silent = idle(recipe)

    def note(holder: Any, name: str) -> str:
        return "  # default" if mark_defaults and name not in holder.model_fields_set else ""

    lines = list[str]()
    for section, holder in recipe:
        if not isinstance(holder, Section):
            lines += _entry(section, holder, note=note(recipe, section))
            continue
        rows = [(name, value) for name, value in holder if f"{section}.{name}" not in silent]
        lines += [f"{section}:"] if rows else []
        for name, value in rows:
            lines += _entry(name, value, indent="  ", note=note(holder, name))
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any, indent: str = "", note: str = "") -> list[str]:
    plain = _plain(value)
    line = f"{indent}{name}: {write_value(plain)}"
    if isinstance(plain, list) and len(line) > WIDE:
        return [f"{indent}{name}:{note}", *(f"{indent}  - {write_value(item)}" for item in plain)]
    return [line + note]


def _plain(value: Any) -> Any:
    """A value as YAML's own types; columns that are not named are left out."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_none=True)
    return value


def _flat(recipe: Recipe) -> dict[str, Any]:
    sections = {section: holder for section, holder in recipe if isinstance(holder, Section)}
    inner = {f"{section}.{name}": _plain(value) for section, holder in sections.items() for name, value in holder}
    return {name: value for name, value in recipe if name not in sections} | inner


def _about(key: Key) -> str:
    return " ".join(node_of(key)["description"].split())


# -- paths -----------------------------------------------------------------------------------------------------------


def _located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with absolute paths, those that it gives being relative to `folder`."""
    values = recipe.model_dump(exclude_unset=True)
    for key, text in _paths(recipe, folder):
        at: Any = values
        for part in key[:-1]:
            at = at[part]
        at[key[-1]] = str(_absolute(text, folder))
    return Recipe.model_validate(values)


def _paths(recipe: Recipe, folder: Path) -> Iterator[tuple[Key, str]]:
    """Every key that names a file or folder of this machine, with what it says."""
    name = recipe.model.name
    if re.match(r"(\.{0,2}|~)(/|$)", name) or (not name.startswith(HUBS) and (folder / name).is_dir()):
        yield ("model", "name"), name
    for key, text in _data_paths(recipe.data):
        if not text.startswith(HUBS):
            yield key, text
    if isinstance(recipe.generate.prompts, str):
        yield ("generate", "prompts"), recipe.generate.prompts


def _data_paths(data: DataSection) -> Iterator[tuple[Key, str]]:
    if isinstance(data.train, str):
        yield ("data", "train"), data.train
    else:
        for i, source in enumerate(data.train):
            yield (
                (("data", "train", i), source)
                if isinstance(source, str)
                else (("data", "train", i, "path"), source.path)
            )
    if isinstance(data.eval, str):
        yield ("data", "eval"), data.eval
    if data.template.endswith((".jinja", ".j2")):
        yield ("data", "template"), data.template
    if data.write_text is not None:
        yield ("data", "write_text"), data.write_text


def _absolute(text: str, folder: Path) -> Path:
    path = Path(text).expanduser() if text == "~" or text.startswith("~/") else Path(text)
    return Path(os.path.normpath(folder / path))


def _missing(recipe: Recipe, folder: Path) -> Iterator[Problem]:
    """Files and folders that the recipe names and that are not there."""
    for key, text in _paths(recipe, folder):
        path = _absolute(text, folder)
        if key == ("model", "name") and path.is_file():
            yield Problem(key, f"{path} is a file; a model is a folder")
        elif key == ("data", "write_text") and not path.parent.is_dir():
            yield Problem(key, f"there is no folder {path.parent}")
        elif key != ("data", "write_text") and not path.exists():
            yield Problem(key, f"there is no {path}{_remedy(key, text, path)}")


def _remedy(key: Key, text: str, path: Path) -> str:
    if path.parent.is_dir():
        near = get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
        if near:
            return f"; did you mean {near[0]}?"
    if Path(text).exists():
        return "; a path is relative to the recipe's file"
    if key[0] == "data" and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(\[\w+\])?", text) and not path.parent.is_dir():
        return f"; a data set on the hub is written hf:{text}"
    return ""
