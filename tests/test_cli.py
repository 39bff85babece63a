"""The command line's own part: exit statuses, one line a mistake, verbs that are where the help says."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from luthier import verbs
from luthier.cli import main as cli
from luthier.errors import DataError, LuthierError, ModelError, RecipeError, RunError
from luthier.folder import RunFolder, write_atomic

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
    said = "interrupted;" if error is KeyboardInterrupt else "error:"
    assert call("look", "x.yaml") == (status, "", f"{said} x.yaml:3: what, where, the bound, the remedy\n")
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
    assert "\n  virtual_tokens: null\n" in call("recipe", "new", "--kind", "p_tuning")[1]
    assert call("recipe", "new", "--kind", "lara")[2] == "error: --kind: there is no method lara; did you mean lora?\n"
    status, out, err = call("recipe", "show", str(path), "train.batch=7")
    assert status == 0, err
    assert yaml.safe_load(out)["train"]["batch"] == 7 and yaml.safe_load(out)["train"]["weight_decay"] == 0


def test_usage_is_exit_2(call: Call) -> None:
    assert call("train")[0] == 2
    assert call("tune", "x")[0] == 2
    status, out, _ = call("--help")
    assert status == 0 and not [line for line in out.splitlines()[1:] if line.endswith("...")]  # no summary is cut off


def test_options_of_the_line_itself(call: Call) -> None:
    _, out, _ = call("--help")
    assert "--debug" in out and "--version" in out
    assert call("--version") == (0, f"luthier {version('luthier')}\n", "")


def test_files_that_cannot_be_written_or_read_are_one_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("recipe", "new", "no/x.yaml") == (2, "", "error: no/x.yaml: No such file or directory\n")
    with pytest.raises(FileNotFoundError):
        call("--debug", "recipe", "new", "no/x.yaml")
    (tmp_path / "file").write_text("")
    for path, reason in [("no/x", "No such file or directory"), ("file/x", "Not a directory")]:
        monkeypatch.setattr(verbs, "look", lambda *_, path=path, **__: write_atomic(Path(path), "x"))
        assert call("look", "r.yaml") == (2, "", f"error: {path}: {reason}\n")  # the file, not the temporary one


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_mistake_of_the_users(call: Call, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(verbs, "look", lambda *_, **__: write_atomic(Path("look.html"), "x"))
    assert call("look", "r.yaml") == (1, "", f"error: look.html: {os.strerror(number)}; free some space\n")


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_standard_input_that_is_not_utf_8(call: Call, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("甄嬛\n".encode("gbk")), encoding="utf-8"))
    monkeypatch.setattr(verbs, "generate", lambda *_, standard_input, **__: standard_input())
    monkeypatch.setattr(verbs, "chat", lambda *_, read, **__: read())
    assert call(verb, "model") == (2, "", "error: standard input: not UTF-8 (byte 0); send UTF-8\n")


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_quickstart_that_is_stopped_says_how_to_go_on(
    call: Call, monkeypatch: pytest.MonkeyPatch, stop: int, status: int
) -> None:
    run = SimpleNamespace(
        folder=RunFolder(Path.cwd() / "runs" / "quickstart"), outcome=SimpleNamespace(stopped=int(stop), steps=5)
    )
    monkeypatch.setattr(verbs, "quickstart", lambda *_, **__: run)
    said = "stopped at step 5; go on with: luthier train runs/quickstart --resume\n"
    assert call("quickstart") == (status, said, "")


def test_strength_on_the_command_line(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = SimpleNamespace(method=SimpleNamespace(kind="lora"))
    run = SimpleNamespace(folder=RunFolder(Path.cwd() / "runs" / "town"), recipe=recipe)
    monkeypatch.setattr("luthier.runs.find_run", lambda name: SimpleNamespace(path=tmp_path / name))
    monkeypatch.setattr("luthier.run.open_run", lambda path: run)
    asked: list[Any] = []
    monkeypatch.setattr(verbs, "compare", lambda run, **options: asked.append(options["rows"]))
    monkeypatch.setattr(verbs, "merge", lambda run, out, **options: asked.append(options["strength"]))
    best: list[float | None] = [0.75, None]

    def strengths(run: Any, *, rows: int | None, text: Path | None, say: Any) -> Any:
        asked.append((rows, text))
        return SimpleNamespace(best=best.pop(0))

    monkeypatch.setattr(verbs, "strengths", strengths)
    assert call("compare", "--strength", "town") == (0, "next: luthier merge runs/town --strength 0.75 -o DIR\n", "")
    arguments = ("compare", "town", "--strength", "--rows", "9", "--text", "mine.txt")
    assert call(*arguments) == (0, "next: luthier merge runs/town -o DIR\n", "")
    assert call("compare", "town")[0] == 0
    assert call("merge", "town", "-o", "out", "--strength", "0.7")[0] == 0
    assert call("merge", "town", "-o", "out")[0] == 0
    assert asked == [(None, None), (9, Path("mine.txt")), 128, "0.7", "1"]
    said = "error: --text goes with --strength or --methods: it measures what is forgotten\n"
    assert call("compare", "town", "--text", "mine.txt") == (2, "", said)
