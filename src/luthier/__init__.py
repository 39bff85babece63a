"""Luthier fits a language model that someone else trained to one task.

    import luthier
    run = luthier.train("recipe.yaml")
    run.generate("Where do Mira and Tomas meet?")
    run.compare()
    run.merge("merged")

Names are imported when they are first used, so that `import luthier` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.bakeoff import compare_methods
    from luthier.errors import DataError, HubError, LuthierError, ModelError, RecipeError, RunError
    from luthier.recipe import load_recipe
    from luthier.run import Run, open_run, train
    from luthier.sections import Recipe
    from luthier.verbs import look

__all__ = [
    "DataError",
    "HubError",
    "LuthierError",
    "ModelError",
    "Recipe",
    "RecipeError",
    "Run",
    "RunError",
    "compare_methods",
    "load_recipe",
    "look",
    "open_run",
    "train",
]

_HOMES = {
    "bakeoff": ("compare_methods",),
    "errors": ("DataError", "HubError", "LuthierError", "ModelError", "RecipeError", "RunError"),
    "recipe": ("load_recipe",),
    "run": ("Run", "open_run", "train"),
    "sections": ("Recipe",),
    "verbs": ("look",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"luthier.{home}"), name)
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
