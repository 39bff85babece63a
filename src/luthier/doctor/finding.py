"""A line of doctor's, and the words that every check writes it in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

GIB = 2**30

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
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def short(path: Path) -> str:
    """A path as one would type it: from here, or from the home folder."""
    for start, sign in ((Path.cwd(), ""), (Path.home(), "~")):
        if path.is_relative_to(start):
            return "/".join(filter(None, [sign, *path.relative_to(start).parts])) or "."
    return str(path)
