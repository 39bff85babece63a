"""Going on with a run: its folder, its recipe, its date, its data, and the checkpoint that it goes on from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.folder import RunFolder, check_name, read_json
from luthier.recipe import load_recipe, recipe_difference, run_name
from luthier.sections import Recipe

# A resumed run may change these: no step's numbers depend on them, but for rounding on the last three.
ROUNDING = ("train.devices", "train.tokens_per_pass", "train.activation_checkpointing", "engine.")
FREE = ("run", "track", "train.log_every", "train.keep", "generate.", "merge.", *ROUNDING)
COUNTS = ("template_sha256", "train_rows", "train_tokens", "supervised_tokens", "eval_rows")
"""What data.json says of the encoded rows that a resumed run must find again."""


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or of a run folder (whose data may have moved since)."""
    if path.is_dir():
        return load_recipe(RunFolder.open(path).recipe, overrides, check_files=False)
    return load_recipe(path, overrides)


def wanted(path: Path, overrides: Sequence[str], resume: bool) -> tuple[Recipe, RunFolder | None]:
    """The recipe, and the run folder to go on with. Errors: RecipeError where the recipe has changed since."""
    if (path / "recipe.yaml").is_file() and not resume:
        raise RecipeError(
            f"{path} is a run; go on with it by --resume, or train its recipe anew: {path / 'recipe.yaml'}"
        )
    if not resume:
        recipe = load_recipe(path, overrides)
        check_name(run_name(recipe, path), Path.cwd())
        return recipe, None
    recipe = read_recipe(path, overrides)
    folder = RunFolder.open(path.absolute()) if path.is_dir() else _newest(run_name(recipe, path))
    begun = load_recipe(folder.recipe, check_files=False)
    changed = [line for line in recipe_difference(begun, recipe) if not line.startswith(FREE)]
    if changed:
        raise _begun_with(folder, "another recipe", changed)
    return recipe, folder


def today_of(folder: RunFolder | None) -> date:
    """The date that templates see: the run's own, so that its rows stay the same tomorrow."""
    if folder is None or not folder.data.is_file():
        return date.today()
    return date.fromisoformat(json.loads(folder.data.read_text("utf-8"))["today"])


def check_same_data(folder: RunFolder, report: dict[str, Any]) -> None:
    """Errors: RecipeError where the rows (`report`: of the data as it is now) are not those of the run's data.json."""
    if not folder.data.is_file():  # stopped before it was written
        return
    begun = json.loads(folder.data.read_text("utf-8"))
    pairs = zip(begun["sources"], report["sources"], strict=True)  # as many: the recipe is the same
    changed = [f"{new['path']}: its content" for old, new in pairs if old["sha256"] != new["sha256"]]
    changed += [f"{key}: {begun[key]} -> {report[key]}" for key in COUNTS if begun[key] != report[key]]
    if changed:
        raise _begun_with(folder, "other data", changed)


def resume_from(folder: RunFolder, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint, which it says; None where the run had not come so far.

    Errors: RecipeError for a run that is done and has none any more: it would be trained a second time.
    """
    from luthier.training.checkpoint import latest

    newest = latest(folder.checkpoints)
    if newest is None and (read_json(folder.status) or {}).get("state") == "done":
        raise RecipeError(
            f"{folder.shown} is trained to its end, and its checkpoints were removed; train it anew with: "
            f"luthier train {folder.shown / 'recipe.yaml'}"
        )
    where = f"from {newest.relative_to(folder.path)}" if newest else "no checkpoint yet, from the start"
    done = (read_json(folder.status) or {}).get("state") == "done"
    say(f"resume: {where}" + (": it is trained to its end, nothing is left but to ask its prompts" if done else ""))
    return newest


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(checkpoint.name[5:])


def _newest(name: str) -> RunFolder:
    """The latest run of that name: the one with the highest number."""
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = {
        int(match[1] or 1): path.parent
        for path in Path("runs").absolute().glob("*/recipe.yaml")
        if (match := pattern.fullmatch(path.parent.name))
    }
    if not found:
        raise RecipeError(f"there is no run {name} below {Path('runs').absolute()} to resume")
    return RunFolder.open(found[max(found)])


def _begun_with(folder: RunFolder, what: str, changed: Sequence[str]) -> RecipeError:
    shown = "\n".join(f"  {line}" for line in changed)
    return RecipeError(f"{folder.path} was begun with {what}; undo the change, or start anew:\n{shown}")
