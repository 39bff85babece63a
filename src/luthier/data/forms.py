"""Rows of one shape written alike: what stands around the contents is encoded once, and only the contents are new.

A *form* is made from a probe: a conversation of the shape with a stand-in for each content, rendered, cut at its
special tokens and given its targets as any row. It serves every other row of the shape only where none of these steps
could have gone another way by a content; else there is no form, and rows are rendered and cut one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from luthier.data.formats import Conversation, Message
from luthier.data.templates import CLOSE, OPEN, Marks, Rendered, Segment

BEGIN, END, BLANK = "\ufdd2", "\ufdd3", "\x1f"
"""A stand-in's ends, and the white space around it: where that is gone, the template strips contents."""
_STAND_IN = re.compile(f"({BLANK}?){BEGIN}(\\d+){END}({BLANK}?)")


class Section(NamedTuple):
    """A stretch of text without special tokens: encoded as one. `head`: it begins a text (and its first word)."""

    pieces: tuple[Segment, ...]
    head: bool

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


class Mark(NamedTuple):
    """A special token of the template, packed."""

    id: bytes
    supervised: bool


def texts_of(plan: Iterable[Section | Mark]) -> Iterator[tuple[bool, str]]:
    """What has to be encoded of a text: every section, and what comes before each of its borders."""
    for unit in plan:
        if isinstance(unit, Section):
            before = ""
            for text, _ in unit.pieces:
                before += text
                yield unit.head, before


class Hole(NamedTuple):
    """A section around one content: `before` + content + `behind`. Its first `known` are ids that come before the
    border, if there is one; what follows them is supervised or not as a whole."""

    before: str
    behind: str
    message: int
    stripped: bool
    head: bool
    known: bytes
    supervised: bool

    def text(self, contents: Sequence[str]) -> str:
        content = contents[self.message]
        return f"{self.before}{content.strip() if self.stripped else content}{self.behind}"


class Form(NamedTuple):
    """units: ids that are the same in every row, with whether they are supervised, and holes.
    whole: the text that a row is known by, in pieces; `places` are those that are a content, and stripped or not."""

    units: tuple[tuple[bytes, bool] | Hole, ...]
    holes: tuple[Hole, ...]
    whole: tuple[str, ...]
    places: tuple[tuple[int, int, bool], ...]

    def filled(self, contents: Sequence[str], conversation: Conversation) -> Filled:
        whole = list(self.whole)
        for at, message, stripped in self.places:
            whole[at] = contents[message].strip() if stripped else contents[message]
        return Filled(self, [(hole.head, hole.text(contents)) for hole in self.holes], "".join(whole), conversation)

    def parts(self, found: Sequence[bytes]) -> list[tuple[bytes, bool]] | None:
        """The row's ids with those of its holes, piece by piece; None where a token straddles a border."""
        parts, ids = [], iter(found)
        for unit in self.units:
            if isinstance(unit, Hole):
                whole = next(ids)
                if not whole.startswith(unit.known):
                    return None
                parts.append((whole[len(unit.known) :], unit.supervised))
            else:
                parts.append(unit)
        return parts


class Filled(NamedTuple):
    """A row to be encoded by its form. `conversation`: to render it by itself where the form does not serve it."""

    form: Form
    texts: list[tuple[bool, str]]  # of its holes, with whether they are a text's head
    known_by: str
    conversation: Conversation


def probe(roles: Sequence[str]) -> Conversation:
    """A conversation of the shape, with stand-ins."""
    said = [f"{BLANK}{BEGIN}{i}{END}{BLANK}" for i in range(len(roles))]
    return Conversation(tuple(map(Message, roles, said)))


def is_plain(content: str, marks: Marks) -> bool:
    """A content that stands in a row as it is: words in it, and neither special tokens spelt out nor stand-ins."""
    return not (OPEN in content or CLOSE in content or content.isspace() or not content or marks.spelt.search(content))


def form_of(
    rendered: Rendered,
    plan: Sequence[Section | Mark],
    marks: Marks,
    encode: Callable[[str, bool], bytes],
) -> Form | None:
    """The form that a probe shows, from how it was rendered and cut; None where a content could change that.

    encode(text, head): ids of a section's text.
    """
    if len(rendered) != 1 or any(map(str.isalnum, marks.names)) or any(map(any, marks.wide.values())):
        return None
    if not all(_apart_from_contents(text, taught, marks) for text, taught in rendered[0]):
        return None
    units: list[tuple[bytes, bool] | Hole] = []
    for unit in plan:
        made = [(unit.id, unit.supervised)] if isinstance(unit, Mark) else _section(unit, encode)
        if made is None:
            return None
        units += made
    whole, places = [""], []
    for text, _ in rendered[0]:
        first, *others = _STAND_IN.split(text)
        whole[-1] += first
        for blank, number, _, behind in zip(*(others[i::4] for i in range(4)), strict=True):
            places.append((len(whole), int(number), not blank))
            whole += ["", behind]
        whole[-1] += "\0"
    return Form(_merged(units), tuple(u for u in units if isinstance(u, Hole)), tuple(whole), tuple(places))


def _apart_from_contents(text: str, taught: bool, marks: Marks) -> bool:
    """Whether special tokens are found in this segment at the same places around any contents, and its end too."""
    first, *others = _STAND_IN.split(text)
    around = [first, *others[3::4]]
    blanks = list(zip(others[::4], others[2::4], strict=True))
    if any(BLANK in part or BEGIN in part for part in around) or any(a != b for a, b in blanks):
        return False
    if taught and (len(around) != 2 or around[0] or not any(around[1].endswith(name) for name in marks.names)):
        return False  # an answer is its words, and ends with the first special token behind them
    for i, part in enumerate(around):
        for name in marks.names:
            for cut in range(1, len(name)):
                # part of the name in the content, the rest here: behind a content, or before one
                if i > 0 and (part.startswith(name[cut:]) or name[cut:].startswith(part)):
                    return False
                if i < len(around) - 1 and part and (part.endswith(name[:cut]) or name[:cut].endswith(part)):
                    return False
    return True


def _section(section: Section, encode: Callable[[str, bool], bytes]) -> list[tuple[bytes, bool] | Hole] | None:
    """A section's units: ids alone where no content is in it, else the text of one content and what is around it."""
    *before, (text, supervised) = section.pieces
    if len(before) > 1 or any(_STAND_IN.search(piece.text) for piece in before):
        return None
    left, known = "".join(piece.text for piece in before), b""
    units: list[tuple[bytes, bool] | Hole] = []
    if before:
        known = encode(left, section.head)
        units.append((known, before[0].supervised))
    split = _STAND_IN.split(text)
    if len(split) == 1 and not before:
        return [(encode(text, section.head), supervised)]
    if len(split) != 5:
        return None
    first, blank, number, _, behind = split
    return [*units, Hole(left + first, behind, int(number), not blank, section.head, known, supervised)]


def _merged(units: Sequence[tuple[bytes, bool] | Hole]) -> tuple[tuple[bytes, bool] | Hole, ...]:
    """Neighbours that are the same in every row, as one."""
    made: list[tuple[bytes, bool] | Hole] = []
    for unit in units:
        last = made[-1] if made else None
        if not isinstance(unit, Hole) and last is not None and not isinstance(last, Hole) and last[1] == unit[1]:
            made[-1] = (last[0] + unit[0], unit[1])
        else:
            made.append(unit)
    return tuple(made)
