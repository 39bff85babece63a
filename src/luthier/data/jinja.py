"""Chat templates in Jinja, rendered as transformers renders them, but with the date frozen for the run.

transformers' own compiler asks the clock (`strftime_now`): rows would change at midnight, and a resumed run with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from typing import Any, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.data.formats import BadRow
from luthier.errors import DataError

Render = Callable[[list[dict[str, Any]], bool], str]
Kind = TypeVar("Kind", bound=ImmutableSandboxedEnvironment)


def compile_chat_template(source: str, today: date, **tokens: str) -> Render:
    """`render(messages, add_generation_prompt)` for a template. `tokens`: bos_token, eos_token.

    Errors: DataError where the template cannot be parsed; the renderer raises BadRow where it refuses a conversation.
    """
    try:
        template = environment(today, ImmutableSandboxedEnvironment).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"data.template: line {error.lineno} of the chat template: {error.message}") from None

    def render(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **tokens)
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses it: {error}") from None
        except Exception as error:  # a template can fail as any program can
            raise BadRow(f"the chat template fails: {type(error).__name__}: {error}") from None

    return render


def environment(today: date, kind: type[Kind]) -> Kind:
    """An environment of that kind with all that a chat template may use."""
    made = kind(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = today.strftime
    return made


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(Extension):
    """`{% generation %}` marks answers for other tools; here it is its content (spans come from rendering twice)."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
