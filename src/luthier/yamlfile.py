"""YAML as a recipe needs it: YAML 1.2's plain values, a line for every key, nothing given twice.

PyYAML speaks YAML 1.1, in which `2e-4` is a text, `yes`, `no`, `on` and `off` are booleans and `1:30` is ninety. Here a
plain value is what YAML 1.2's core schema says (and editors show); what is written is quoted so that both agree.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from luthier.errors import RecipeError

Key = tuple[str | int, ...]

_PLAIN = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class Problem(NamedTuple):
    """What is wrong with the value (or the name) of a key."""

    key: Key
    what: str


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # PyYAML's own are YAML 1.1


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    one_line = text.splitlines() in ([], [text])
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if one_line else '"')


for _name, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^$"), [""])
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Dumper.add_representer(str, _text)


@dataclass
class Document:
    """A recipe as it was written: nested values, and where each key stands.

    `lines[key]` is the line of a key in the file, or None where an override gave it.
    """

    file: Path
    values: dict[str, Any]
    lines: dict[Key, int | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def override(self, text: str) -> None:
        """Take a `key=value` from the command line, the value read as YAML. Errors: RecipeError without a '='."""
        name, equals, written = text.partition("=")
        key: Key = tuple(name.strip().split("."))
        if not equals or not all(key):
            raise RecipeError(f"override: {text!r} is not key=value, as in train.lr=1e-4")
        self.lines = {known: line for known, line in self.lines.items() if known[: len(key)] != key}
        self.lines[key] = None
        try:
            value = _value(yaml.compose(written, _Loader), (), Document(self.file, {}))
        except yaml.YAMLError as error:
            self.problems.append(Problem(key, f"not YAML: {_reason(error)}; put it in quotes"))
            return
        at = self.values
        for part in key[:-1]:
            if not isinstance(at.get(str(part)), dict):
                at[str(part)] = {}
            at = at[str(part)]
        at[str(key[-1])] = value

    def report(self, problems: Iterable[Problem]) -> str:
        """A line for each problem, in the order of the file, then the overrides'."""

        def place(problem: Problem) -> tuple[bool, int]:
            line = self._line(problem.key)
            return line is None, line or 0

        return "\n".join(self._told(problem) for problem in sorted(problems, key=place))

    def _told(self, problem: Problem) -> str:
        line = self._line(problem.key)
        place = "override" if line is None else f"{self.file}:{line}" if line else f"{self.file}"
        return f"{place}: {dotted(problem.key)}: {problem.what}"

    def _line(self, key: Key) -> int | None:
        """The key's line, or that of the nearest key around it; 0 for the file itself, None for an override."""
        known = next((key[:stop] for stop in range(len(key), 0, -1) if key[:stop] in self.lines), None)
        return 0 if known is None else self.lines[known]


def dotted(key: Key) -> str:
    """("data", "train", 0, "path") → "data.train[0].path"."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def read_document(path: Path) -> Document:
    """Read a recipe's YAML. Errors: RecipeError with line and column where it is no YAML, or no mapping of keys."""
    text = _read(path)
    try:
        node = yaml.compose(text, _Loader)
        document = Document(path, {})
        values = _value(node, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        place = f"{path}:{mark.line + 1}:{mark.column + 1}"
        raise RecipeError(f"{place}: not YAML: {_reason(error)}{_remedy(error, text, mark.line)}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = f"{path}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        raise RecipeError(
            f"{place}: not YAML: the character U+{ord(text[error.position]):04X} may not stand in it"
        ) from None
    if values is None:
        raise RecipeError(f"{path}: the recipe is empty; `luthier recipe new` prints one to start from")
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}:1: a recipe is keys with values, as in `model: {{name: …}}`; this is {write_value(values)}"
        )
    document.values = values
    return document


def write_value(value: Any) -> str:
    """A value as YAML on one line."""
    line = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, sort_keys=False, width=sys.maxsize
    )
    return line.removesuffix("...\n").strip()  # "..." ends a document that is one plain word


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _value(node: yaml.Node | None, key: Key, document: Document) -> Any:
    """The node's value; the lines of all keys in it and keys given twice are noted in the document."""
    if isinstance(node, yaml.SequenceNode):
        values = []
        for i, item in enumerate(node.value):
            document.lines[*key, i] = item.start_mark.line + 1
            values.append(_value(item, (*key, i), document))
        return values
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, key, document)
    return None if node is None else _Loader("").construct_object(node)


def _mapping(node: yaml.MappingNode, key: Key, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name_node, value_node in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key is a text", problem_mark=name_node.start_mark)
        name, line = name_node.value, name_node.start_mark.line + 1
        here = (*key, name)
        if name in values:
            document.problems.append(Problem(here, f"given twice, here and on line {document.lines[here]}; keep one"))
        document.lines[here] = line
        values[name] = _value(value_node, here, document)
    return values


def _reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return "a character that may not stand in it"
    return " ".join(filter(None, [error.context and f"{error.context},", error.problem]))


def _remedy(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    """What to do about the three mistakes that are made most."""
    lines = text.split("\n")
    for number in (line, line - 1):
        if 0 <= number < len(lines) and "\uff1a" in lines[number] and ": " not in lines[number]:
            return f"; line {number + 1} has a full-width '\uff1a', YAML needs ':' and a blank"
    if "\\t" in (error.problem or ""):
        return "; indent with spaces"
    if "mapping values" in (error.problem or ""):
        return "; put a text that holds ': ' in quotes"
    return ""
