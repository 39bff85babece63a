"""Names of columns: what the published table knows, near misses, and the line to paste where it does not settle."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.sections import Columns

# Published in docs/data.md. A file with exactly one prompt and one answer column by these names needs no `columns`.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("instruction", "prompt", "question", "query", "content", "problem", "user", "human"),
    "more prompt": ("input", "context"),
    "response": ("output", "response", "answer", "completion", "summary", "target", "solution", "assistant"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
}

Found = Mapping[str, list[Any]]  # columns in the order of their first appearance, with their values that are not null


def named(kind: str, found: Found) -> list[str]:
    """The columns that the table knows as `kind`, in the table's order."""
    known = SYNONYMS[kind]
    return sorted((c for c in found if c.lower() in known), key=lambda column: known.index(column.lower()))


def listed(value: str | list[str] | None) -> list[str]:
    """One name, several or none, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else value


def join_names(columns: Mapping[str, Any] | Sequence[str]) -> str:
    """Names for a message; a nameless column (a CSV's saved index) is nothing to speak of."""
    return ", ".join(column for column in columns if column)


def unsettled(found: Found, given: Columns) -> str:
    """Why prompt and answer are not settled, with the line to paste.

    The guess goes by name, then by the order of the columns that hold texts and not the same one over and over.
    """
    texts = [
        column
        for column, values in found.items()
        if values and all(isinstance(value, str) for value in values)
        if len(set(values)) * 2 > len(values) and not re.search(r"(^|_)(id|idx|index|uuid|url)$", column.lower())
    ]
    prompt = listed(given.prompt) or [c for c in [*named("prompt", found), *texts] if c != given.response][:1]
    after = texts[texts.index(prompt[0]) :] if prompt and prompt[0] in texts else []
    answers = [c for c in [*named("response", found), *after, *texts] if c not in prompt]
    response = given.response or next(iter(answers), None)
    if not prompt and response is None:
        return f"no column holds texts {all_names(found)}"
    if not prompt or response is None:
        line = f"text: {json.dumps(f'{{{response or prompt[0]}}}', ensure_ascii=False)}"
        return f"no two columns for prompt and answer; for plain text put under data:\n  {line}\n{all_names(found)}"
    asked = _yaml(prompt[0]) if len(prompt) == 1 else f"[{', '.join(map(_yaml, prompt))}]"
    line = f"columns: {{prompt: {asked}, response: {_yaml(response)}}}"
    return (
        "the names of the columns do not settle which is the prompt and which the answer; put under data (a guess, to"
        f" be corrected; or give a text pattern):\n  {line}\n{all_names(found)}"
    )


def no_column(name: str, found: Mapping[str, Any]) -> str:
    """That a column is not there, with the nearest that is, and all that are."""
    lower = {column.lower(): column for column in found}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"no column {name!r}{f'; did you mean {lower[close[0]]!r}?' if close else ''} {all_names(found)}"


def all_names(found: Mapping[str, Any]) -> str:
    """Every column, for the end of a message."""
    return f"(the file's columns: {join_names(found)})"


def _yaml(name: str) -> str:
    plain = re.fullmatch(r"(?!(yes|no|on|off|true|false|null)$)[^\W\d]\w*", name, re.IGNORECASE)
    return name if plain else json.dumps(name, ensure_ascii=False)
