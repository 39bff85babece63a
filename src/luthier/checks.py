"""Every key and every value by itself: known, of the right kind, within its bounds. All problems, in plain words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from luthier.foreign import FOREIGN, FOREIGN_VALUES, FUTURE_KEYS, FUTURE_VALUES, LATER
from luthier.sections import Recipe
from luthier.vocabulary import Node, all_keys, below, choices, expected, keys_below, node_of, one_of, schema, takes
from luthier.yamlfile import Key, Problem, dotted, write_value

# What a section is mostly about: by `model: x` is meant `model: {name: x}`.
_MAIN_KEY = {"model": "name", "data": "train", "method": "kind", "generate": "prompts", "merge": "dtype"}
# difflib's ratios: batchsize to batch is 0.71; a word from elsewhere must be closer than one of the same section.
_CLOSE, _CLOSE_ELSEWHERE = 0.6, 0.75
_TRUE, _FALSE = ("yes", "on", "true", "y"), ("no", "off", "false", "n")


def check(values: dict[str, Any]) -> tuple[Recipe, list[Problem]]:
    """Validate a recipe's values one by one.

    Gives all problems, and a recipe in which the default stands for each bad value ("?" for `model.name` and
    `data.train`, which have none), so that what takes two values can be checked as well.
    """
    unknown = list(_unknown(values, schema(), ()))
    known = _sections_filled(_without(values, unknown))
    wrong = _wrong(known)
    bad = [problem.key[: 2 if keys_below(problem.key[:1]) else 1] for problem in wrong]  # a key, whole, of any depth
    sound = _sections_filled(_without(known, bad))
    sound["model"].setdefault("name", "?")
    sound["data"].setdefault("train", "?")
    return Recipe.model_validate(sound), [*(Problem(key, _unknown_key(key)) for key in unknown), *wrong]


def _sections_filled(values: dict[str, Any]) -> dict[str, Any]:
    """A section without a key is all defaults; its two required keys are missed one level down."""
    sections = [name for name in keys_below(()) or [] if keys_below((name,))]
    empty: dict[str, Any] = {name: {} for name in sections if name in values and values[name] is None}
    return {"model": {}, "data": {}} | values | empty


def _without(value: Any, keys: Iterable[Key], at: Key = ()) -> Any:
    """A copy of nested values that lacks some keys."""
    keys = set(keys)
    if isinstance(value, dict):
        return {k: _without(v, keys, (*at, k)) for k, v in value.items() if (*at, k) not in keys}
    if isinstance(value, list):
        return [_without(item, keys, (*at, i)) for i, item in enumerate(value)]
    return value


# -- keys ------------------------------------------------------------------------------------------------------------


def _unknown(value: Any, node: Node, key: Key) -> Iterator[Key]:
    """The keys in `value` that the schema's node does not have; those below an unknown key are not looked at."""
    parts: Iterable[Any] = ()
    if isinstance(value, dict) and keys_below(key):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    for part, inner in parts:
        found = below(node, part)
        if found is not None:
            yield from _unknown(inner, found, (*key, part))
        elif isinstance(part, str):
            yield (*key, part)


def _unknown_key(key: Key) -> str:
    """What to say of a key that is not there: not yet, elsewhere called otherwise, misplaced or misspelt."""
    section, name = key[:-1], str(key[-1])
    word = name.lower().replace("-", "_")
    if dotted(key) in FUTURE_KEYS:
        return LATER
    if word in FOREIGN:
        return f"a key of {FOREIGN[word].tools}; here: {FOREIGN[word].here}"
    if word.partition(".")[0] in all_keys():
        outer, _, inner = word.partition(".")
        if inner:
            return f"unknown key; write it nested, as in {outer}: {{{inner}: …}}"
    own = keys_below(section) or []
    if word not in own and (places := _places(word)):
        sections = [place.rpartition(".")[0] or "the top of the recipe" for place in places]
        return f"unknown key; {word} belongs to {one_of(sections)}: {', '.join(places)}{_later(places)}"
    return f"unknown key; {_nearest(word, section) or _all_of(section, own)}"


def _all_of(section: Key, names: list[str]) -> str:
    return f"{dotted(section) or 'a recipe'} has {', '.join(names)}"


def _nearest(word: str, section: Key) -> str | None:
    """ "did you mean …?" for the closest of this section's keys, else of all other keys and other tools' keys."""
    future = [place.rpartition(".")[2] for place in FUTURE_KEYS if place.rpartition(".")[0] == dotted(section)]
    if near := get_close_matches(word, [*(keys_below(section) or ()), *future], n=1, cutoff=_CLOSE):
        place = dotted((*section, near[0]))
        return f"did you mean {place}?{_later([place])}"
    if near := get_close_matches(word, [*all_keys(), *FOREIGN], n=1, cutoff=_CLOSE_ELSEWHERE):
        if near[0] in FOREIGN:
            return f"did you mean {near[0]}? Here: {FOREIGN[near[0]].here}"
        return f"did you mean {one_of(_places(near[0]))}?"
    return None


def _places(word: str) -> list[str]:
    return all_keys().get(word) or [place for place in FUTURE_KEYS if place.rpartition(".")[2] == word]


def _later(places: list[str]) -> str:
    return f" ({LATER})" if set(places) <= set(FUTURE_KEYS) else ""


# -- values ----------------------------------------------------------------------------------------------------------


def _wrong(values: dict[str, Any]) -> list[Problem]:
    """What pydantic finds wrong, each key once and in our words."""
    try:
        Recipe.model_validate(values)
        return []
    except ValidationError as error:
        details = [one for one in error.errors(include_url=False) if one["type"] != "default_factory_not_called"]
    found = {}
    for detail in details:
        key, value = _whereabouts(detail, values)
        found[key] = _complaint(key, value, detail)
    # `[a, 5]` for "a text or a list of texts" is wrong as a text and wrong at its second item: the inner one says more
    return [Problem(key, what) for key, what in found.items() if not any(k[:-1][: len(key)] == key for k in found)]


def _whereabouts(detail: ErrorDetails, values: Any) -> tuple[Key, Any]:
    """The key that an error is about, and its value: pydantic's location less the names of the union's branches."""
    key: Key = ()
    for part in detail["loc"]:
        inside = isinstance(values, dict) and part in values
        if inside or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            key, values = (*key, part), values[part]
    missing = detail["type"] == "missing" and isinstance(values, dict)
    return ((*key, detail["loc"][-1]), None) if missing else (key, values)


def _complaint(key: Key, value: Any, detail: ErrorDetails) -> str:
    node = node_of(key)
    if detail["type"] == "missing" and key[-1] == detail["loc"][-1]:
        return f"missing: {' '.join(node['description'].split()).rstrip('.')}"
    if detail["type"] == "value_error":
        return f"{_shown(value)} {detail['ctx']['error']}"
    if len(key) == 1 and keys_below(key):
        return _no_section(str(key[0]), value)
    if value is None:
        return f"has no value; it must be {expected(node)}"
    if isinstance(value, str) and value in FUTURE_VALUES.get(dotted(key), ()):
        return f"{value} is {LATER}; this version has {', '.join(choices(node))}"
    return f"must be {expected(node)}, is {_shown(value)}{_hint(dotted(key), node, value)}"


def _no_section(name: str, value: Any) -> str:
    names = keys_below((name,)) or []
    if isinstance(value, str) and (found := re.match(rf"({'|'.join(names)}) ?[:\uff1a]", value)):
        return f"is {_shown(value)}, not a section; write {found[1]}: with a ':' and a blank behind it"
    if name in _MAIN_KEY and not isinstance(value, list):
        return f"is {_shown(value)}, not a section; write {name}: {write_value({_MAIN_KEY[name]: value})}"
    return f"is {_shown(value)}, not a section; its keys are {', '.join(names)}"


def _shown(value: Any) -> str:
    if value == "":
        return "empty"
    text = repr(value) if isinstance(value, str) else write_value(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _hint(place: str, node: Node, value: Any) -> str:
    """The remedy for what is often meant."""
    if isinstance(value, str):
        return _hint_for_word(place, node, value)
    numeric = takes(node, "integer") or takes(node, "number")
    if takes(node, "string") and not numeric and isinstance(value, (bool, int, float)):
        return f'; a text is in quotes: "{write_value(value)}"'
    if takes(node, "string") and not takes(node, "object") and isinstance(value, dict):
        return '; a text with braces or ": " in it is in quotes'
    return ""


def _hint_for_word(place: str, node: Node, value: str) -> str:
    word = value.strip().lower()
    if word in FOREIGN_VALUES.get(place, {}):
        return f"; here that is {FOREIGN_VALUES[place][word]}"
    if near := get_close_matches(word, choices(node), n=1):
        return f"; did you mean {near[0]}?"
    if takes(node, "boolean") and word in (*_TRUE, *_FALSE):
        return f"; write {'true' if word in _TRUE else 'false'}"
    if (takes(node, "number") or takes(node, "integer")) and re.fullmatch(r"[-+.0-9e]+", word):
        return "; a number has no quotes"
    if takes(node, "array") and not takes(node, "string"):
        several = re.split(r",\s*", value) if re.fullmatch(r"[\w.]+(,\s*[\w.]+)+", value) else [value]
        return f"; write {write_value(several)}"
    return ""
