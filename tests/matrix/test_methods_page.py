"""docs/methods.md is what the table of methods and the matrix say, and keeps what was written by hand."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

from conftest import REPOSITORY
from luthier.methods import METHODS

PAGE = REPOSITORY / "docs" / "methods.md"


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(REPOSITORY / "tools" / "methods_docs.py"))


def test_the_page_is_up_to_date(tool: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == tool["methods_page"](tool["kept_of"](text)), "run tools/methods_docs.py"
    for kind in METHODS:
        assert text.count(f"| `{kind}` |") == 2  # what it is, and its line of the matrix


def test_what_stands_between_the_marks_is_kept(tool: dict[str, Any]) -> None:
    ours = f"{tool['BEGIN']}\n## LoRA against P-Tuning\n\nBy hand.\n{tool['END']}"
    page = tool["methods_page"](ours)
    assert page.endswith(f"{ours}\n") and tool["kept_of"](page) == ours
    assert tool["kept_of"]("# Methods\n") == f"{tool['BEGIN']}\n{tool['END']}"
