"""Chat templates rendered once for each shape of conversation, and then filled in.

A shape is the roles in order, and whether an answer is to be begun. Its template is run once with *blanks* for the
messages' contents: objects that can be joined with text, stripped, and written out. Whatever else the template does
to one (compares it, looks into it, counts it, asks whether it is empty) is told, and then every conversation of that
shape is rendered by itself as before. Where nothing was told, the program took no decision by a content: it writes
the same text around any other, and filling it in is rendering it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date
from functools import wraps
from typing import Any, NamedTuple

from jinja2 import Environment, Undefined, nodes
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from luthier.data.jinja import Render, compile_chat_template, environment

SHAPES = 512
"""Remembered; a conversation of yet another shape is rendered by itself."""
OPEN, CLOSE = "\ufdd2", "\ufdd3"
"""Around a blank's number in a text that was rendered: noncharacters, as in templates.py."""
_WRITTEN = re.compile(f"{OPEN}(s*)(\\d+){CLOSE}")

# The parts of a template's program whose use of a content is seen. Others make texts that are worked on further
# (macros, blocks, captured output), where a content would be one no more.
_SEEN = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.NSRef, nodes.Scope),
    *(nodes.For, nodes.If, nodes.Assign, nodes.With, nodes.Continue, nodes.Break, nodes.CondExpr),
    *(nodes.Getattr, nodes.Getitem, nodes.Slice, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not),
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Neg, nodes.Pos, nodes.Concat),
    *(nodes.Filter, nodes.Test, nodes.Call, nodes.Keyword, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair),
)
_BY_KIND = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "number", "boolean"}
"""Tests that answer the same for every text."""
_LEAVES = {"length", "count", "first", "last", "list", "selectattr", "rejectattr"}
"""Filters of a list of messages that do nothing to what they hold."""

Skeleton = tuple[list[str], list[tuple[int, int, bool]]]
"""A text in pieces, and (piece, message, stripped) for those that are a content."""


class Shaped(NamedTuple):
    """A chat template. fills(roles, add_generation_prompt): whether it is filled in for that shape."""

    render: Render
    fills: Callable[[Sequence[str], bool], bool]


def shaped_chat_template(source: str, today: date, **tokens: str) -> Shaped:
    """What jinja.compile_chat_template makes, text for text, at a tenth of the cost. Errors: as there."""
    plain = compile_chat_template(source, today, **tokens)
    outline = _outliner(source, today, tokens)
    if outline is None:
        return Shaped(plain, lambda *_: False)
    known: dict[tuple[Any, ...], Skeleton | None] = {}

    def skeleton_of(roles: Sequence[str], begun: bool) -> Skeleton | None:
        shape = (begun, *roles)
        if shape not in known and len(known) < SHAPES:
            known[shape] = outline(list(roles), begun)
        return known.get(shape)

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        skeleton = skeleton_of([message["role"] for message in messages], add_generation_prompt)
        if skeleton is None:
            return plain(messages, add_generation_prompt)
        pieces, places = skeleton
        filled = pieces.copy()
        for at, message, stripped in places:
            content: str = messages[message]["content"]
            filled[at] = content.strip() if stripped else content
        return "".join(filled)

    return Shaped(render, lambda roles, begun: skeleton_of(roles, begun) is not None)


def _outliner(source: str, today: date, tokens: dict[str, str]) -> Callable[[list[str], bool], Skeleton | None] | None:
    """(roles, add_generation_prompt) → the skeleton of that shape, None where its text depends on the contents.

    None by itself where the template has parts in which the use of a content would go unseen.
    """
    watching = _watching(today)
    if any(mark in text for mark in (OPEN, CLOSE) for text in (source, *tokens.values())):
        return None
    if not all(_is_seen(node) for node in _nodes(watching.parse(source))):
        return None
    template = watching.from_string(source)

    def outline(roles: list[str], add_generation_prompt: bool) -> Skeleton | None:
        if any(mark in role for mark in (OPEN, CLOSE) for role in roles):
            return None
        blanks = [_Blank(watching, f"{OPEN}{i}{CLOSE}") for i in range(len(roles))]
        messages = [{"role": role, "content": blank} for role, blank in zip(roles, blanks, strict=True)]
        watching.told = False
        try:
            text = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **tokens)
        except Exception:  # also a refusal: rendering the row tells it
            return None
        return None if watching.told else _skeleton(text)

    return outline


def _skeleton(text: str) -> Skeleton:
    split = _WRITTEN.split(text)  # text, "s" or "", number, text, …
    pieces, places = [split[0]], []
    for stripped, number, behind in zip(split[1::3], split[2::3], split[3::3], strict=True):
        places.append((len(pieces), int(number), bool(stripped)))
        pieces += ["", behind]
    return pieces, places


def _nodes(node: nodes.Node) -> list[tuple[nodes.Node, nodes.Node]]:
    """Every node below this one, with its parent."""
    found = []
    for child in node.iter_child_nodes():
        found += [(child, node), *_nodes(child)]
    return found


def _is_seen(pair: tuple[nodes.Node, nodes.Node]) -> bool:
    node, parent = pair
    if type(node) not in _SEEN or (isinstance(node, nodes.Filter) and node.name == "random"):
        return False
    if isinstance(node, nodes.Concat):  # `~` writes its parts out: they must go straight to the text
        return isinstance(parent, nodes.Output)
    return not (isinstance(node, nodes.For) and node.recursive)


class _Told(Exception):  # noqa: N818
    """The template did to a content what depends on it."""


class _Watching(ImmutableSandboxedEnvironment):
    """Runs a template over blanks. `told`: something was done to one that may depend on what stands there."""

    intercepted_binops = frozenset(["%", "*", "-", "/", "//", "**"])
    told = False

    def tell(self) -> _Told:
        self.told = True
        return _Told()

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _holds(left) or _holds(right):
            raise self.tell()
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, _Blank):
            raise self.tell()
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        if __obj is not Namespace and _holds([*args, *kwargs.values()]):
            raise __self.tell()
        return super().call(__context, __obj, *args, **kwargs)

    def watched(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or a test that tells when it is given a content, unless it is known what it does."""

        @wraps(plain)
        def filtered(*args: Any) -> Any:
            given = [arg for arg in args if not isinstance(arg, Context | EvalContext | Environment)]
            if name == "trim" and len(given) == 1 and isinstance(given[0], _Blank):
                return given[0].strip()
            if name in _BY_KIND and isinstance(given[0], _Blank):
                return plain("")
            if name not in _LEAVES and _holds(given):
                raise self.tell()
            return plain(*args)

        return filtered


def _watching(today: date) -> _Watching:
    made = environment(today, _Watching)
    for functions in (made.filters, made.tests):
        for name, plain in list(functions.items()):
            functions[name] = made.watched(name, plain)
    return made


def _holds(value: Any) -> bool:
    """Whether a content may be found in the value."""
    if isinstance(value, dict):
        return any(map(_holds, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds, value))
    return not (value is None or isinstance(value, str | int | float | Undefined))


class _Blank:
    """Stands for a content: text may be put before and behind it, and it may be stripped and written out."""

    __slots__ = ("_environment", "_parts")

    def __init__(self, environment: _Watching, *parts: str) -> None:
        self._environment, self._parts = environment, parts

    def __add__(self, other: Any) -> _Blank:
        return self._with(lambda parts: (*self._parts, *parts), other)

    def __radd__(self, other: Any) -> _Blank:
        return self._with(lambda parts: (*parts, *self._parts), other)

    def _with(self, joined: Callable[[tuple[str, ...]], tuple[str, ...]], other: Any) -> _Blank:
        if not isinstance(other, str | _Blank):
            raise self._environment.tell()
        return _Blank(self._environment, *joined(other._parts if isinstance(other, _Blank) else (other,)))

    def strip(self, *characters: Any) -> _Blank:
        if characters or len(self._parts) > 1:
            raise self._environment.tell()
        return _Blank(self._environment, self._parts[0].replace(f"{OPEN}", f"{OPEN}s"))

    def __str__(self) -> str:
        return "".join(self._parts)

    def __getattr__(self, name: str) -> Any:
        raise self._environment.tell()


def _tells(self: _Blank, *_: Any) -> Any:
    raise self._environment.tell()


for _name in (
    *("eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "len", "iter", "reversed", "contains", "getitem", "call"),
    *("mul", "rmul", "mod", "rmod", "sub", "rsub", "index", "int", "float", "format", "repr", "html", "html_format"),
    *("or", "ror", "and", "rand", "neg", "pos", "bytes", "copy", "deepcopy", "reduce_ex", "length_hint", "next"),
):
    setattr(_Blank, f"__{_name}__", _tells)
