"""The report's parts on what a run was made of and on what was proven: recipe, data, proof, merges."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from luthier.conflicts import idle
from luthier.folder import RunFolder
from luthier.html import Html, figures, histogram, table, tag
from luthier.sections import Recipe, Section
from luthier.yamlfile import write_value

REJECTED = 12  # reasons for which rows were left out
VERDICTS = {True: ("✓ verified", "right"), False: ("✗ another model", "wrong"), None: ("not verified", "soft")}
FATES = {
    "bad": "rows that could not be used, left out",
    "dropped_for_length": "rows too long, dropped",
    "cut": "rows too long, cut",
    "answer_tokens_lost": "answer tokens lost by that",
    "one_example_a_turn": "examples written one a turn",
    "borders_encoded_apart": "borders between prompt and answer encoded apart",
}


def share(value: float) -> str:
    """As a percentage."""
    return f"{100 * value:.3g} %"


# -- what it was made of ---------------------------------------------------------------------------------------------


def recipe_part(recipe: Recipe, folder: RunFolder) -> Iterator[Html]:
    """What the recipe says otherwise than the defaults; the whole of it folds."""
    rows = list(_differences(recipe, {*idle(recipe), "run"}))
    yield tag("p", "Keys that are not at their default.", class_="soft")
    yield table(["key", "this run", "default"], rows, class_="keys")
    whole = tag("pre", folder.recipe.read_text("utf-8"), class_="ids")
    yield tag("details", tag("summary", "the whole recipe, every default filled in"), whole)


def _differences(holder: Section, silent: Collection[str], part: str = "") -> Iterator[tuple[Html, str, str]]:
    """(key, value, default) of every key of a recipe, or of a part of it, that is not at its default."""
    given = dict(holder)
    for name, field in type(holder).model_fields.items():
        key, value, required = part + name, given[name], field.is_required()
        if isinstance(value, Section) and not part:
            yield from _differences(value, silent, f"{key}.")
        elif key not in silent:
            default = None if required else field.get_default(call_default_factory=True, validated_data=given)
            if required or value != default:
                yield tag("code", key), _written(value), "has none" if required else _written(default)


def _written(value: Any) -> str:
    """A value as YAML; of a list an item a line."""
    if isinstance(value, list):
        return "\n".join(map(_written, value)) or "[]"
    return write_value(value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value)


def data_part(data: dict[str, Any], folder: RunFolder) -> Iterator[Html]:
    """data.json: rows, tokens, lengths, sources, and what became of the rows that are not trained on."""
    taught = share(data["supervised_tokens"] / data["train_tokens"])
    yield figures(
        [
            (f"{data['train_rows']:,}", "rows to train on"),
            (f"{data['eval_rows']:,}", "rows held out"),
            (f"{data['train_tokens']:,}", f"tokens, {taught} of them taught"),
            (f"{data['longest']:,}", "tokens in the longest row"),
        ]
    )
    if lengths := data.get("lengths"):
        yield histogram(lengths["counts"], lengths["edges"], data["longest"])
    yield table(["source", "part", "rows", "weight", "format and columns", "SHA-256"], map(_source, data["sources"]))
    fates = [(f"{data[key]:,}", what) for key, what in FATES.items() if data[key]]
    yield table(["", "what became of the others"], fates) if fates else tag("p", "Every row was used, whole.")
    if reasons := _reasons(folder):
        yield table(["reason", "rows", "the first of them"], reasons[:REJECTED])
    if len(reasons) > REJECTED:
        yield tag("p", f"{len(reasons) - REJECTED:,} more reasons are in rejected.jsonl", class_="soft")


def _source(source: dict[str, Any]) -> tuple[Html, str, str, str, str, Html]:
    path, hashed = source["path"], source["sha256"]
    name = tag("span", path if ":" in path.split("/")[0] else Path(path).name, title=path)
    counted = (f"{source['rows']:,}", f"{source['weight']:g}", source["how"])
    return name, source["part"], *counted, tag("code", f"{hashed[:12]}…", title=hashed)


def _reasons(folder: RunFolder) -> list[tuple[str, str, str]]:
    """(reason, rows, the first of them) by rejected.jsonl, the commonest first; reasons may differ in their numbers."""
    if not folder.rejected.is_file():
        return []
    found: dict[str, list[str]] = {}
    for line in filter(None, folder.rejected.read_text("utf-8").split("\n")):
        row = json.loads(line)
        first = f"{Path(row['file']).name}:{row['line']}" + (f"\n{row['row']}" if row["row"] else "")
        found.setdefault(re.sub(r"\d[\d,.]*", "…", row["reason"]), []).append(first)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [(reason, f"{len(rows):,}", rows[0]) for reason, rows in ordered]


# -- proof and merges ------------------------------------------------------------------------------------------------


def proof_part(proof: dict[str, Any]) -> Iterator[Html]:
    """What was held against plain transformers before step 1, in words and figures."""
    taken = {
        "engine": "The run took Luthier's engine.",
        "own_logits": "The run took Luthier's engine with transformers' own logits.",
        "plain": "The run took the plain path: rows padded, through transformers alone.",
    }
    against = f"{len(proof['rows'])} of its own rows ({', '.join(proof['rows'])})"
    count = proof["gradients"]
    what = f"the loss and {count:,} gradient{'s' if count > 1 else ''}" if count else "the loss"
    dropout = ", dropout on" if proof["dropout"] else ""
    yield tag(
        "p",
        f"{taken[proof['path']]} Before step 1 {what} of {against} were compared with plainly padded transformers "
        f"and PEFT, in {proof['format']}{dropout}; it took {proof['seconds']:.1f} s.",
    )
    allowed = proof["tolerance"]
    rows = []
    for way, found in proof["tried"].items():
        if "reason" in found:
            rows.append((way.replace("_", " "), found["reason"], "", ""))
            continue
        largest = max(allowed.values()) if proof["gradients"] else allowed["loss"]
        rows.append((way.replace("_", " "), f"{found['difference']:.1e}", f"{largest:.0e}", found["of"]))
    yield table(["way", "largest relative difference", "allowed", "found in"], rows)


def merges_part(merges: Sequence[dict[str, Any]]) -> Iterator[Html]:
    """What was merged out of this run, how far it is from base and adapter, and from the quantised model if it was."""
    rows = []
    for merge in merges:
        when = f"{datetime.fromtimestamp(merge['time']).astimezone():%d %B %Y, %H:%M}"
        verdict, colour = VERDICTS[merge["verified"]]
        part = "" if merge.get("strength") is None else f", at strength {merge['strength']:g}"
        rows.append(
            (merge["out"], when, merge["dtype"] + part, tag("span", verdict, class_=colour), *_apart(merge["figures"]))
        )
        if quantised := merge.get("quantised"):
            beside = f"beside the {quantised['trained']['quantize']} model that was trained (told, not judged)"
            rows.append(("", "", "", tag("span", beside, class_="soft"), *_apart(quantised["figures"])))
    yield table(
        ["folder", "when", "format", "", "largest logit difference", "mean KL", "same first choice", "positions"], rows
    )


def _apart(figures: dict[str, Any] | None) -> tuple[str, ...]:
    """How far two models are from each other; a dash for what was not measured."""
    written: dict[str, Callable[[Any], str]] = {
        "max_logit_difference": "{:.1e}".format,
        "mean_kl": "{:.1e}".format,
        "top1_agreement": share,
        "positions": "{:,}".format,
    }
    found = figures or {}
    return tuple("–" if found.get(key) is None else write(found[key]) for key, write in written.items())
