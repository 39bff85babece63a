"""Rows a second from a JSON-lines file of messages to token ids with labels, cold, each by its own preparation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cells import DATA, Cell, conversation, read_rows, write_rows
from contestants import Contestant, turn

ROWS = 1500
"""Of the data set, or all that it has: enough for seconds, few enough for the slowest."""
TIMEOUT = 120.0


def prepared(
    cell: Cell, everyone: Sequence[Contestant], folder: Path, data: Path, threads: int, say: Callable[[str], None]
) -> dict[str, float]:
    """Rows a second by group; one that fails is missing, and said."""
    talks = (conversation(cell, row) for row in read_rows(data / DATA[cell.data].file))
    rows = [{"messages": talk} for talk in talks if all(turn["content"] for turn in talk)][:ROWS]
    write_rows(folder / "messages.jsonl", rows)
    found: dict[str, float] = {}
    for group, first in {one.group: one for one in reversed(everyone)}.items():
        say(f"  {group}: preparing {len(rows):,} rows …")
        job: dict[str, Any] = {"group": group, "max_length": DATA[cell.data].max_length}
        # Its environment is known by its script, as is that of its training.
        turned = turn(
            Contestant(f"prepare {group}", group, first.script, job=job), folder, 1, threads, TIMEOUT, "encode"
        )
        if "failed" in turned:
            say(f"  {group}: preparation failed, {turned['failed']}")
            continue
        found[group] = turned["rows"] / turned["seconds"]
    return found
