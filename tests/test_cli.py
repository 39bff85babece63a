"""The command line's own part: exit statuses, one line a mistake, verbs that are where the help says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier import cli, verbs
from luthier.errors import DataError, LuthierError, ModelError, RecipeError, RunError

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["luthier", *arguments])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("error", "status"),
    [(RecipeError, 2), (DataError, 2), (ModelError, 2), (RunError, 1), (KeyboardInterrupt, 130)],
)
def test_what_an_error_ends_with(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], status: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("x.yaml:3: what, where, the bound, the remedy")

    monkeypatch.setattr(verbs, "look", fail)
    said = "" if error is KeyboardInterrupt else "error: x.yaml:3: what, where, the bound, the remedy\n"
    assert call("look", "x.yaml") == (status, "", said)
    if issubclass(error, LuthierError):
        with pytest.raises(error):
            call("--debug", "look", "x.yaml")


def test_every_problem_of_a_recipe_is_told_at_once(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: ./m}\ndata: {train: a.jsonl, cutoff_len: 5}\ntrain: {batch: 0, lrr: 1}\n")
    status, out, err = call("train", str(path))
    assert (status, out) == (2, "")
    for words in ("cutoff_len", "data.max_length", "train.batch", "train.lrr", "did you mean train.lr?"):
        assert words in err, err
    assert err.count("r.yaml:") >= 3


def test_recipe_verbs(call: Call, tmp_path: Path) -> None:
    status, out, _ = call("recipe", "schema")
    assert status == 0 and json.loads(out)["properties"].keys() >= {"model", "data", "method", "train"}
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    path = tmp_path / "new.yaml"
    assert call("recipe", "new", str(path))[0] == 0
    status, out, err = call("recipe", "new", str(path))
    assert (status, out) == (2, "") and "is there already" in err
    status, out, err = call("recipe", "show", str(path), "train.batch=7")
    assert status == 0, err
    assert yaml.safe_load(out)["train"]["batch"] == 7 and yaml.safe_load(out)["train"]["weight_decay"] == 0


def test_usage_is_exit_2(call: Call) -> None:
    assert call("train")[0] == 2
    assert call("tune", "x")[0] == 2
    status, out, _ = call("--help")
    assert status == 0 and not [line for line in out.splitlines()[1:] if line.endswith("...")]  # no summary is cut off
