"""The recipe's vocabulary, read off its JSON Schema: which keys there are, and in words what each takes.

Messages, `luthier recipe schema` and docs/recipe.md all come from here, so that they cannot disagree.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from luthier.sections import Recipe
from luthier.yamlfile import Key, write_value

Node = dict[str, Any]


@cache
def schema() -> Node:
    """The recipe's JSON Schema (draft 2020-12), the docstring of each field as its description."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
        "title": "Luthier recipe",
    }


def branches(node: Node) -> list[Node]:
    """The alternatives that a node of the schema allows, references followed."""
    if "$ref" in node:
        return branches(schema()["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return [branch for option in node["anyOf"] for branch in branches(option)]
    return [node]


def below(node: Node, part: str | int) -> Node | None:
    """The node of a key, or of a list's item, below `node`; None where there is none."""
    for branch in branches(node):
        if isinstance(part, int) and branch.get("type") == "array":
            items: Node = branch["items"] if "items" in branch else branch["prefixItems"][part]
            return items
        if part in branch.get("properties", {}):
            found: Node = branch["properties"][part]
            return found
    return None


def find(key: Key) -> Node | None:
    """The node of a key; None where a recipe has no such key."""
    node: Node | None = schema()
    for part in key:
        node = None if node is None else below(node, part)
    return node


def node_of(key: Key) -> Node:
    """The node of a key that a recipe has."""
    node = find(key)
    assert node is not None, key
    return node


def keys_below(key: Key) -> list[str] | None:
    """Names of the keys below a key, in order; None where it holds no section."""
    sections = [branch["properties"] for branch in branches(node_of(key)) if "properties" in branch]
    return [name for section in sections for name in section] or None


@cache
def all_keys() -> dict[str, list[str]]:
    """Each key's own name → its dotted places: "seed" → ["data.seed", "train.seed", "generate.seed"]."""
    places: dict[str, list[str]] = {}

    def walk(key: Key) -> None:
        for name in keys_below(key) or []:
            places.setdefault(name, []).append(".".join(map(str, (*key, name))))
            walk((*key, name))

    walk(())
    return places


def choices(node: Node) -> list[str]:
    """The words that a key may have as its value."""
    return [
        word for branch in branches(node) for word in branch.get("enum", [branch["const"]] if "const" in branch else [])
    ]


def takes(node: Node, kind: str) -> bool:
    """Whether any value of a JSON type ("string", "number", "array" …) will do, not only certain words or names."""
    return any(
        branch.get("type") == kind and not {"enum", "const", "pattern"} & set(branch) for branch in branches(node)
    )


def expected(node: Node) -> str:
    """What a key takes, in words: "a whole number ≥ 1 or auto"."""
    return one_of([word for branch in branches(node) for word in _expected(branch)])


def one_of(words: list[str]) -> str:
    """a, b or c"""
    return f"{', '.join(words[:-1])} or {words[-1]}" if words[1:] else words[0]


def _expected(branch: Node) -> list[str]:
    if "enum" in branch or "const" in branch:
        return choices(branch)
    match branch.get("type"):
        case "string":
            return [branch["description"] if "pattern" in branch else "a text"]
        case "integer":
            return ["a whole number" + _bounds(branch)]
        case "number":
            return ["a number" + _bounds(branch)]
        case "boolean":
            return ["true or false"]
        case "array" if "prefixItems" in branch:
            return [f"a list of {len(branch['prefixItems'])} {_plural(branch['prefixItems'][0])}"]
        case "array":
            return [f"a list of {' or of '.join(_plural(item) for item in branches(branch['items']))}"]
        case "object":
            return [f"keys ({', '.join(branch['properties'])})"]
        case kind:
            return [str(kind)]


def _bounds(branch: Node) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {write_value(branch[name])}" for name, sign in signs.items() if name in branch]
    return " " + " and ".join(bounds) if bounds else ""


def _plural(branch: Node) -> str:
    return (
        one_of(_expected(branch))
        .replace("a text", "texts")
        .replace("a whole number", "whole numbers")
        .replace("a number", "numbers")
    )
