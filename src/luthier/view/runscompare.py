"""Runs side by side: what their recipes say differently, their curves, their final figures; terminal and page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.folder import read_json
from luthier.history import History
from luthier.html import join, page, table, tag, visible
from luthier.recipe import load_recipe
from luthier.runs import disk_bytes, result_of
from luthier.sections import Recipe
from luthier.view.charts import SMOOTHED_FROM, smoothed, steep
from luthier.view.runsview import BOLD, SOFT, share, shortened, written
from luthier.words import duration, size

TALL = 10  # lines of a curve's field on the terminal
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = ("cyan", "yellow", "green", "magenta")
SEVERAL = "*"
CURVES = {"loss": "loss", "eval_loss": "eval loss"}
LEARNT = ("train_rows", "train_tokens", "supervised_tokens", "template_sha256")
"""What data.json says of the rows that are trained on; their files' hashes beside it."""
Points = Sequence[tuple[float, float]]


# -- what differs ----------------------------------------------------------------------------------------------------


def differing(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """(key, each run's value) of the recipes' keys that are not the same in all of them."""
    found = [written(recipe_of(history)) for history in histories]
    keys = [key for key in found[0] if key != "run" and len({one[key] for one in found}) > 1]
    return [(key, [one[key] for one in found]) for key in keys]


def recipe_of(history: History) -> Recipe:
    """The resolved one of a run's folder. Errors: RecipeError where another version wrote it."""
    return load_recipe(history.folder.recipe, check_files=False)


def cautions(histories: Sequence[History]) -> list[str]:
    """Why losses cannot be held against each other, a line a reason; none where they can."""
    recipes = [recipe_of(history) for history in histories]
    data = [read_json(history.folder.data) or {} for history in histories]

    def differ(values: Sequence[Any]) -> bool:
        return any(value != values[0] for value in values)

    lines = []
    if not all(data):
        lines.append("a run has no data.json: whether all saw the same rows is not known")
    if differ([recipe.model.name for recipe in recipes]):
        lines.append("other models: with another tokenizer a loss counts other tokens")
    drawn = [(recipe.data.seed, recipe.data.sample) for recipe in recipes]
    train = [[_sources(one, "train"), *(one.get(key) for key in LEARNT)] for one in data]
    if all(data) and (differ(train) or differ(drawn)):
        lines.append("other training rows: do not compare the training losses")
    held = [[_sources(one, "eval"), one.get("eval_rows"), one.get("template_sha256")] for one in data]
    split = [None if isinstance(recipe.data.eval, str) else recipe.data.eval for recipe in recipes]
    apart = any(split) and (differ(train) or differ(drawn))  # they are taken off the training rows
    if all(data) and (differ(held) or differ(split) or apart):
        lines.append("other eval rows: do not compare the eval losses")
    if differ([recipe.train.batch for recipe in recipes]):
        lines.append("other batches: a step of one is not a step of another; compare at the same number of rows")
    if differ([(recipe.data.seed, recipe.train.seed) for recipe in recipes]):
        lines.append("other seeds: single steps saw other rows, and a small difference may be chance")
    return lines


def _sources(data: dict[str, Any], part: str) -> list[Any]:
    return [(one["sha256"], one["weight"]) for one in data.get("sources", []) if one["part"] == part]


def final_figures(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """(what, each run's) of what the runs came to; a line that no run has is left out."""
    columns = [_figures(history) for history in histories]
    return [(key, [one[key] for one in columns]) for key in columns[0] if any(one[key] != "–" for one in columns)]


def _figures(history: History) -> dict[str, str]:
    best, last, result = history.best_eval, history.last, result_of(history.folder)
    before = next((pair for pair in history.eval_losses if pair[0] == 0), None)
    compared = (read_json(history.folder.path / "compare.json") or {}).get("figures", {})
    steps = [line for line in history.metrics if line["tokens"]]
    memory = [line["memory_gib"] for line in steps if line["memory_gib"] is not None]
    exact = compared["tuned"]["exact_share"] if compared else None
    return {
        "state": history.state,
        "steps": f"{history.step}" + (f" of {history.steps}" if history.steps else ""),
        "last loss": f"{last['loss']:.4f}" if last else "–",
        "eval loss before training": f"{before[1]:.4f}" if before else "–",
        "best eval loss": f"{best[1]:.4f}" if best else "–",
        "at step": f"{best[0]}" if best else "–",
        "exact answers": f"{share(exact)} of {compared['held_out']:,}" if exact is not None else "–",
        "answers that stopped": share(compared["tuned"]["stopped_share"]) if compared else "–",
        "tokens trained on": f"{sum(line['tokens'] for line in steps):,}" if steps else "–",
        "wall time": _seconds(history.seconds) if history.seconds is not None else "–",
        "tokens/s": f"{history.speed:,.0f}" if history.speed is not None else "–",
        "peak memory": f"{max(memory):.1f} GiB" if memory else "–",
        "adapter or model": size(disk_bytes(result)) if result else "–",
    }


def _seconds(seconds: float) -> str:
    """12.3 s, 250 s (4 min 10 s)."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds:,.0f} s ({duration(seconds)})"


# -- the terminal ----------------------------------------------------------------------------------------------------


def show_compared(histories: Sequence[History], console: Console) -> None:
    """Print it. A run is a letter in the curves, as NO_COLOR leaves no other sign."""
    names = [f"{LETTERS[i]} {visible(history.folder.name)}" for i, history in enumerate(histories)]
    _print_table("Figures", names, final_figures(histories), console)
    for key, title in CURVES.items():
        series = [history.series(key) for history in histories]
        if any(series):
            _print_curves(title, names, series, console)
    _print_table("Recipes", names, differing(histories) or [("no key differs", [""] * len(names))], console)
    for line in cautions(histories):
        console.print(Text.assemble(("! ", "yellow"), line))


def _print_table(title: str, names: Sequence[str], rows: Sequence[tuple[str, list[str]]], console: Console) -> None:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(Text(title, BOLD), style=SOFT, no_wrap=True)
    for i, name in enumerate(names):
        grid.add_column(Text(name, COLOURS[i % len(COLOURS)]), overflow="fold")
    for key, values in rows:
        grid.add_row(Text(key), *(Text(visible(shortened(value))) for value in values))
    console.print(grid)
    console.print()


def _print_curves(title: str, names: Sequence[str], series: Sequence[Points], console: Console) -> None:
    log, width = steep([value for points in series for _, value in points]), max(20, console.width - 14)
    drawn = [smoothed(points, log) if len(points) >= SMOOTHED_FROM else points for points in series]  # raw ones cross
    values = [value for points in drawn for _, value in points]
    how = ", smoothed" * (drawn != list(series)) + ", log scale" * log
    console.print(Text.assemble((title, BOLD), (f" by step{how}", SOFT)))
    for label, line in zip(_labels(values, log), plot(drawn, width, log), strict=True):
        text = Text(f"{label:>10} ┤", SOFT)
        for mark in line.rstrip():
            text.append(mark, COLOURS[LETTERS.index(mark) % len(COLOURS)] if mark in LETTERS else None)
        console.print(text)
    first, last = min(p[0][0] for p in series if p), max(p[-1][0] for p in series if p)
    console.print(Text(f"{'':11}{first:<{width - len(str(last)) + 1}}{last}", SOFT))
    console.print(Text(f"{'':11}{'  '.join([*names, f'{SEVERAL} several'])}", SOFT))
    console.print()


def _labels(values: Sequence[float], log: bool) -> list[str]:
    """The first, middle and last line of the field have one."""
    low, high = min(values), max(values)
    middle = math.sqrt(low * high) if log else (low + high) / 2
    return [{0: f"{high:.4g}", TALL // 2: f"{middle:.3g}", TALL - 1: f"{low:.4g}"}.get(row, "") for row in range(TALL)]


def plot(series: Sequence[Points], width: int, log: bool) -> list[str]:
    """TALL lines of `width` characters: a run's mean in a stretch of steps is its letter, two in one place a star."""
    scale = math.log if log else float
    values = [scale(value) for points in series for _, value in points]
    steps = [step for points in series for step, _ in points]
    low, rise = min(values), (max(values) - min(values)) or 1.0
    first, reach = min(steps), (max(steps) - min(steps)) or 1
    field = [[" "] * width for _ in range(TALL)]
    for letter, points in zip(LETTERS, series, strict=False):
        stretches: dict[int, list[float]] = {}
        for step, value in points:
            stretches.setdefault(round((width - 1) * (step - first) / reach), []).append(scale(value))
        for column, found in stretches.items():
            row = round((TALL - 1) * (1 - (statistics.fmean(found) - low) / rise))
            field[row][column] = letter if field[row][column] == " " else SEVERAL
    return ["".join(row) for row in field]


# -- the page --------------------------------------------------------------------------------------------------------


def compare_html(histories: Sequence[History]) -> str:
    """The page: figures, what the recipes say differently, the curves overlaid."""
    from luthier.view.charts import STYLE, Series, line_chart

    names = [history.folder.name for history in histories]
    charts = []
    for key, title in CURVES.items():
        series = [history.series(key) for history in histories]
        if any(series):
            log = steep([value for points in series for _, value in points])
            lines = [
                Series(name, points, "dots" if key == "eval_loss" else "smoothed")
                for name, points in zip(names, series, strict=True)
            ]
            charts.append(line_chart(lines, x="step", y=title, log=log))
    rows = [[key, *values] for key, values in differing(histories)]
    warned = [tag("p", f"! {line}", class_="panel") for line in cautions(histories)]
    return page(
        " · ".join(names),
        "Runs side by side",
        join(warned),
        tag("h2", "Figures"),
        table(["", *names], [[key, *values] for key, values in final_figures(histories)]),
        tag("h2", "Curves"),
        tag("div", *charts, class_="columns"),
        tag("h2", "What the recipes say differently"),
        table(["", *names], rows) if rows else tag("p", "No key differs.", class_="soft"),
        style=STYLE
        + ".columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 2rem }",
    )
