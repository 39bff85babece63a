"""A JSON array read element by element, so that a file of any length needs the memory of its longest element."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from luthier.errors import DataError

_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\r\n]*")


def elements(chunks: Iterator[str], file: str) -> Iterator[tuple[Any, str, int]]:
    """Each element's value, its text and the line on which it begins, from pieces of the file's text.

    Elements that begin on one line are numbered on, since a row is known by its line: in an array without line breaks
    it is the element's number.
    Errors: DataError naming file, line and column where the array is broken; nothing behind that place can be read.
    """
    window = _Window(chunks, file)
    window.skip("[")
    number = 0
    more = window.peek() != "]"
    while more:
        value, text, line = window.element()
        number = max(line, number + 1)
        yield value, text, number
        more = window.peek() == ","
        if more:
            window.skip(",")
    window.skip("]")
    if window.peek():
        raise window.error("text behind the array's end")


class _Window:
    """The part of the text that is being read. `at` is the next character, on `line` and `column` (from 1)."""

    def __init__(self, chunks: Iterator[str], file: str) -> None:
        self.chunks = chunks
        self.file = file
        self.text = ""
        self.at = 0
        self.line = self.column = 1

    def peek(self) -> str:
        """Go to the next character that is not blank. "" at the end of the file."""
        while True:
            blanks = _BLANKS.match(self.text, self.at)
            assert blanks is not None
            self._advance(blanks.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def skip(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.error(f"{character!r} is missing" + ("" if found else " (the file ends)"))
        self._advance(self.at + 1)

    def element(self) -> tuple[Any, str, int]:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or not self._more():
                    break
            except (ValueError, RecursionError) as error:
                place = getattr(error, "pos", self.at)
                message = getattr(error, "msg", str(error))
                # Cut off by the window's end, or broken? The longest word that can be cut is -Infinity.
                cut_off = message.startswith("Unterminated string") or len(self.text) - place < 10
                if not (cut_off and self._more()):
                    self._advance(max(place, self.at))
                    raise self.error(message) from error
        line, text = self.line, self.text[self.at : end]
        self._advance(end)
        return value, text, line

    def error(self, message: str) -> DataError:
        return DataError(f"{self.file}:{self.line}:{self.column}: broken JSON array: {message}")

    def _advance(self, to: int) -> None:
        newlines = self.text.count("\n", self.at, to)
        self.line += newlines
        self.column = to - self.text.rfind("\n", self.at, to) if newlines else self.column + to - self.at
        self.at = to

    def _more(self) -> bool:
        """Read at least as much again as is waiting, so that a long element costs linear time. False: the end."""
        waiting = len(self.text) - self.at
        pieces: list[str] = []
        while sum(map(len, pieces)) <= waiting and (chunk := next(self.chunks, None)) is not None:
            pieces.append(chunk)
        if pieces:
            self.text, self.at = "".join([self.text[self.at :], *pieces]), 0
        return bool(pieces)
