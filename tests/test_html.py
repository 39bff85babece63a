"""Pages that need nothing but themselves, and in which data never becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from luthier.html import Html, escape, even, figures, histogram, join, page, table, tag, visible


class Read(HTMLParser):
    """What a browser makes of a page: its elements in order, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(name)
        if name not in ("meta", "br"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.text += data


EVIL = "<script>alert(1)</script> & \"quoted\" 'single' </title></style> 春 \x1b[31m\x00"


def test_a_string_is_escaped_wherever_it_goes_in() -> None:
    assert tag("td", EVIL, title=EVIL, class_="a") == (
        '<td title="&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quoted&quot; &#x27;single&#x27; '
        '&lt;/title&gt;&lt;/style&gt; 春 ␛[31m␀" class="a">&lt;script&gt;alert(1)&lt;/script&gt; &amp; '
        "&quot;quoted&quot; &#x27;single&#x27; &lt;/title&gt;&lt;/style&gt; 春 ␛[31m␀</td>"
    )
    whole = page(EVIL, EVIL, EVIL, table([EVIL], [[EVIL]]), figures([(EVIL, EVIL, EVIL)]))
    read = Read(whole)
    assert "script" not in read.elements
    assert read.open == []
    assert read.text.count("<script>alert(1)</script>") == 9


def test_markup_goes_in_as_it_is_and_only_once_escaped() -> None:
    assert tag("p", tag("b", "a < b"), " & c") == "<p><b>a &lt; b</b> &amp; c</p>"
    assert escape(escape("<")) == "&lt;"
    assert isinstance(join(["<", Html("<br>")]), Html)
    assert join(["<", Html("<br>")]) == "&lt;<br>"
    assert tag("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_controls_are_visible_and_lines_stay() -> None:
    assert visible("a\nb\tc\r\x07\x7f") == "a\nb\tc␍␇␡"
    assert visible("\x9b31m \u202egnirts \u2066") == "\\u009b31m \\u202egnirts \\u2066"
    assert visible("你好 😀 é") == "你好 😀 é"


def test_a_page_needs_nothing_from_outside() -> None:
    text = page("Title", "note", tag("p", "你好"), style=".own { color: red }")
    assert text.startswith('<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">')
    assert not re.search(r"https?:|src=|href=|url\(|@import|<link|<script", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "Noto Sans CJK SC" in text
    assert ".own { color: red }" in text


def test_bars_are_as_tall_as_their_counts_and_one_thing_is_seen() -> None:
    picture = histogram([1000, 0, 500, 1], [1, 2, 4, 8, 17], 16)
    assert re.findall(r'height="([\d.]+)"', picture) == ["40.00", "0.00", "20.00", "0.50"]
    assert re.findall(r"<title>(.*?)</title>", picture) == ["1 – 1: 1,000", "2 – 3: 0", "4 – 7: 500", "8 – 16: 1"]
    caption = "<span>1</span><span>rows by length in tokens; lengths on a log scale</span><span>16</span>"
    assert caption in picture


def test_bars_of_one_width_need_no_word_on_the_scale_and_end_with_the_longest() -> None:
    assert even([5, 6]) and even([20, 22, 24]) and not even([1, 2, 4])
    picture = histogram([2, 0, 1], [20, 22, 24, 26], 24)
    assert "<span>20</span><span>rows by length in tokens</span><span>24</span>" in picture
    assert re.findall(r"<title>(.*?)</title>", picture) == ["20 – 21: 2", "22 – 23: 0", "24 – 24: 1"]


def test_tables_and_figures() -> None:
    assert "<thead><tr><th>a</th></tr></thead><tbody><tr><td>1</td></tr></tbody>" in table(["a"], [["1"]])
    assert figures([("3", "rows")]) == '<dl class="figures"><div><dd>3</dd><dt>rows</dt></div></dl>'
    assert "<dt>rows<small>all of them</small></dt>" in figures([("3", "rows", "all of them")])
