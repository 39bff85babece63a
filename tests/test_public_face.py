"""The public face: a dozen names, each there, each explained."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import luthier

SOURCE = Path(luthier.__file__).parent


def test_about_a_dozen_names_in_order() -> None:
    assert luthier.__all__ == sorted(luthier.__all__)
    assert 10 <= len(luthier.__all__) <= 18
    assert {"LuthierError", "Recipe", "Run", "load_recipe", "open_run", "train"} <= set(luthier.__all__)


def test_each_name_is_there_and_explained() -> None:
    for name in luthier.__all__:
        thing = getattr(luthier, name)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert thing.__doc__, f"luthier.{name} has no docstring"
    assert set(luthier.__all__) <= set(dir(luthier))


def test_a_verb_is_not_covered_by_the_module_of_its_name() -> None:
    """Importing luthier.train, a package, would make `luthier.train` that package: then a second call fails."""
    modules = [".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in SOURCE.rglob("[a-z]*.py")]
    code = (
        "import importlib, inspect, luthier; from luthier.quiet import quiet; quiet()\n"
        f"for module in {sorted(modules)}: importlib.import_module(module)\n"
        "print([name for name in luthier.__all__ if inspect.ismodule(getattr(luthier, name))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_error_is_a_luthier_error() -> None:
    errors = [name for name in luthier.__all__ if name.endswith("Error")]
    assert {name: issubclass(getattr(luthier, name), luthier.LuthierError) for name in errors} == dict.fromkeys(
        errors, True
    )


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="^module 'luthier' has no attribute 'tune'$"):
        _ = luthier.tune


def test_every_public_function_and_class_has_a_docstring() -> None:
    bare = [
        f"{path.relative_to(SOURCE)}: {node.name}"
        for path in sorted(SOURCE.rglob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if ast.get_docstring(node) is None
    ]
    assert bare == []


def test_every_module_says_what_it_is() -> None:
    written = {path.relative_to(SOURCE): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    assert [str(path) for path, text in written.items() if text and ast.get_docstring(ast.parse(text)) is None] == []
