"""`luthier recipe`: one thin function a verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.words import Overrides, Recipe, say
from luthier.errors import RecipeError

recipe_app = typer.Typer(help="A recipe's schema, its defaults, a new one.", no_args_is_help=True)


@recipe_app.command("schema")
def recipe_schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    from luthier.recipe import recipe_schema as schema

    say(json.dumps(schema(), ensure_ascii=False, indent=2))


@recipe_app.command("show")
def recipe_show(recipe: Recipe, overrides: Overrides = None) -> None:
    """A recipe with every default filled in."""
    from luthier.recipe import show_recipe

    say(show_recipe(recipe, overrides or []).rstrip())


@recipe_app.command("new")
def recipe_new(
    path: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Where to write it; else the screen.")] = None,
    kind: Annotated[str, typer.Option(help="Of the method, as lora, p_tuning or full.")] = "lora",
) -> None:
    """A commented recipe to start from."""
    from luthier.recipe import new_recipe

    text = new_recipe(kind=kind)
    if path is None:
        say(text.rstrip())
        return
    if path.exists():
        raise RecipeError(f"{path} is there already; give another name, or remove it first")
    path.write_text(text, encoding="utf-8")
    say(f"{path}: fill in model.name and data.train, then: luthier look {path}")
