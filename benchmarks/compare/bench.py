"""Luthier beside what else one would take, on the same rows, model, adapters and number format: `make bench`.

    .venv/bin/python benchmarks/compare/bench.py [--full] [--cells 100m-huanhuan …] [--only luthier …]

Everyone takes turns, each turn a process of its own; medians of seconds for an optimizer step of the same rows. Writes
benchmarks/results/CELL.json and the tables of docs/performance.md. Peers are installed first, which is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cells
import gemm
import peers
import tables
import torch
from contestants import Contestant, contestants, turn
from prepare import prepared
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from luthier.quiet import quiet

ROOT = peers.ROOT
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
WORK = ROOT / "build" / "bench"
REPETITIONS = 3
TIMEOUT = 600.0
"""Seconds after which a turn is ended, and its contestant takes no further one in this cell."""
CELL = 480.0
"""Seconds for a cell's turns where not all cells are measured. Everyone has one; then the fastest of each group take
turns, the slowest of them no more than fit."""
SHOWN = [0, 1, 2, 3, 5]
"""The columns of the page's table that a screen has room for, without how far a step's seconds spread."""
console = Console(highlight=False)


def say(what: Any) -> None:
    console.print(what, soft_wrap=isinstance(what, str))


def main() -> None:
    options = arguments()
    data, tokenizer = shared(options)
    torch.set_num_threads(options.threads)
    quiet()
    chosen = [cell for cell in cells.ALL if cell.name in options.cells]
    began = time.monotonic()
    everyone = [
        one
        for one in contestants(options.full, slow=not options.full)
        if not options.only or any(word in one.name.lower() for word in options.only)
    ]
    skipped = {}
    for peer in dict.fromkeys(one.peer for one in everyone if one.peer):
        why = peers.ready(peer, say)
        if why is not None:
            say(f"{peer}: skipped, {why}")
            skipped[peer] = why
    here = [one for one in everyone if one.peer not in skipped]
    say(f"{len(chosen)} cells, {len(here)} contestants, {options.repetitions} turns each")
    results = []
    for cell in chosen:
        results.append(measured(cell, here if options.full else usual(here, cell), data, tokenizer, options, skipped))
        show(results[-1])
        options.results.mkdir(exist_ok=True)
        text = json.dumps(results[-1], ensure_ascii=False, indent=1)
        (options.results / f"{cell.name}.json").write_text(text + "\n", encoding="utf-8")
    if options.results == RESULTS:
        known = [json.loads(path.read_text(encoding="utf-8")) for path in map(_result, cells.ALL) if path.is_file()]
        tables.write_page(PAGE, tables.markdown(known))
    say(f"done in {(time.monotonic() - began) / 60:.1f} minutes; raw figures in {os.path.relpath(options.results)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all cells, and the lines beside the ladder")
    names = [cell.name for cell in cells.ALL]
    parser.add_argument("--cells", nargs="+", choices=names, metavar="CELL", help=" ".join(names))
    parser.add_argument("--only", nargs="+", type=str.lower, default=[], help="contestants with one of these words")
    parser.add_argument("--rows", type=int, help="rows a step, instead of the cell's own")
    parser.add_argument("--seconds", type=float, default=CELL, help="for a cell's turns; --full has no limit")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--data", type=Path, help="folder of the data files")
    parser.add_argument("--tokenizer", type=Path, help="folder of a Qwen2 tokenizer")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the raw figures")
    options = parser.parse_args()
    options.cells = options.cells or [cell.name for cell in (cells.ALL if options.full else cells.USUAL)]
    return options


def shared(options: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of the data and of the tokenizer; leaves with a line where one is absent."""
    folder = Path(os.environ.get("LUTHIER_SHARED", ROOT.parent / "shared"))
    data, tokenizer = options.data or folder / "data", options.tokenizer or folder / "tokenizers" / "qwen2"
    for path, what in ((data, "--data"), (tokenizer, "--tokenizer")):
        if not path.is_dir():
            sys.exit(f"{path} is not there; set LUTHIER_SHARED, or give {what}")
    return data.absolute(), tokenizer.absolute()


def measured(
    cell: cells.Cell,
    everyone: list[Contestant],
    data: Path,
    tokenizer: Path,
    options: argparse.Namespace,
    skipped: dict[str, str],
) -> dict[str, Any]:
    """All turns of a cell, as its file has them."""
    shape, count = cells.SHAPES[cell.shape], options.rows or rows_of(cell, options.full)
    folder = WORK / cell.name
    say(f"\n[bold]{cell.name}[/bold]: making the model and {count} rows …")
    facts = cells.make(cell, folder, data, tokenizer, count)
    tokens, taught = (sum(column) for column in zip(*facts["lengths"], strict=True))
    rates, taken, start = list[float](), dict[str, float](), time.monotonic()
    turns: dict[str, list[dict[str, Any]]] = {one.name: [] for one in everyone}
    for repetition in range(1, options.repetitions + 1):
        rates.append(gemm.rate(shape, tokens, taught))
        say(f"turn {repetition} of {options.repetitions}; matrices {rates[-1] / 1e9:.0f} GFLOP/s")
        left = math.inf if options.full else options.seconds - (time.monotonic() - start)
        again = set(taken) if options.full else fastest(everyone, turns)
        due = {name: seconds for name, seconds in taken.items() if name in again}
        within = affordable(due, options.repetitions - repetition + 1, left)
        for one in everyone:
            if repetition > 1 and one.name not in within:
                continue
            began = time.monotonic()
            found = turn(one, folder, count, options.threads, TIMEOUT)
            turns[one.name].append(found)
            seconds = time.monotonic() - began
            if "failed" in found:
                taken.pop(one.name, None)
            else:
                taken[one.name] = seconds
            say(f"  {one.name}: {told(found, one.excluded)} [dim]({seconds:.0f} s in all)[/dim]")
    here = [one for one in everyone if one.name in taken]
    return {
        "cell": asdict(cell),
        "title": f"{cell.shape.upper().replace('B', ' B').replace('M', ' M')}, {cell.data}",
        "machine": machine(options.threads),
        **facts,
        "contestants": [asdict(one) for one in everyone],
        "skipped": skipped,
        "gemm": rates,
        "turns": turns,
        "preparation": prepared(cell, here, folder, data, options.threads, say),
    }


def rows_of(cell: cells.Cell, full: bool) -> int:
    """Rows a step: where time is short, fewer."""
    rows = cells.DATA[cell.data].rows[cell.shape]
    return rows if full else cells.FEWER.get(cell.name, rows)


def usual(everyone: list[Contestant], cell: cells.Cell) -> list[Contestant]:
    """Who takes part where time is short: the ladder below its last rung only in the first of the cells."""
    rungs = [one for one in everyone if one.rung]
    below = [] if cell == cells.USUAL[0] else rungs[:-1]
    return [one for one in everyone if one not in below]


def fastest(everyone: list[Contestant], turns: dict[str, list[dict[str, Any]]]) -> set[str]:
    """Names of the fastest of each group so far; of Luthier's lines the whole ladder's."""
    found: dict[str, tuple[float, str]] = {}
    for one in everyone:
        seconds = [second for turn in turns[one.name] for second in turn.get("seconds", [])[one.excluded :]]
        if seconds and one.group != tables.OURS:
            found[one.group] = min(found.get(one.group, (math.inf, "")), (statistics.median(seconds), one.name))
    ours = [one.name for one in everyone if one.rung]
    return {name for _, name in found.values()} | set(ours[-1:])


def affordable(taken: dict[str, float], repetitions: int, left: float) -> set[str]:
    """Whose turns there is still time for: of `left` seconds, this repetition's share; the longest are left out first.

    taken: seconds of everyone's last turn that came to its end.
    """
    within: set[str] = set()
    spent = 0.0
    for name, seconds in sorted(taken.items(), key=lambda item: item[1]):
        spent += seconds
        if spent > left / repetitions:
            break
        within.add(name)
    return within


def told(found: dict[str, Any], excluded: int) -> str:
    if "failed" in found:
        return f"[red]{found['failed']}[/red]"
    seconds = ", ".join(f"{value:.2f}" for value in found["seconds"][excluded:])
    first = f"loss {found['losses'][0]:.4f}, gradient {found['norms'][0]:.3f}"
    return f"{seconds} s a step, {first}, peak {found['peak_mib']:,} MiB"


def machine(threads: int) -> dict[str, Any]:
    """What it ran on, without names of hosts or folders."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in text.splitlines() if ":" in line}
    wanted = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_tile", "bf16", "asimd"}
    return {
        "cpu": found.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": threads,
        "flags": sorted(wanted & set(found.get("flags", found.get("Features", "")).split())),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def show(result: dict[str, Any]) -> None:
    """On the screen, without some of the columns that the page has."""
    headings, rows = tables.table(result)
    shown = Table(title=result["title"], box=SIMPLE, pad_edge=False)
    for number in SHOWN:
        shown.add_column(headings[number], justify="right" if number else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*[row[number].partition(" (")[0] for number in SHOWN])
    say(shown)
    prepared = ", ".join(f"{name} {rate:,.0f}" for name, rate in result["preparation"].items() if rate)
    for line in [f"rows/s prepared: {prepared}", *tables.against(result), *tables.remarks(result)]:
        say(f"- {line}")


def _result(cell: cells.Cell) -> Path:
    return RESULTS / f"{cell.name}.json"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
