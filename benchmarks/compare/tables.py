"""A cell's result → its lines → the table on the screen, and that of docs/performance.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import SHAPES, shared_work, useful_work

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
OURS = "Luthier"
HEADINGS = [
    "contestant",
    "s a step",
    "Luthier is",
    "peak memory",
    "above imports",
    "utilisation",
    "effective rate",
    "prepared",
    "loss, gradient, next loss",
]


@dataclass(frozen=True)
class Line:
    """A contestant's medians. seconds: of a step; spread: least and most of them; memory in MiB; rates in FLOP/s;
    first, norm: loss and gradient of
    the first step; second: loss of the second, "–" where there is none; prepared: rows a second, None where unknown."""

    name: str
    group: str
    seconds: float
    spread: tuple[float, float]
    peak: float
    above: float
    useful: float
    work: float
    first: float
    norm: float
    second: str
    prepared: float | None

    def against(self, ours: Line) -> float:
        """How many times as long its step takes as `ours`."""
        return self.seconds / ours.seconds


def lines_of(result: dict[str, Any]) -> list[Line]:
    """Of everyone with at least one turn, in the order of the turns."""
    shape, rows = SHAPES[result["cell"]["shape"]], [(t, s) for t, s in result["lengths"]]
    found = []
    for one in result["contestants"]:
        turns = [turn for turn in result["turns"].get(one["name"], []) if "failed" not in turn]
        if not turns:
            continue
        seconds = [value for turn in turns for value in turn["seconds"][one["excluded"] :]]
        useful, tokens = useful_work(shape, rows), sum(t for t, _ in rows)
        spared = max(0, tokens - turns[0].get("computed", tokens))
        found.append(
            Line(
                name=one["name"],
                group=one["group"],
                seconds=statistics.median(seconds),
                spread=(min(seconds), max(seconds)),
                peak=statistics.median(turn["peak_mib"] for turn in turns),
                above=statistics.median(turn["above_imports_mib"] for turn in turns),
                useful=useful,
                work=shared_work(shape, rows, spared, result["common_prefix"]),
                first=turns[0]["losses"][0],
                norm=turns[0]["norms"][0],
                second=f"{turns[0]['losses'][1]:.4f}" if len(turns[0]["losses"]) > 1 else "–",
                prepared=result["preparation"].get(one["group"]),
            )
        )
    return found


def best(lines: Sequence[Line], group: str) -> Line | None:
    """The fastest of a group."""
    return min((line for line in lines if line.group == group), key=lambda line: line.seconds, default=None)


def whole(lines: Sequence[Line], result: dict[str, Any]) -> Line | None:
    """Luthier as it is by default: every rung but what is off by default."""
    names = [one["name"] for one in result["contestants"] if one["rung"]]
    return next((line for line in lines if names and line.name == names[-1]), None)


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells. The ratios are those to Luthier as it is by default."""
    lines = lines_of(result)
    ours, rate = whole(lines, result), statistics.median(result["gemm"]) if result["gemm"] else None
    cells = []
    for line in lines:
        used = f"{line.work / line.seconds / rate:.0%}" if rate else "–"
        cells.append(
            [
                line.name,
                f"{line.seconds:.2f} ({line.spread[0]:.2f}–{line.spread[1]:.2f})",
                f"{line.against(ours):.1f} ×" if ours else "–",
                f"{line.peak / 1024:.2f} GiB",
                f"{line.above / 1024:.2f} GiB",
                used,
                f"{line.useful / line.seconds / 1e9:.0f} GFLOP/s",
                f"{line.prepared:,.0f} rows/s" if line.prepared else "–",
                f"{line.first:.4f}, {line.norm:.3f}, {line.second}",
            ]
        )
    return HEADINGS, cells


def against(result: dict[str, Any]) -> list[str]:
    """For each group, its fastest against Luthier as it is by default: time and peak memory."""
    lines = lines_of(result)
    ours = whole(lines, result)
    said = []
    for group in dict.fromkeys(line.group for line in lines if line.group != OURS):
        other = best(lines, group)
        if ours and other:
            memory = ours.peak / other.peak
            said.append(
                f"{other.name}: {other.against(ours):.1f} × as long a step; Luthier's peak is {memory:.2f} × its"
            )
    return said


def remarks(result: dict[str, Any]) -> list[str]:
    """Who is missing and why, and what the peers said of themselves."""
    said = [f"{name}: skipped, {why}" for name, why in result["skipped"].items()]
    fewer: dict[int, list[str]] = {}  # by how many turns there was time for
    for one in result["contestants"]:
        turns = result["turns"].get(one["name"], [])
        failed = [turn["failed"] for turn in turns if "failed" in turn]
        said += [f"{one['name']}: {len(failed)} of {len(turns)} turns failed, {failed[0]}"] if failed else []
        if 0 < len(turns) < len(result["gemm"]) and not failed:
            fewer.setdefault(len(turns), []).append(one["name"])
        good = next((turn for turn in turns if "failed" not in turn), None)
        if good and good.get("weights", ["bfloat16"]) != ["bfloat16"]:
            said.append(f"{one['name']}: {', '.join(good['weights'])} weights")
        if good and good.get("packing") is False:
            said.append(f"{one['name']}: asked to pack, it did not")
    for count, names in sorted(fewer.items()):
        said.append(f"{count} of {len(result['gemm'])} turns: {', '.join(names)}")
    return said


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The tables of all cells, as they stand between the markers."""
    parts = []
    for result in results:
        headings, rows = table(result)
        machine = result["machine"]
        rate = f"{statistics.median(result['gemm']) / 1e9:.0f} GFLOP/s" if result["gemm"] else "not measured"
        tokens, taught = (sum(column) for column in zip(*result["lengths"], strict=True))
        parts.append(f"### {result['title']}")
        parts.append(
            f"{result['rows']} rows a step, {tokens:,} tokens, {taught:,} of them taught; all rows begin with the same "
            f"{result['common_prefix']} tokens. {machine['cpu']}, {machine['threads']} threads, {machine['date']}; "
            f"matrix rate over these shapes, between the turns: {rate}."
        )
        body = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in body))
        parts.append("\n".join(f"- {line}" for line in [*against(result), *remarks(result)]))
    return "\n\n".join(part for part in parts if part)


def write_page(page: Path, text: str) -> None:
    """Put the tables between the page's two markers; the rest of it is prose and stays."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{page.name} lacks {BEGIN} … {END}"
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
