"""What a bake-off found, in words: the verdict, and the rows of its tables. All of it from methods.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luthier.view.charts import shown
from luthier.words import size
from luthier.yamlfile import write_value

Found = Mapping[str, Any]
Cell = tuple[str, str]  # a figure, and its bounds or what else stands below it
Row = list[Cell]

SCORES = ("held-out loss", "exact", "stopped", "general text")
COSTS = ("trains", "adapter", "memory", "a step")
SEED = ("method", "seed", *SCORES, *COSTS[2:], "run")
TRAINED = ("method", "rate", "why", "settings")
NAMED = 5  # methods that a sentence names; of more the first four, and how many others
MOST = 1e6  # times the base's perplexity; a model beyond it knows nothing, however far beyond
NOT_MEASURED: Cell = ("–", "")


def verdict(found: Found) -> str:
    """Which method does best, and which are not told apart from it; which forgets least; what failed."""
    done, broken = finished(found), [method for method in found["methods"] if method["failed"]]
    failed = [method["title"] for method in broken if method["figures"] is None]
    if not done:
        return _sentence(f"{_list(failed)} failed: no method came to a result")
    said = [_best(found, done)]
    if knows(found):
        said.append(_least(done))
    if failed:
        said.append(f"{_list(failed)} failed")
    if part := [method["title"] for method in broken if method["figures"] is not None]:
        said.append(f"{_list(part)} broke off with a further seed")
    return " ".join(map(_sentence, said))


def _best(found: Found, done: Sequence[Found]) -> str:
    """Whether it does better than the base as well: the best of methods that fail may be none to take."""
    key, best, base = measure(found), done[0], found["base"]
    gain = best["figures"][key] - base[key]
    if not (gain > 0 if key == "exact_share" else gain < 0):
        score = _score(best["figures"], key)
        return f"no method did better than the base ({_figure(base, key)}); the best of them is {best['title']} {score}"
    over = f", over {len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else ""
    said = f"{best['title']} did best {_score(best['figures'], key)}{over} (the base: {_figure(base, key)})"
    key = key.removesuffix("_share")
    apart = {method["title"]: method["difference"][key] for method in done[1:] if method["difference"]}
    near = [title for title, bounds in apart.items() if bounds and bounds[0] <= 0 <= bounds[1]]
    if near:
        return f"{said}; these rows do not tell {_list(near)} from it, as the difference's bounds include 0"
    if apart and all(apart.values()) and len(apart) == len(done) - 1:
        others = _list(list(apart)) if len(apart) < 3 else "every other"
        return f"{said}; {others} did worse, by more than the draw of rows explains"
    return said


def _least(done: Sequence[Found]) -> str:
    """Which forgot least of general text; the methods' bounds overlap, or they do not."""
    best, *others = sorted(done, key=lambda method: method["figures"]["perplexity_change"])
    free = [method["title"] for method in done if _bounds(method)[0] <= 0]
    if len(free) == len(done):
        return "that general text was forgotten is not certain" + (" of any of them" if others else "")
    dear = others[-1] if others else best
    most = f"; {dear['title']} forgot most (its perplexity {change_of(dear)})"
    if free:
        return f"no forgetting of general text is certain of {_list(free)}{most if dear['title'] not in free else ''}"
    if not others:
        return f"the perplexity of general text changed by {change_of(best)}, which is forgetting"
    near = [method["title"] for method in others if _bounds(method)[0] <= _bounds(best)[1]]
    told = f", bounds that overlap with those of {_list(near)}" if near else ""
    most = "" if dear["title"] in near else most
    return f"{best['title']} forgot least of general text (its perplexity {change_of(best)}{told}){most}"


def _score(figures: Found, key: str) -> str:
    if key == "loss":
        return f"with a held-out loss of {loss_of(figures)}"
    return f"with {share(figures[key])} of {figures['answered']:,} held-out rows answered exactly"


def _figure(figures: Found, key: str) -> str:
    return loss_of(figures) if key == "loss" else share(figures[key])


def _bounds(method: Found) -> Sequence[float]:
    bounds: Sequence[float] = method["figures"]["perplexity_change_bounds"]
    return bounds


def _sentence(said: str) -> str:
    return f"{said[0].upper()}{said[1:]}."


def _list(names: Sequence[str]) -> str:
    """A and B; A, B and C; A, B, C, D and 3 others."""
    if len(names) > NAMED:
        names = [*names[: NAMED - 1], f"{len(names) - NAMED + 1} others"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# -- which methods, and by what --------------------------------------------------------------------------------------


def finished(found: Found) -> list[Found]:
    """The methods that came to a result, the best first."""
    key, sign = measure(found), -1 if measure(found) == "exact_share" else 1
    there = [method for method in found["methods"] if method["figures"] is not None]
    return sorted(there, key=lambda method: (method["kind"] != found["best"], sign * method["figures"][key]))


def ordered(found: Found) -> list[Found]:
    """All methods: those that came to a result, the best first, then those that failed."""
    return [*finished(found), *(method for method in found["methods"] if method["figures"] is None)]


def measure(found: Found) -> str:
    """What the methods are judged by: rows answered exactly, or where nobody answers one the held-out loss."""
    all_figures = [found["base"], *(method["figures"] for method in found["methods"])]
    return "exact_share" if any(figures["exact_share"] for figures in all_figures if figures) else "loss"


def knows(found: Found) -> bool:
    """Does the base know the general text? A perplexity beyond the vocabulary is worse than guessing."""
    return bool(found["base"]["perplexity"] <= found["vocabulary"])


# -- the tables' rows ------------------------------------------------------------------------------------------------


def scores(found: Found, figures: Found | None) -> Row:
    """The cells below `SCORES`."""
    if figures is None:
        return [NOT_MEASURED] * len(SCORES)
    loss, exact, stopped = figures["loss"], figures["exact_share"], figures["stopped_share"]
    change = change_between(figures["perplexity_change_bounds"])
    own = (shown(figures["perplexity"]), "its perplexity")
    text = own if figures is found["base"] else (_change(figures["perplexity_change"]), change)
    return [
        NOT_MEASURED if loss is None else (loss_of(figures), "{:.2g} to {:.2g}".format(*figures["loss_bounds"])),
        NOT_MEASURED if exact is None else (share(exact), "{:.0f} to {:.0f} %".format(*_hundred(figures))),
        NOT_MEASURED if stopped is None else (share(stopped), ""),
        text if knows(found) else NOT_MEASURED,
    ]


def costs(method: Found) -> Row:
    """The cells below `COSTS`."""
    if method["figures"] is None:
        return [NOT_MEASURED] * len(COSTS)
    part = 100 * method["trainable"] / method["total"]
    return [
        (f"{method['trainable']:,}", f"{part:.3g} %"),
        (size(method["bytes"]), "" if method["mergeable"] else "no merge"),
        *resources(method),
    ]


def resources(one: Found) -> Row:
    """Of a method or of one of its seeds: the cells below the last two of `COSTS`."""
    peak, seconds = one["peak_bytes"], one["seconds_a_step"]
    return [
        NOT_MEASURED if peak is None else (size(peak), ""),
        NOT_MEASURED if seconds is None else (f"{seconds:.3g} s", ""),
    ]


def whole_rows(found: Found) -> Iterator[Row]:
    """The table of all: a method's name, the cells below `SCORES` and `COSTS`; the base last."""
    for method in ordered(found):
        part = f"{len(method['seeds'])} of {len(found['seeds'])} seeds" if method["seeds"] else "failed"
        name = (method["title"], part if method["failed"] else "")
        yield [name, *scores(found, method["figures"]), *costs(method)]
    yield [("base", ""), *scores(found, found["base"]), *[("", "")] * len(COSTS)]


def seed_rows(found: Found) -> Iterator[Row]:
    """The rows below `SEED`."""
    for method in ordered(found):
        for one in method["seeds"]:
            row = [*scores(found, one["figures"]), *resources(one), (one["run"], "")]
            yield [(method["title"], ""), (str(one["seed"]), ""), *row]


def trained_rows(found: Found) -> Iterator[Row]:
    """The rows below `TRAINED`."""
    for method in ordered(found):
        settings = " · ".join(f"{key}: {write_value(value)}" for key, value in method["settings"].items())
        own = "" if method["tuned"] else " (PEFT's own, not tried here)"
        rate = "–" if method["rate"] is None else f"{method['rate']:.3g}"
        yield [(cell, "") for cell in (method["title"], rate, method["why"], (settings or "nothing to set") + own)]


# -- figures and notes -----------------------------------------------------------------------------------------------


def share(value: float) -> str:
    """0.123 → 12.3 %"""
    return f"{100 * value:.1f} %"


def change_of(method: Found) -> str:
    """By how much a method's perplexity of general text differs from the base's."""
    return _change(method["figures"]["perplexity_change"])


def change_between(bounds: Sequence[float]) -> str:
    """The bounds of such a change."""
    low, high = map(_change, bounds)
    return low if low == high else f"{low.removesuffix(' %') if high.endswith(' %') else low} to {high}"


def _change(value: float) -> str:
    """0.123 → +12.3 %; a perplexity ten times the base's and more: ×12."""
    if value + 1 >= 10:
        return f"×{min(value + 1, MOST):,.0f}" + ("+" if value + 1 > MOST else "")
    return f"{100 * value:+.{0 if abs(value) >= 1 else 1}f} %".replace("-", "−")


def loss_of(figures: Found) -> str:
    """The held-out loss, to as many digits as everywhere."""
    return f"{figures['loss']:.4f}"


def _hundred(figures: Found) -> list[float]:
    return [100 * bound for bound in figures["exact_bounds"]]


def about(found: Found) -> str:
    """What all methods have in common."""
    rows, text, seeds = found["rows"], found["text"], [str(seed) for seed in found["seeds"]]
    numbered = f"seed{'s' if seeds[1:] else ''} {_list(seeds)}"
    return (
        f"Each method: {rows['train']:,} rows to train on, {found['steps']:,} steps of {found['batch']:,}, {numbered}, "
        f"over one base. Held-out loss over {rows['scored']:,} of {rows['held_out']:,} rows, {rows['answered']:,} of "
        f"them answered greedily; general text: {text['from']}, {text['pieces']:,} pieces with "
        f"{text['tokens']:,} tokens."
    )


def note(found: Found) -> str:
    """What the tables' figures mean."""
    general = (
        "General text: how its perplexity changed from the base's, which is the forgetting (×12: to twelve times it)."
        if knows(found)
        else f"General text: the base does not know it, to guess among its {found['vocabulary']:,} tokens is better; "
        "give text that it knows (--text FILE)."
    )
    return (
        f"{general} Below a figure its 95 % bounds: Wilson's for the share of rows answered exactly, by bootstrap over "
        "rows and passages for the others; they tell what other rows would change, not other seeds. Trains: numbers "
        "that are trained, and their share of all. Adapter: the weights in the result's folder; no merge: no weight of "
        "the model can hold them. Memory: the most while it trained, on a CPU that of the "
        "whole process, libraries and base too. A step: its time."
    )
