"""How `luthier runs` shows runs on the terminal: the list of all, and one of them on a screen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.errors import RecipeError
from luthier.folder import RunFolder, read_json
from luthier.history import History
from luthier.html import visible
from luthier.methods import LOW_RANK, METHODS
from luthier.runs import Removal, age, anew, disk_bytes, lost, merges, result_of, silent_for, steps_saved, time_left
from luthier.view.charts import steep
from luthier.words import duration, quoted, size

if TYPE_CHECKING:  # the list does without them
    from luthier.sections import Recipe

SOFT, BOLD = "bright_black", "bold"
COLOURS = {"running": "green", "done": "cyan", "stopped": "yellow", "dead": "red", "failed": "red"}
BLOCKS = "▁▂▃▄▅▆▇█"
LONG = 300  # characters of a prompt or a reply
SHOWN = 4  # samples
WIDE = 90  # columns from which on a header of the list stands on one line
OWN = ("run", "model.name", "data.train", "data.eval", "generate.prompts")
"""Keys that say what a run is about: they have no default that a value could differ from."""


# -- the list --------------------------------------------------------------------------------------------------------


def facts(history: History) -> dict[str, Any]:
    """A run in the list, as its JSON line; times in seconds, null where something is not known."""
    last, best = history.last, history.best_eval
    return {
        "name": history.folder.name,
        "path": str(history.folder.path),
        "state": history.state,
        "phase": history.status.get("phase"),
        "hung": history.hung,
        "step": history.step,
        "steps": history.steps,
        "left": history.left,
        "loss": last and last["loss"],
        "eval_loss": best and best[1],
        "eval_step": best and best[0],
        "age": round(silent_for(history), 1),
        "bytes": disk_bytes(history.folder.path),
        "message": history.status.get("message", ""),
    }


def show_list(histories: Sequence[History], console: Console) -> None:
    """A line a run."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=SOFT)
    grid.add_column("name", overflow="fold", min_width=8)  # the one that gives way on a narrow screen
    grid.add_column("state", no_wrap=True)
    gap = "\n" if console.width < WIDE else " "
    for name in ("step", "loss", f"best{gap}eval", f"last{gap}sign", "size"):
        grid.add_column(name, justify="right", no_wrap=True)
    for history in histories:
        one = facts(history)
        steps = f"{history.step}/{history.steps}" if history.steps else "–"
        numbers = (steps, _loss(one["loss"]), _loss(one["eval_loss"]), age(one["age"]), size(one["bytes"]))
        grid.add_row(Text(visible(history.folder.name)), state(history), *numbers)
    console.print(grid)


def _grid(*sides: Literal["left", "right"]) -> Table:
    """Columns without lines; the last one alone is broken where the screen is too narrow."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for side in sides[:-1]:
        grid.add_column(justify=side, no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def state(history: History) -> Text:
    """The state in its colour, and of a running run what it is at."""
    colour = "bold red" if history.hung is not None else COLOURS[history.state]
    more = time_left(history) if history.state == "running" else ""
    return Text.assemble((history.state, colour), (f", {more}" if more else "", "bold red" if history.hung else ""))


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


# -- one run ---------------------------------------------------------------------------------------------------------


def show_run(history: History, console: Console) -> None:
    """One run: what it is, how it stands, what came of it, what it holds, what goes on with it."""
    folder = history.folder
    head = Text.assemble((visible(folder.name), BOLD), "  ", state(history))
    console.print(head.append(f"  {visible(str(folder.shown))}", SOFT))
    console.print()
    grid = _grid("left", "left")
    grid.columns[0].style = SOFT
    rows = [
        *_standing(history),
        ("", ""),
        *_about(folder, console.width - 11),
        ("", ""),
        *_course(history, console.width),
    ]
    for name, text in [*rows, *_results(folder)]:
        grid.add_row(name, text if isinstance(text, Text) else Text(visible(text)))
    console.print(grid)
    _print_samples(history, console)
    _print_files(folder, console)
    console.print()
    for i, line in enumerate(next_steps(history)):
        console.print(Text.assemble(("next  " if i == 0 else "      ", SOFT), visible(line)), soft_wrap=True)


def _standing(history: History) -> Iterator[tuple[str, str | Text]]:
    status = history.status
    steps = f"step {history.step} of {history.steps}" if history.steps else f"step {history.step}"
    spent = f" in {duration(history.seconds)}" if history.seconds is not None else ""
    yield "progress", f"{steps}{spent}; last sign {age(silent_for(history))} ago"
    if history.hung is not None:
        usual = f", where a step takes {status['usual']:.1f} s" if status.get("usual") else ""
        yield "hangs", Text(f"no progress for {duration(history.hung)}{usual}", "bold red")
    if why := lost(history):
        yield "unknown", Text(why, "red")
    elif history.state == "dead":
        yield "dead", Text("its process has gone without a word: killed, or out of memory, or the machine", "red")
    if history.state == "failed":
        yield "error", Text(visible(status.get("message", "")), "red")


def _about(folder: RunFolder, room: int) -> Iterator[tuple[str, str | Text]]:
    from luthier.recipe import load_recipe

    data, machine = read_json(folder.data), read_json(folder.path / "environment.json")
    try:
        recipe = load_recipe(folder.recipe, check_files=False)
    except RecipeError as error:  # another version's, perhaps: the rest can be shown
        yield "recipe", Text(visible(str(error)), "red")
        return
    yield "model", shown_path(recipe.model.name)
    yield "method", method(recipe)
    if data:
        held = f", {data['eval_rows']:,} held out" if data["eval_rows"] else ", none held out"
        taught = f"{data['supervised_tokens'] / max(1, data['train_tokens']):.1%}".replace("%", " %")
        yield "data", f"{data['train_rows']:,} rows to train on{held}; {data['train_tokens']:,} tokens, {taught} taught"
        yield "", "; ".join(f"{shown_path(source['path'])} ({source['rows']:,} rows)" for source in data["sources"])
    if machine:
        libraries = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft"))
        yield "machine", f"{machine['device']}; {libraries}"
    if changed := from_defaults(recipe):
        yield "recipe", Text("\n").join(_stacked(changed, room))
        yield "", Text("in brackets: the defaults", SOFT)


def _stacked(changed: Sequence[tuple[str, str, str]], room: int) -> Iterator[Text]:
    """Lines of what was changed, none of them broken within a key and its value where that goes."""
    line = Text()
    for key, value, default in changed:
        item = Text.assemble(f"{key} {visible(shortened(value))} ", (f"({default})", SOFT))
        if line and line.cell_len + 3 + item.cell_len > room:
            yield line
            line = Text()
        line.append(" · " if line else "", SOFT).append_text(item)
    yield line


def shortened(value: str) -> str:
    """A value of the recipe as a line has room for it."""
    return value if len(value) <= 60 else f"{value[:59]}…"


def from_defaults(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(key, value, default) of whatever a recipe says otherwise than the defaults, but for what it is about."""
    from luthier.sections import Recipe

    plain = Recipe.model_validate({"model": {"name": recipe.model.name}, "data": {"train": recipe.data.train}})
    here, there = written(recipe), written(plain)
    return [(key, here[key], there[key]) for key in here if here[key] != there[key] and key not in OWN]


def written(recipe: Recipe) -> dict[str, str]:
    """Every key with its value as a recipe file has it; paths as short as the user would type them."""
    from luthier.yamlfile import write_value

    found: dict[str, Any] = {}
    for section, value in recipe.model_dump(mode="json").items():
        keys = value.items() if isinstance(value, dict) else None
        found |= {f"{section}.{key}": one for key, one in keys} if keys else {section: value}
    return {key: shown_path(write_value(value)) for key, value in found.items()}


def method(recipe: Recipe) -> str:
    """The method in a few words."""
    chosen = recipe.method
    if chosen.kind == "full":
        return "full: every weight trains"
    if chosen.kind not in LOW_RANK:
        return f"{chosen.kind}: {METHODS[chosen.kind].title}"
    target = chosen.target if isinstance(chosen.target, str) else " ".join(chosen.target)
    return f"{chosen.kind} r {chosen.r}, alpha {chosen.alpha:g} on {target}"


def _course(history: History, width: int) -> Iterator[tuple[str, str | Text]]:
    room = max(8, min(40, width - 50))
    for name, series in (("loss", history.losses), ("eval loss", history.eval_losses)):
        if series:
            values = [value for _, value in series]
            ends = f"{values[0]:.4f} → {values[-1]:.4f}" if len(values) > 1 else f"{values[0]:.4f}"
            log = steep(values)
            curve = blocks(values, room, log) if len(values) > 1 else ""
            yield name, Text.assemble(f"{ends:19}", (curve, "green"), (" log" * log, SOFT))
    if best := history.best_eval:
        yield "best eval", f"{best[1]:.4f} at step {best[0]}"
    if last := history.last:
        tokens = sum(line["tokens"] for line in history.metrics if line["tokens"])
        speed = f"{history.speed:,.0f} tokens/s, " if history.speed is not None else ""
        yield "work", f"{speed}{tokens:,} tokens so far, memory {last['memory_gib']:.1f} GiB at most"


def blocks(values: Sequence[float], width: int, log: bool) -> str:
    """A curve in one line of block characters, the highest value the tallest: means of equal stretches."""
    count = min(width, len(values))
    means = [fmean(values[i * len(values) // count : (i + 1) * len(values) // count]) for i in range(count)]
    heights = [math.log(mean) for mean in means] if log else means
    low, high = min(heights), max(heights)
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * (height - low) / ((high - low) or 1))] for height in heights)


def _results(folder: RunFolder) -> Iterator[tuple[str, str | Text]]:
    if proof := read_json(folder.proof):
        yield "proof", proved(proof)
    if compared := read_json(folder.path / "compare.json"):
        yield "compare", compared_in_words(compared["figures"])


def proved(proof: dict[str, Any]) -> str:
    """proof.json in a line: what was compared, or why it trains the plain way."""
    found = proof["tried"].get(proof["path"])
    if found is None:
        reasons = [
            one.get("reason") or f"{way} differs by {one['difference']:.0e}" for way, one in proof["tried"].items()
        ]
        return f"trained the plain way, slower: {'; '.join(reasons) or 'not compared'}"
    way = "engine" if proof["path"] == "engine" else "engine with transformers' own logits"
    compared = f"loss and {proof['gradients']} gradients" if proof["gradients"] else "loss alone"
    return f"{way} = reference, {found['difference']:.0e} ({len(proof['rows'])} rows, {compared}; {proof['format']})"


def compared_in_words(figures: dict[str, Any]) -> str:
    """compare.json's figures in a line."""
    base, tuned, held = figures["base"], figures["tuned"], figures["held_out"]
    exact = f"{share(base['exact_share'])} → {share(tuned['exact_share'])} of {held:,} held-out rows exact; "
    stopped = f"{share(base['stopped_share'])} → {share(tuned['stopped_share'])} of the answers stopped"
    return exact * bool(held) + stopped


def share(value: float) -> str:
    """99.2 %"""
    return f"{100 * value:.3g} %"


def _print_samples(history: History, console: Console) -> None:
    """Those of the last evaluation."""
    if not history.samples:
        return
    step = history.samples[-1]["step"]
    newest = [sample for sample in history.samples if sample["step"] == step]
    console.print()
    console.print(Text(f"samples of step {step}" if step is not None else "samples", SOFT))
    grid = _grid("left", "left")
    for sample in newest[:SHOWN]:
        stop = "" if sample["stopped"] else "  [did not stop]"
        grid.add_row("", Text(one_line(sample["prompt"])))
        grid.add_row(" →", Text.assemble(one_line(sample["reply"]) or "(nothing)", (stop, "yellow")))
    console.print(grid)
    if len(newest) > SHOWN:
        console.print(Text(f"  … and {len(newest) - SHOWN} more in samples.jsonl", SOFT))


def one_line(text: str | list[dict[str, str]]) -> str:
    """A prompt or a reply on one line, its control characters made visible."""
    said = text if isinstance(text, str) else text[-1]["content"]
    line = visible(" ⏎ ".join(part.strip() for part in said.strip().splitlines() if part.strip()))
    return line if len(line) <= LONG else f"{line[:LONG]}…"


def _print_files(folder: RunFolder, console: Console) -> None:
    grid = _grid("left", "right", "left")
    steps = steps_saved(folder)
    about = {"checkpoints": f"step {', '.join(map(str, steps))}" if steps else "none yet"}
    if result := result_of(folder):
        about[result.name] = str((read_json(folder.status) or {}).get("message", ""))
    entries = [path for path in folder.path.iterdir() if not path.name.startswith(".")]
    for path in sorted(entries, key=lambda path: (not path.is_dir(), path.name)):
        if held := disk_bytes(path):
            name = visible(path.name) + "/" * path.is_dir()
            grid.add_row(f"  {name}", size(held), Text(visible(about.get(path.name, "")), SOFT))
    console.print()
    console.print(Text(f"files, {size(disk_bytes(folder.path))} together", SOFT))
    console.print(grid)


def next_steps(history: History) -> Iterable[str]:
    """The commands that make sense now."""
    folder = history.folder
    run = quoted(folder.shown)
    if history.state == "running":
        return [f"luthier runs watch {run}", f"luthier runs stop {run}"]
    on = [f"luthier train {run} --resume"]
    if history.state == "failed":
        return [*(on if steps_saved(folder) else []), anew(history)]
    has_result = history.state == "done" or (lost(history) and result_of(folder))
    if not has_result:
        return on
    compared = (folder.path / "compare.json").is_file()
    steps = [] if compared else [f"luthier compare {run}"]
    merging = [f"luthier merge {run} -o DIR"] if merges(folder) else []
    return [*steps, *merging, f"luthier chat {run}"]


def shown_path(text: str) -> str:
    """A path as short as the user would type it; the name of a hub's model as it is."""
    return str(RunFolder(Path(text)).shown) if Path(text).is_absolute() else text


# -- what may go -----------------------------------------------------------------------------------------------------


def show_removals(planned: Sequence[Removal], rest: Sequence[Path], kept: Sequence[str], console: Console) -> None:
    """What would go and how much; `rest`: what a removal that was cut short left; `kept`: why others stay."""
    grid = _grid("right", "left", "left")
    for one in planned:
        grid.add_row(size(one.bytes), Text(visible(str(one.folder.shown))), one.what)
    for path in rest:
        grid.add_row(size(disk_bytes(path)), Text(visible(str(RunFolder(path).shown))), "left by a removal")
    if planned or rest:
        console.print(grid)
    for line in kept:
        console.print(Text(visible(line), SOFT))
    together = sum(one.bytes for one in planned) + sum(map(disk_bytes, rest))
    console.print(f"{size(together)} to free" if planned or rest else "nothing to free")
