"""Prompts given in a recipe or by a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.errors import DataError
from luthier.recipe import load_prompts, read_prompts
from luthier.sections import GenerateSection


def test_prompts_in_the_recipe_and_in_files(tmp_path: Path) -> None:
    assert load_prompts(GenerateSection(prompts=["a", "b"])) == ["a", "b"]
    text = tmp_path / "p.txt"
    text.write_bytes("\ufeffone\n\n二\n".encode())
    assert load_prompts(GenerateSection(prompts=str(text))) == ["one\n\n二\n"]
    (tmp_path / "prompt").write_text("x")
    assert read_prompts(tmp_path / "prompt") == ["x"]
    lines = tmp_path / "p.jsonl"
    chat = [{"role": "user", "content": "x"}]
    rows: list[object] = ["a\nb", {"prompt": "c", "id": 3}, {"messages": chat}]
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    assert load_prompts(GenerateSection(prompts=str(lines))) == ["a\nb", "c", chat]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'"a"\n{"prompt": \n', ":2: broken JSON: Expecting value (column 12)"),
        (
            "p.jsonl",
            b'{"text": "a"}\n',
            ':1: not a prompt; a line is a text, {"prompt": "…"} or {"messages": [{"role": …, "content": …}]}',
        ),
        (
            "p.jsonl",
            b'{"messages": [{"role": "user"}]}\n',
            ':1: not a prompt; a line is a text, {"prompt": "…"} or {"messages": [{"role": …, "content": …}]}',
        ),
        ("p.jsonl", b"\n", ": holds no prompt"),
        ("p.txt", b" \n", ": holds no prompt"),
        ("p.txt", "甄嬛".encode("gbk"), ": not UTF-8 (byte 0); save it as UTF-8"),
    ],
)
def test_prompt_files_that_hold_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_prompts(GenerateSection(prompts=str(tmp_path / name)))
    assert str(caught.value) == f"{tmp_path / name}{message}"
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)$"):
        load_prompts(GenerateSection(prompts=str(tmp_path / "none.txt")))
