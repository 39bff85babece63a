"""`luthier methods`: every method and cell, within the screen's width, without colour where there is no terminal."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from typing import Any, get_args

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from luthier.cli.methods import methods
from luthier.errors import RecipeError
from luthier.matrix import COLUMNS, FAMILIES, FORMATS, verdict
from luthier.methods import METHODS
from luthier.sections import MethodSection
from luthier.view import methodstable
from luthier.view.methodstable import KEYS, SCALES, SHORT, Notes, cells, rate, show_method, show_methods

SOFT = METHODS["bottleneck"].reason
app = typer.Typer()
app.command()(methods)


def printed(width: int, kind: str | None = None, **options: Any) -> list[str]:
    screen = Console(file=StringIO(), width=width, legacy_windows=False, highlight=False, **options)
    show_methods(screen) if kind is None else show_method(METHODS[kind], screen)
    assert isinstance(screen.file, StringIO)
    return screen.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 104])
def test_a_line_a_method(width: int) -> None:
    lines = printed(width)
    assert max(map(len, lines)) <= width
    found = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in METHODS}
    assert list(found) == list(METHODS)
    assert ("bottleneck adapters" in found["bottleneck"]) == (width == 104)
    head = lines[1]
    for kind, line in found.items():
        assert f" {rate(METHODS[kind])} " in line
        for place in (at for at in range(len(head)) if head[at - 1] == " " != head[at]):
            assert line[place - 1] == " " != line[place], f"{kind}: a cell is not below its column"
    assert found["lora"].split()[-12:] == ["yes"] * 12
    assert found["full"].split()[-12:] == ["yes"] * 4 + ["no⁷"] * 4 + ["no⁸"] * 4
    assert found["prompt"].split()[-12:] == ["yes", "yes", "no¹", "yes"] * 3
    assert lines.index(methodstable.GUESSED) == lines.index(found["olora"]) - 1


def test_each_reason_is_told_once() -> None:
    text = " ".join(" ".join(printed(104)).split())
    reasons = {verdict(kind, "glm", held)[column] for kind in METHODS for held in FORMATS for column in COLUMNS} - {""}
    assert len(reasons) == 9
    assert [reason for reason in reasons if text.count(reason) != 1] == []
    assert f"⁴ bottleneck: {SOFT}" in text and "⁹ loha, lokr: reads a layer's shape" in text


def test_a_cell_where_some_families_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(kind: str, family: str, held: str) -> dict[str, str]:
        why = {"opt": "has no rotary", "yuan2": "has a filter"}.get(family, "") if held == "nf4" else ""
        return {**dict.fromkeys(COLUMNS, ""), "packed": why}

    monkeypatch.setattr(methodstable, "verdict", some)
    notes = Notes()
    found = cells("lora", list(FAMILIES), notes)
    assert found[8] == ("9/11", "1,2") and {*found[:8], *found[9:]} == {("yes", "")}
    assert notes.lines(named=False) == [("1", "has no rotary"), ("2", "has a filter")]


def test_one_method() -> None:
    lines = printed(80, "bottleneck")
    text = " ".join(" ".join(lines).split())
    assert lines[0] == "bottleneck adapters  method.kind: bottleneck"
    assert f"rate {rate(METHODS['bottleneck'])} {SCALES['width']}: {METHODS['bottleneck'].why}" in text
    assert "keys method.dropout, method.placement, method.size result an adapter folder" in text
    assert f"merge no: {SOFT}" in text and text.count(f"¹ {SOFT}") == 1
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split() and line.split()[0] in FAMILIES}
    assert rows == dict.fromkeys(FAMILIES, ["yes", "yes", "no¹", "yes"] * 3)
    assert "keys none beside method.kind result a whole model" in " ".join(" ".join(printed(80, "full")).split())


def test_keys_are_the_recipes() -> None:
    assert list(KEYS) == [name for name in MethodSection.model_fields if name != "kind"]
    assert list(SHORT) == list(COLUMNS)
    assert {method.scale for method in METHODS.values()} <= set(SCALES)


@pytest.mark.parametrize(
    ("value", "scale", "said"), [(2e-4, "width", "2e-4"), (0.025, "none", "2.5e-2"), (1.0, "size", "1 rms")]
)
def test_a_rate(value: float, scale: Any, said: str) -> None:
    assert rate(METHODS["lora"]._replace(rate=value, scale=scale)) == said
    assert get_args(MethodSection.model_fields["kind"].annotation) == tuple(METHODS)


def test_json() -> None:
    out = CliRunner().invoke(app, ["--json"]).stdout
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["kind"] for one in found] == list(METHODS)
    one = json.loads(CliRunner().invoke(app, ["full", "--json"]).stdout)
    assert one == found[list(METHODS).index("full")]
    assert (one["rate"], one["keys"], one["merges"]) == (METHODS["full"].rate, [], True)
    assert one["matrix"]["fp32/bf16"]["glm"] == dict.fromkeys(COLUMNS)
    assert one["matrix"]["NF4"]["glm"]["resume"] == verdict("full", "glm", "nf4")["resume"]


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("lorra", "did you mean lora?"),
        ("P-Tuning", "did you mean p_tuning?"),
        ("xyz", f"there are {', '.join(METHODS)}"),
    ],
)
def test_what_is_no_method_is_one_line(kind: str, known: str) -> None:
    with pytest.raises(RecipeError) as caught:
        CliRunner().invoke(app, [kind], catch_exceptions=False)
    assert str(caught.value) == f"methods: {kind} is no method; {known}"


def test_piped_it_is_plain_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom luthier.cli.methods import methods\nmethods(None, False)\nmethods('lora', False)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert (done.stderr, lines[-1]) == ("", "[]")
    assert "\x1b" not in done.stdout and max(map(len, lines)) <= 104
    assert [line for line in lines if line != line.rstrip()] == []
