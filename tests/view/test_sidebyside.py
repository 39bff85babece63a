"""A comparison on the terminal, in Markdown and as a page: aligned, whole, and nothing in an answer is markup."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from luthier.compare import Comparison, Pair, Question
from luthier.generate import Reply
from luthier.view.sidebyside import compare_html, flips_first, markdown, new_words, show, wrapped


def reply(text: str, stopped: bool = True, tokens: int = 10) -> Reply:
    return Reply(text, [7] * tokens, stopped)


EVIL = "<b>x</b> | `y` *z* [red]_\n\x1b[31m\\"
PROMPT = Pair(Question("prompt 1", "你是谁？", [1]), reply("我是一个语言模型。", False, 20), reply("我是甄嬛。"))
ODD = Pair(Question("prompt 2", EVIL, [1]), reply(EVIL), reply(""))
RIGHT = Pair(Question("e:1", "one", [1], "yes"), reply("yes"), reply("yes"))
WRONG = Pair(Question("e:2", "two", [1], "yes"), reply("no"), reply("no"))
WON = Pair(Question("e:3", "three", [1], "yes"), reply("no"), reply(" yes\n"))
LOST = Pair(Question("e:4", "four", [1], "yes"), reply("yes"), reply("no"))
ALL = Comparison([PROMPT, ODD, RIGHT, WRONG, WON, LOST], 12.3456)


def printed(comparison: Comparison = ALL, width: int = 80, **console: Any) -> str:
    screen = Console(file=StringIO(), width=width, legacy_windows=False, **console)
    show(comparison, screen)
    assert isinstance(screen.file, StringIO)
    return screen.file.getvalue()


def test_the_screen() -> None:
    few = Comparison([PROMPT, WON, LOST], 12.3456)
    assert [line.rstrip() for line in printed(few, 62).splitlines()] == [
        "The recipe's prompts",
        "┏━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━┓",
        "┃ prompt             ┃ base              ┃ tuned             ┃",
        "┡━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━┩",
        "│ 你是谁？           │ 我是一个语言模    │ 我是甄嬛。        │",
        "│                    │ 型。              │                   │",
        "│                    │ [did not stop: 20 │                   │",
        "│                    │ tokens]           │                   │",
        "└────────────────────┴───────────────────┴───────────────────┘",
        "Held-out rows",
        "┏━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━┓",
        "┃ prompt             ┃ base              ┃ tuned             ┃",
        "┡━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━┩",
        "│ four               │ ✓ yes             │ ✗ no              │",
        "│ = yes              │                   │                   │",
        "├────────────────────┼───────────────────┼───────────────────┤",
        "│ three              │ ✗ no              │ ✓ yes             │",
        "│ = yes              │                   │                   │",
        "└────────────────────┴───────────────────┴───────────────────┘",
        "",
        "   50 % → 50 %  of 2 held-out rows answered exactly",
        "             1  rows wrong before, right now",
        "             1  rows right before, wrong now",
        "66.7 % → 100 %  of the answers stopped by themselves",
        "       13 → 10  tokens in an answer, on average",
        "          12.3  largest difference of a logit",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_chinese_is_aligned(width: int) -> None:
    framed = [line for line in printed(width=width).splitlines() if line[:1] in ("│", "├", "┏")]
    assert {cell_len(line) for line in framed} == {width}


def test_nothing_in_an_answer_steers_the_terminal() -> None:
    text = printed(force_terminal=True, color_system="standard")
    assert "\x1b[31m\\" not in text
    assert "<b>x</b> | `y` *z*" in text
    assert "[red]_" in text
    assert "␛[31m\\" in text
    assert "(nothing)" in text


def test_a_long_answer_is_cut_and_that_is_said() -> None:
    pair = Pair(Question("prompt 1", "p", [1]), reply("x" * 5300), reply("y"))
    text = printed(Comparison([pair], 1.0))
    assert text.count("x") == 300
    assert "… (+5,000" in text
    assert "x" * 5300 in compare_html(Comparison([pair], 1.0))


def test_flips_come_first_and_the_screen_shows_ten_rows() -> None:
    assert flips_first([RIGHT, WON, WRONG, LOST]) == [LOST, WRONG, WON, RIGHT]
    text = printed(Comparison([RIGHT] * 25 + [LOST], 1.0))
    assert text.count("= yes") == 10
    assert text.index("four") < text.index("one")
    assert "… and 16 more held-out rows in compare.html" in text
    assert compare_html(Comparison([RIGHT] * 25 + [LOST], 1.0)).count("= yes") == 26


def test_markdown() -> None:
    assert markdown(ALL).splitlines() == [
        "# Base and tuned on the same prompts",
        "",
        "- **50 % → 50 %** of 4 held-out rows answered exactly",
        "- **1** rows wrong before, right now",
        "- **1** rows right before, wrong now",
        "- **83.3 % → 100 %** of the answers stopped by themselves",
        "- **12 → 10** tokens in an answer, on average",
        "- **12.3** largest difference of a logit <sub>(0 would mean that the tuning does nothing)</sub>",
        "",
        "## The recipe's prompts",
        "",
        "| prompt | base | tuned |",
        "|---|---|---|",
        r"| 你是谁？ | 我是一个语言模型。 \[did not stop\] | 我是甄嬛。 |",
        r"| \<b\>x\</b\> \| \`y\` \*z\* \[red\]\_<br>␛\[31m\\ "
        r"| \<b\>x\</b\> \| \`y\` \*z\* \[red\]\_<br>␛\[31m\\ | (nothing) |",
        "",
        "## Held-out rows",
        "",
        "| row | prompt | its answer | base | tuned |",
        "|---|---|---|---|---|",
        "| e:4 | four | yes | ✓ yes | ✗ no |",
        "| e:2 | two | yes | ✗ no | ✗ no |",
        "| e:3 | three | yes | ✗ no | ✓ yes |",
        "| e:1 | one | yes | ✓ yes | ✓ yes |",
    ]


def test_the_page() -> None:
    page = compare_html(ALL)
    assert not re.search(r"https?:|src=|href=|url\(|<script|<b>", page)
    assert "<td>你是谁？</td>" in page
    assert '<td>我是一个语言模型。<div class="soft">did not stop: 20 tokens</div></td>' in page
    assert "<td>我是<mark>甄嬛</mark>。</td>" in page
    assert '<td><span class="right">✓ </span>yes</td><td><span class="wrong">✗ </span><mark>no</mark></td>' in page
    assert '<div class="soft">= yes</div><div class="soft ids">e:4</div>' in page
    assert '<span class="soft">(nothing)</span>' in page
    assert "<dd>50 % → 50 %</dd><dt>of 4 held-out rows answered exactly</dt>" in page
    assert "largest difference of a logit<small>0 would mean that the tuning does nothing</small></dt>" in page
    assert re.findall(r'ids">(e:\d)', page) == ["e:4", "e:2", "e:3", "e:1"]
    assert "<h1>Base and tuned on the same prompts</h1>" in page


def test_the_page_and_the_markdown_say_what_they_are_about() -> None:
    page = compare_html(ALL, name="<town>", about="tiny & co · LoRA of rank 4 · kept: step 9")
    assert "<title>&lt;town&gt;: base and tuned</title>" in page
    assert "<h1>&lt;town&gt;: base and tuned</h1><p>tiny &amp; co · LoRA of rank 4 · kept: step 9<br>Held-out" in page
    lines = markdown(ALL, name="<town>", about="tiny_1 · kept: step 9").splitlines()
    assert lines[:4] == [r"# \<town\>: base and tuned", "", r"tiny\_1 · kept: step 9", ""]
    assert lines[4].startswith("- **50 %")


def test_without_held_out_rows_there_is_no_word_of_them() -> None:
    for text in (printed(Comparison([PROMPT], 1.0)), markdown(Comparison([PROMPT], 1.0))):
        assert "eld-out rows" not in text
    assert "<h2>Held-out rows" not in compare_html(Comparison([PROMPT], 1.0))
    assert "recipe's prompts" not in markdown(Comparison([RIGHT], 1.0))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("in the old town", "in the new town", [("in the ", False), ("new", True), (" town", False)]),
        ("I do not know", "by the river", [("by the river", True)]),
        ("我是模型。", "我是甄嬛。", [("我是", False), ("甄嬛", True), ("。", False)]),
        ("same", "same", [("same", False)]),
        ("all gone", "", []),
        ("", "new", [("new", True)]),
        ("naïve café", "naïve cafés", [("naïve ", False), ("cafés", True)]),
        (
            "我不知道约里和伊索在哪里见面。",
            "在高原村，伊索带胡椒面。",
            [("在高原村，", True), ("伊索", False), ("带胡椒面", True), ("。", False)],
        ),
        ("他在家里吃饭。", "他去河边在沙地里睡觉。", [("他", False), ("去河边在沙地里睡觉", True), ("。", False)]),
        ("one, a two b", "six, a ten b", [("six, a ten", True), (" b", False)]),
        ("go home, now", "go, now", [("go, now", False)]),
    ],
)
def test_new_words(before: str, after: str, expected: list[tuple[str, bool]]) -> None:
    assert new_words(before, after) == expected
    assert "".join(text for text, _ in new_words(before, after)) == after


def test_lines_break_between_chinese_characters_and_never_before_their_stops() -> None:
    assert wrapped("✗ 我不知道朱妮和碧塔在哪里见面。", 14) == "✗ 我不知道朱妮\n和碧塔在哪里见\n面。"
    assert wrapped("一二三，四", 6) == "一二\n三，四"
    assert wrapped("Where will Britta meet Tomas?", 12) == "Where will\nBritta meet\nTomas?"
    assert wrapped("abcdefgh ij\n\nk", 3) == "abc\ndef\ngh\nij\n\nk"
    assert all(cell_len(line) <= 9 for line in wrapped("混合 mixed 文字 with words", 9).splitlines())
