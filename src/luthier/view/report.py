"""report.html: one self-contained page about a run, from its folder alone and in whatever state it is. No torch.

What the folder does not hold (no evaluation, no comparison, no GPU) has no place on the page.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from luthier.folder import RunFolder, read_json, write_atomic
from luthier.history import NEWEST, History, read_history
from luthier.html import Html, figures, join, page, table, tag
from luthier.methods import LOW_RANK, METHODS
from luthier.recipe import load_recipe
from luthier.replies import Comparison
from luthier.runs import merges
from luthier.sections import Recipe
from luthier.view import charts
from luthier.view.curves import constants, curves, loss_chart
from luthier.view.reportparts import data_part, merges_part, proof_part, recipe_part, share
from luthier.view.sidebyside import STYLE as SIDES
from luthier.view.sidebyside import flips_first, marked, side_table, summary
from luthier.words import duration, quoted

OPEN_ROWS = 10  # held-out rows shown at once, those that got worse first; the others unfold
CURVE = 3  # steps that make a curve
SAID = ("peak memory", "tokens a second")  # among the figures of a run's time, whether they have a chart or not
PAGES = {"compare.html": "every answer of base and tuned", "strength.html": "the adapter at several strengths"}
SAMPLES = 10  # replies to one prompt; of more evaluations, as many evenly spread
STYLE = """
.state { display: inline-block; border: 1px solid; border-radius: 1rem; padding: 0 .65rem; font-size: .85rem;
  font-weight: 600; margin-right: .6rem; color: var(--good) }
.state.failed, .state.dead { color: var(--bad) } .state.running, .state.stopped { color: var(--ink) }
section > h3 { margin-top: 1.4rem }
.note { border-left: .25rem solid var(--line) } .note.failed, .note.dead { border-color: var(--bad) }
.pictures { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1.4rem 2rem } .pictures .wide { display: none }
@media (min-width: 60rem), print { .pictures { grid-template-columns: 1fr 1fr }
  .pictures .wide { display: block; grid-column: 1 / -1 } .pictures .wide + .chart { display: none } }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: .8rem }
.samples .panel { margin: 0 } .samples tr:last-child td { border-bottom: 0 }
.samples td:first-child { white-space: nowrap; width: 1%; color: var(--soft); font-variant-numeric: tabular-nums }
.figures dt { max-width: 13rem } @media (min-width: 30rem) { .figures dd { white-space: nowrap } }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 2.5rem;
  margin: 0 }
.facts div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line);
  padding: .3rem 0 }
.facts dd { margin: 0; text-align: right; overflow-wrap: anywhere }
.keys td:first-child { white-space: nowrap; width: 1%; padding-right: 1.5rem } .keys { max-width: 60rem }
.keys td:last-child { color: var(--soft) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0 0 }
@media (max-width: 30rem) { .figures { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem 1rem }
  .figures dd { font-size: 1.15rem } }
@media print { h2 { break-after: avoid } }
"""


def write_report(folder: RunFolder) -> Path:
    """Write report.html into the run folder, atomically. Errors: those of `report_html`."""
    path = folder.path / "report.html"
    write_atomic(path, report_html(folder))
    return path


def report_html(folder: RunFolder) -> str:
    """The page. Errors: RecipeError where recipe.yaml is none that this version of Luthier reads."""
    history, recipe = read_history(folder), load_recipe(folder.recipe, check_files=False)
    names = ("environment", "data", "proof", "compare", "merges")
    environment, data, proof, compared, merges = (read_json(folder.path / f"{name}.json") for name in names)
    comparison = Comparison.from_json(compared) if compared else None
    parts = [
        _note(history),
        figures(_headline(history, comparison, environment or {})),
        _pages(folder),
        _section("Curves", *_curves(history)) if len(history.losses) >= CURVE else "",
        _section("Samples on the way", *_samples(history.samples)) if history.samples else "",
        _section("Base against tuned", *_comparison(comparison)) if comparison else "",
        _section("What next", _next(history)) if history.state == "done" else "",
        _section("Recipe", *recipe_part(recipe, folder)),
        _section("Data", *data_part(data, folder)) if data else "",
        _section("Proof of the engine", *proof_part(proof)) if proof else "",
        _section("Merged models", *merges_part(merges)) if merges else "",
        _section(_resources(history), _facts(_spent(history))) if history.seconds is not None else "",
        _section("Environment", _facts(_environment(environment, history))) if environment else "",
    ]
    head = join([_when(history), tag("br"), _what(recipe)])
    return page(folder.name, head, *parts, style=SIDES + charts.STYLE + STYLE)


def about(folder: RunFolder) -> str:
    """What another page says of a run: its model and adapter, which step was kept, and today's date.

    Errors: as `report_html`.
    """
    history, recipe = read_history(folder), load_recipe(folder.recipe, check_files=False)
    kept = history.status.get("message") if history.state in ("done", "stopped") else None
    kept = f"the last, of step {history.step:,}" if kept == "last" else kept
    return " · ".join([_what(recipe), *([f"kept: {kept}"] if kept else []), _date(time.time())])


def _section(title: str, *parts: str) -> Html:
    return tag("section", tag("h2", title), *parts)


def _facts(pairs: Iterator[tuple[str, str]]) -> Html:
    """Small facts, each a name and a value, in as many columns as there is room for."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts")


# -- the head --------------------------------------------------------------------------------------------------------


def _when(history: History) -> Html:
    chip = tag("span", history.state, class_=f"state {history.state}")
    start = history.metrics[0]["time"] if history.metrics else history.status.get("time")
    told = [] if start is None else [f"begun {_date(start)}"]
    told += [f"step {history.step:,} of {history.steps:,}"] if history.steps else []
    return join([chip, " · ".join(told)])


def _date(seconds: float) -> str:
    when = datetime.fromtimestamp(seconds).astimezone()
    return f"{when.day} {when:%B %Y, %H:%M (%Z)}"


def _what(recipe: Recipe) -> str:
    model, method = recipe.model, recipe.method
    name = model.name if ":" in model.name else Path(model.name).name
    held = "" if model.quantize == "none" else f", held in {getattr(model.quantize, 'kind', model.quantize)}"
    if method.kind == "full":
        return f"{name}{held} · every weight trained"
    if method.kind not in LOW_RANK:
        return f"{name}{held} · {METHODS[method.kind].title}"
    target = {"auto": "every linear layer", "all_linear": "every linear layer"}.get(str(method.target))
    rank = f"of rank {method.r}, alpha {method.alpha:g}"
    return f"{name}{held} · {METHODS[method.kind].title} {rank}, on {target or ', '.join(method.target)}"


def _note(history: History) -> Html:
    """How the run stands, in a sentence: what was kept, why it failed, how it goes on."""
    said, state = history.status.get("message") or "", history.state
    if state == "running":
        left = f", about {duration(history.left)} left" if history.left is not None else ""
        said = f"It runs ({history.status['phase']}{left}): this page shows how far it had come when it was made."
        if history.hung is not None:
            said += f" There has been no sign of progress for {duration(history.hung)}."
    elif state == "dead":
        said = "Its process is gone, and could not say why."
    elif state == "done":
        return tag("p", f"Kept: {said}", class_="soft") if said else Html("")
    parts = [said] if state == "running" else [said, tag("br"), _goes_on(history)]
    return tag("p", *parts, class_=f"panel note {state}")


def _goes_on(history: History) -> str:
    """A failed run without a checkpoint would fail in the same way again: its recipe has to change."""
    if history.state == "failed" and not any(history.folder.checkpoints.glob("step-*")):
        return f"no checkpoint yet; begin anew with what is wrong put right: {_anew(history.folder)}"
    return history.folder.standing()


def _anew(folder: RunFolder) -> str:
    return f"luthier train {quoted(folder.shown / 'recipe.yaml')} KEY=VALUE"


def _headline(
    history: History, comparison: Comparison | None, environment: dict[str, Any]
) -> Iterator[tuple[str, ...]]:
    """The figures that matter, as `figures` takes them."""
    evals, best = history.eval_losses, history.best_eval
    if best is not None:
        yield f"{evals[0][1]:.4f} → {best[1]:.4f}", f"eval loss, first → best (step {best[0]:,})"
    elif history.last is not None:
        yield f"{history.last['loss']:.4f}", "loss of the last step"
    if comparison is not None and comparison.held_out:
        yield summary(comparison)[0]
    if (taught := history.supervised_share) is not None:
        yield f"{_tokens(history):,}", f"tokens trained on, {share(taught)} of them taught"
    if model := environment.get("model"):
        yield share(model["trainable"] / model["parameters"]), f"of {model['parameters']:,} parameters trained"
    if history.seconds is not None:
        yield _times(history)[0], "training time"
    if (energy := _energy(history)) is not None:
        yield f"{energy:,.3g} Wh", "energy of the GPUs"


def _tokens(history: History) -> int:
    return sum(line["tokens"] or 0 for line in history.metrics)


def _energy(history: History) -> float | None:
    """Watt hours of all GPUs; None where none tells."""
    told = [gpu["energy_wh"] for gpu in _gpus(history) if gpu["energy_wh"] is not None]
    return sum(told) if told else None


def _gpus(history: History) -> list[dict[str, Any]]:
    return next((line["gpu"] for line in reversed(history.metrics) if line["gpu"]), [])


def _pages(folder: RunFolder) -> Html:
    """Links to the run's other pages, which lie beside this one."""
    links = [tag("a", what, href=name) for name, what in PAGES.items() if (folder.path / name).is_file()]
    return tag("p", "Beside this page: ", Html(" · ".join(links))) if links else Html("")


# -- what happened on the way ----------------------------------------------------------------------------------------


def _curves(history: History) -> Iterator[Html]:
    pictures = curves(history)
    if len(pictures) % 2:  # where two stand in a row the first takes one of its own
        pictures.insert(0, loss_chart(history, wide=True))
    yield tag("p", "Thin lines are single steps, thick ones their moving mean. Point at one to read it.", class_="soft")
    yield tag("div", *pictures, class_="pictures")


def _samples(lines: Sequence[dict[str, Any]]) -> Iterator[Html]:
    """For each prompt the replies of the evaluations; words that the reply before did not have are marked."""
    prompts: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:  # the last word of a step counts: a run that was killed may have said it twice
        prompts.setdefault(json.dumps(line["prompt"]), {})[line["step"]] = line
    yield tag("p", "Words are marked that the reply above does not have.", class_="soft")
    yield tag("div", *(_replies(sorted(said.items())) for said in prompts.values()), class_="samples")


def _replies(said: list[tuple[int, dict[str, Any]]]) -> Html:
    spread = said if len(said) <= SAMPLES else [said[i * (len(said) - 1) // (SAMPLES - 1)] for i in range(SAMPLES)]
    rows: list[tuple[list[int], dict[str, Any]]] = []
    for step, line in spread:  # the same words again are no new row
        if rows and rows[-1][1]["reply"] == line["reply"]:
            rows[-1][0].append(step)
        else:
            rows.append(([step], line))
    before = [None, *(line["reply"] for _, line in rows)]
    cells = [
        (_steps(steps), join([marked(line["reply"], since), *_unstopped(line)]))
        for (steps, line), since in zip(rows, before, strict=False)
    ]
    more = [tag("p", f"{len(spread)} of {len(said)} evaluations", class_="soft")] if len(spread) < len(said) else []
    body = tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in cells))
    return tag("div", _prompt(said[0][1]["prompt"]), tag("table", body), *more, class_="panel")


def _prompt(prompt: str | list[dict[str, str]]) -> Html:
    if isinstance(prompt, str):
        return tag("h3", prompt, class_="text")
    turns = [join([tag("span", f"{turn['role']}: ", class_="soft"), turn["content"], "\n"]) for turn in prompt]
    return tag("h3", *turns, class_="text")


def _steps(steps: Sequence[int]) -> str:
    first = "before" if steps[0] == 0 else f"{steps[0]:,}"
    return first if len(steps) == 1 else f"{first} – {steps[-1]:,}"


def _unstopped(line: dict[str, Any]) -> list[Html]:
    return [] if line["stopped"] else [tag("div", "did not stop", class_="soft")]


def _comparison(comparison: Comparison) -> Iterator[Html]:
    """The figures, the prompts, the most telling held-out rows; the others fold."""
    yield figures(summary(comparison))
    yield tag("p", "What the tuned model wrote and the base did not is marked.", class_="soft")
    if comparison.prompts:
        yield side_table(comparison.prompts)
    held = flips_first(comparison.held_out)
    if held:
        yield tag("h3", "Held-out rows, answered greedily")
        yield side_table(held[:OPEN_ROWS])
    if rest := held[OPEN_ROWS:]:
        yield tag("details", tag("summary", f"{len(rest):,} more held-out rows"), side_table(rest))


def _next(history: History) -> Html:
    """What can be done with a run that is done."""
    folder = history.folder
    run = quoted(folder.shown)
    compared = (folder.path / "compare.json").is_file()
    rows = [] if compared else [(f"luthier compare {run}", "base and tuned, side by side")]
    merging = [(f"luthier merge {run} -o DIR", "one model folder of its own, verified")] if merges(folder) else []
    rows += [
        (f"luthier chat {run}", "talk to it"),
        (f'luthier generate {run} --prompt "…"', "an answer on the screen or, with --json, for a program"),
        *merging,
        (_anew(folder), "its recipe once more, with other settings"),
    ]
    return table(["command", ""], [(tag("code", command), what) for command, what in rows], class_="keys")


# -- time and place --------------------------------------------------------------------------------------------------


def _resources(history: History) -> str:
    return "Time and memory" if _energy(history) is None else "Time, memory and energy"


def _seconds_of_steps(history: History) -> list[float]:
    return [line["tokens"] / line["tokens_per_second"] for line in history.metrics if line["tokens_per_second"]]


def _times(history: History) -> tuple[str, str, str, float]:
    """A run's time in all, that of its steps, the rest, rounded so that they add up; and the steps' share.

    The status of a run that was killed may lag behind its steps: the time in all is that of the steps at least.
    """
    assert history.seconds is not None
    steps = sum(_seconds_of_steps(history))
    whole = max(history.seconds, steps)
    unit, digits = (0.01, 2) if whole < 10 else (0.1, 1) if whole < 60 else (1, 0) if whole < 3600 else (60, 0)
    counts = round(whole / unit), round(steps / unit)

    def said(count: int) -> str:
        return f"{count * unit:.{digits}f} s" if whole < 60 else duration(count * unit).removesuffix(" 00 s")

    return said(counts[0]), said(counts[1]), said(counts[0] - counts[1]), steps / max(whole, 1e-9)


def _spent(history: History) -> Iterator[tuple[str, str]]:
    whole, inside, rest, part = _times(history)
    yield "training time in all", whole
    if steps := _seconds_of_steps(history):
        median = statistics.median(steps)
        yield "steps alone", f"{inside} ({100 * part:.0f} %)"
        yield "evaluations, samples, checkpoints", rest
        yield "a step, median", f"{median:.3g} s" if median < 60 else duration(median)
        newest = f"newest {NEWEST} steps" if history.state == "running" else "steps"
        yield f"tokens a second, in the {newest}", f"{history.speed:,.0f}"
    if memory := history.series("memory_gib"):
        yield "peak memory", f"{max(value for _, value in memory):.3g} GiB"
    yield from ((name, value) for name, value in constants(history) if name.split(",")[0] not in SAID)
    if (energy := _energy(history)) is not None:
        yield "energy of the GPUs", f"{energy:,.3g} Wh"
        if tokens := _tokens(history):
            yield "energy a token trained on", f"{3600 * energy / tokens:.3g} J"


def _environment(environment: dict[str, Any], history: History) -> Iterator[tuple[str, str]]:
    for name, value in environment.items():
        if not isinstance(value, dict):
            yield name, str(value)
    for gpu in _gpus(history):
        memory = f", {gpu['memory_total_gib']:.3g} GiB" if gpu["memory_total_gib"] else ""
        yield f"GPU {gpu['index']}", f"{gpu['name']}{memory}"
