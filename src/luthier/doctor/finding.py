"""A line of doctor's, and the words that every check writes it in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

GIB = 2**30
LONG = 160
"""Characters of an error that are shown, where its first sentence has more."""

Mark = Literal["✓", "!", "✗"]


class Finding(NamedTuple):
    """✓ well, ! worth a look, ✗ no run can start. `fix`: what to do about ! and ✗, one command or setting."""

    mark: Mark
    what: str
    found: str
    fix: str = ""


def reason(error: BaseException) -> str:
    """The first line of what an error began with: transformers wraps a failed import twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = brief(str(error))
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def brief(text: str) -> str:
    """The first line of a text; of a long one its first sentence, and never half a word."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if len(line) > LONG:
        line = re.split(r"(?<=[.!?])\s", line)[0]
    return line if len(line) <= LONG else f"{line[: LONG + 1].rpartition(' ')[0] or line[:LONG]} …"


def short(path: Path) -> str:
    """A path as one would type it: from here, or from the home folder."""
    for start, sign in ((Path.cwd(), ""), (Path.home(), "~")):
        if path.is_relative_to(start):
            return "/".join(filter(None, [sign, *path.relative_to(start).parts])) or "."
    return str(path)
