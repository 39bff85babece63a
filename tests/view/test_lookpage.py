"""What `luthier look` shows: taught tokens in colour or in brackets, the same facts on the screen and on the page."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from luthier.data.inspect import Check, Lengths, Look, Shown
from luthier.data.pieces import Piece
from luthier.view.lookpage import look_html, problems, show

PIECES = [
    Piece("<|im_start|>", (2,), False, True),
    Piece("user\n", (5,), False, False),
    Piece("[red]<b>&\x1b[31m", (6,), False, False),
    Piece("春", (7, 8, 9), True, False),
    Piece("天\n来", (10,), True, False),
    Piece("<|im_end|>", (3,), True, True),
    Piece("\n", (5,), False, False),
]
REPORT: dict[str, Any] = {
    "sources": [
        {"path": "a.jsonl", "part": "train", "rows": 1200, "weight": 2.0, "how": "alpaca: prompt = [red]"},
        {"path": "b.jsonl", "part": "eval", "rows": 34, "weight": 1.0, "how": "messages: turns = messages"},
    ],
    "template": "auto",
    "train_rows": 1199,
    "eval_rows": 34,
    "train_tokens": 56_789,
    "longest": 412,
}


def facts(**changes: Any) -> Look:
    ids = [id for piece in PIECES for id in piece.ids]
    given: dict[str, Any] = {
        "report": REPORT,
        "first_token": "<s>",
        "end_tokens": ["<|im_end|>", "</s>"],
        "supervised_share": 0.3214,
        "lengths": [Lengths("prompt", [1, 2, 3, 4, 5, 6, 7, 1234], [1, 0, 8, 4], [1, 5, 30, 200, 1235])],
        "checks": [
            Check("rows whose end is not taught", 2, 1199, ["a.jsonl:3", "a.jsonl:[9]"], "wrong"),
            Check("exact copies", 1, 1199, ["a.jsonl:7 = a.jsonl:5"]),
            Check("bad rows, left out", 0, 1200, []),
            Check("near copies", 0, 1199, []),
        ],
        "rows": [Shown("a.jsonl:17", ids, PIECES), Shown("a.jsonl:18", list(range(100)), PIECES)],
    }
    return Look(**{**given, **changes})


def printed(width: int = 80, **console: Any) -> str:
    screen = Console(file=StringIO(), width=width, legacy_windows=False, **console)
    show(facts(), screen)
    assert isinstance(screen.file, StringIO)
    return screen.file.getvalue()


def test_the_screen_without_colour() -> None:
    lines = [line.rstrip() for line in printed().splitlines()]
    assert lines == [
        "template auto: a row begins with <s>; an answer ends with <|im_end|> or </s>",
        "56,789 tokens to train on, 32.1 % of them taught",
        "",
        "tokens  min  5 %  25 %  50 %  75 %  95 %  99 %    max",
        "prompt    1    2     3     4     5     6     7  1,234",
        "",
        "prompt  1  ▁ █▄  1,234  log scale",
        "",
        "✗  2 of 1,199  rows whose end is not taught",
        "               a.jsonl:3",
        "               a.jsonl:[9]",
        "!  1 of 1,199  exact copies",
        "               a.jsonl:7 = a.jsonl:5",
        "✓        none  2 checks found nothing: bad rows, left out; near copies",
        "",
        "Rows as the model sees them. ⟦taught⟧ is what it learns to write; the rest it",
        "reads.",
        "a.jsonl:17 · 9 tokens, 5 taught ────────────────────────────────────────────────",
        "<|im_start|>user",
        "[red]<b>&␛[31m⟦春天⏎",
        "来<|im_end|>⟧",
        "",
        "ids 2 5 6 7 8 9 10 3 5",
        "a.jsonl:18 · 100 tokens, 5 taught ──────────────────────────────────────────────",
        "<|im_start|>user",
        "[red]<b>&␛[31m⟦春天⏎",
        "来<|im_end|>⟧",
        "",
        "ids " + " ".join(map(str, range(24))) + " … 100 in all",
    ]


def test_a_terminal_has_colours_and_no_brackets() -> None:
    text = printed(force_terminal=True, color_system="standard")
    assert "⟦" not in text
    assert "\x1b[32m春\x1b[0m\x1b[32m天⏎" in text
    assert "\x1b[7;35m<|im_start|>\x1b[0muser" in text
    assert "\x1b[31m<" not in text, "the data's own escape must not reach the terminal"


@pytest.mark.parametrize("console", [{"no_color": True, "force_terminal": True}, {"color_system": None}])
def test_without_colour_brackets_stand_in(console: dict[str, Any]) -> None:
    assert "⟦春天⏎" in re.sub(r"\x1b\[[\d;]*m", "", printed(**console))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_screen(width: int) -> None:
    assert max(cell_len(line) for line in printed(width).splitlines()) <= width


def test_the_page() -> None:
    page = look_html(facts())
    assert not re.search(r"https?:|src=|href=|url\(|<script", page)
    assert '<span class="token special" title="id 2">&lt;|im_start|&gt;</span>' in page
    assert '<span class="token" title="id 6">[red]&lt;b&gt;&amp;␛[31m</span>' in page
    assert '<span class="token taught" title="ids 7 8 9">春</span>' in page
    assert '<span class="token taught" title="id 10">天<span class="soft">⏎</span>\n来</span>' in page
    assert '<span class="token taught special" title="id 3">&lt;|im_end|&gt;</span>' in page
    assert '<div class="ids">' + " ".join(map(str, range(100))) + "</div>" in page  # all of them
    assert "<dd>32.1 %</dd><dt>of them taught</dt>" in page
    assert "<td>✗</td><td>2 of 1,199</td><td>rows whose end is not taught" in page
    fine = '<details><summary><span class="fine">✓</span> 2 checks found nothing</summary>'
    assert f"{fine}<ul><li>bad rows, left out</li><li>near copies</li></ul></details>" in page
    assert "<h1>The data as the model sees it</h1><p>template auto: " in page
    assert "<td>alpaca: prompt = [red]</td>" in page
    assert "<title>30 – 199: 8</title>" in page


def test_the_page_says_what_it_is_about() -> None:
    page = look_html(facts(), recipe="<q>.yaml", model="/far/away/tiny")
    assert "<title>&lt;q&gt;.yaml: the data as the model sees it</title>" in page
    assert "<p>model tiny · template auto: " in page
    assert "<p>model hf:a/b · template auto: " in look_html(facts(), recipe="q.yaml", model="hf:a/b")


def test_ids_take_one_line_and_all_of_it() -> None:
    ids = [line for line in printed(120).splitlines() if line.startswith("ids ")]
    assert ids == ["ids 2 5 6 7 8 9 10 3 5", "ids " + " ".join(map(str, range(38))) + " … 100 in all"]


def test_where_every_check_found_something_none_found_nothing() -> None:
    page = look_html(facts(checks=[Check("exact copies", 1, 9, ["a"])]))
    assert "found nothing" not in page and "<td>1 of 9</td>" in page
    assert "1 check found nothing" in look_html(facts(checks=[Check("exact copies", 0, 9, [])]))


def test_only_what_is_wrong_is_a_problem() -> None:
    assert problems(facts()) == ["rows whose end is not taught: 2 of 1,199 (a.jsonl:3, a.jsonl:[9])"]
    assert problems(facts(checks=[])) == []
