"""A recipe in a folder, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.errors import RecipeError
from luthier.recipe import load_recipe
from luthier.sections import Recipe

MINIMAL = "model: {name: hf:a/b}\ndata: {train: hf:c/d}\n"
_HEADS = {"model": "model:\n  name: hf:a/b\n", "data": "data:\n  train: hf:c/d\n"}


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    """Load `text` as folder/recipe.yaml."""
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "recipe.yaml", overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error that `text` gives, without the folder."""
    with pytest.raises(RecipeError) as caught:
        read(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def problem(folder: Path, section: str, body: str) -> str:
    """The one problem of a recipe that is right but for these lines of a section, without its place."""
    heads = "".join(head for name, head in _HEADS.items() if name != section) + _HEADS.get(section, f"{section}:\n")
    (only,) = problems(folder, heads + "".join(f"  {line}\n" for line in body.split("\n")))
    place, _, what = only.partition(": ")
    assert place.startswith("recipe.yaml:")
    return what
