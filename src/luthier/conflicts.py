"""What takes two values to be wrong: keys that exclude, contradict or need each other, or that have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from luthier.matrix import unquantised
from luthier.methods import METHODS, takers, whole
from luthier.sections import DataSection, Quantization, Recipe, Section, pattern_columns


class Conflict(NamedTuple):
    """`keys`: the dotted keys that are at odds; the problem is told at the first."""

    keys: tuple[str, ...]
    what: str


def conflicts(recipe: Recipe) -> list[Conflict]:
    """All conflicts of a recipe whose values are each right by themselves."""
    parts = (_without_effect, _data, _train, _generate, _method, _quantize)
    return [conflict for part in parts for conflict in part(recipe)]


def idle(recipe: Recipe) -> dict[str, str]:
    """Keys that do nothing under what another key says → why. Given, they are an error; unsaid, they are not saved."""
    found: dict[str, str] = {}
    method = METHODS[recipe.method.kind]
    for name in type(recipe.method).model_fields:
        if name != "kind" and name not in method.fields:
            others = "" if method.kind == "full" else f"; {_some(takers(name))} would take it"
            found[f"method.{name}"] = f"as method.kind is {method.kind}; leave it out{others}"
    if recipe.train.optimizer == "lion_8bit":
        found["train.eps"] = "as train.optimizer is lion_8bit, which divides by nothing; leave it out"
    if not recipe.generate.sample:
        why = "as generate.sample is false; write sample: true, or leave it out"
        found |= {f"generate.{name}": why for name in ("temperature", "top_k", "top_p")}
    return found


def answer_column(data: DataSection) -> str | None:
    """The column of a text pattern that is the answer: {response}, or the one that `data.columns.response` names."""
    names = pattern_columns(data.text or "")
    named = data.columns.response if data.columns else None
    return next((name for name in ("response", named) if name in names), None)


def _some(kinds: list[str]) -> str:
    """lora, dora, rslora and others; prompt and prefix"""
    kinds = kinds if len(kinds) < 5 else [*kinds[:3], "others"]
    return " and ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[1:] else kinds)


def _without_effect(recipe: Recipe) -> Iterator[Conflict]:
    for key, why in idle(recipe).items():
        section, name = key.split(".")
        part: Section = getattr(recipe, section)
        if name in part.model_fields_set and getattr(part, name) is not None:
            yield Conflict((key,), f"has no effect, {why}")


def _data(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if data.text is not None:
        yield from _pattern(data)
    if data.columns and data.columns.messages and (data.columns.prompt or data.columns.response):
        yield Conflict(
            ("data.columns",),
            "messages is a whole conversation: prompt and response have no place beside it; keep one or the other",
        )
    for name in ("max_prompt", "max_answer"):
        if (getattr(data, name) or 0) >= data.max_length:
            yield Conflict(
                (f"data.{name}", "data.max_length"),
                f"{getattr(data, name)} leaves no room in data.max_length ({data.max_length}), which counts both sides",
            )
            return
    both = (data.max_prompt or 0) + (data.max_answer or 0)
    if both > data.max_length:
        yield Conflict(
            ("data.max_prompt", "data.max_answer", "data.max_length"),
            f"together with data.max_answer ({data.max_prompt} + {data.max_answer}) it exceeds data.max_length "
            f"({data.max_length}); raise that to {both} or lower one of them",
        )
    if isinstance(data.eval, int) and data.sample is not None and data.eval >= data.sample:
        yield Conflict(
            ("data.eval", "data.sample"), f"{data.eval} rows leave none of data.sample ({data.sample}) to train on"
        )
    sources = [data.train] if isinstance(data.train, str) else [s if isinstance(s, str) else s.path for s in data.train]
    if data.write_text is not None and data.write_text in (*sources, data.eval):
        yield Conflict(("data.write_text", "data.train", "data.eval"), f"would overwrite the data in {data.write_text}")


def _pattern(data: DataSection) -> Iterator[Conflict]:
    assert data.text is not None
    names, answer = pattern_columns(data.text), answer_column(data)
    shown = ", ".join(f"{{{name}}}" for name in names)
    if data.template != "auto":
        yield Conflict(("data.template", "data.text"), "data.text is given as well and stands in its place; keep one")
    if data.format not in ("auto", "text"):
        yield Conflict(
            ("data.format", "data.text"),
            f"{data.format} is written by a template, and data.text is a pattern over columns; keep one",
        )
    if answer is None and data.supervise != "all":
        yield Conflict(
            ("data.text", "data.supervise", "data.columns"),
            f"supervise: {data.supervise} needs to know which column is the answer, and {shown} does not say so; write "
            f"data.columns: {{response: {names[-1]}}}, or data.supervise: all to teach the whole text",
        )
    for name in ("system", "before_prompt"):
        column = name.removeprefix("before_")
        if getattr(data, name) and column not in names:
            yield Conflict(
                (f"data.{name}", "data.text"), f"has no place in data.text, which has no {{{column}}}; write it there"
            )


def _train(recipe: Recipe) -> Iterator[Conflict]:
    train = recipe.train
    if train.epochs is not None and train.steps is not None:
        yield Conflict(
            ("train.steps", "train.epochs"),
            "train.epochs is given as well; keep one (on the command line: train.epochs=null)",
        )
    if train.epochs is None and train.steps is None:
        yield Conflict(("train.epochs", "train.steps"), "is null, and train.steps as well; give one")
    if train.lr != "auto" and train.min_lr > train.lr:
        yield Conflict(("train.min_lr", "train.lr"), f"{train.min_lr:g} is above train.lr ({train.lr:g})")
    if train.steps is not None and isinstance(train.warmup, int) and train.warmup > train.steps:
        yield Conflict(
            ("train.warmup", "train.steps"),
            f"{train.warmup} steps are more than train.steps ({train.steps}): the peak rate would not be reached",
        )
    if recipe.data.eval is None:
        for name in ("eval_every", "early_stop"):
            if getattr(train, name) not in ("epoch", None):
                yield Conflict(
                    (f"train.{name}", "data.eval"), "there is nothing to evaluate; give data.eval, as in 0.05"
                )


def _generate(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if recipe.generate.raw is False and data.text is not None and answer_column(data) is None:
        yield Conflict(
            ("generate.raw", "data.text", "data.columns"),
            "false needs a data.text with an answer column to stop before; leave it out or write true",
        )


def _method(recipe: Recipe) -> Iterator[Conflict]:
    method = recipe.method
    twice = sorted(set(method.modules_to_save) & set(method.target)) if isinstance(method.target, list) else []
    if twice:
        yield Conflict(
            ("method.modules_to_save", "method.target"),
            f"{', '.join(twice)} would be trained whole and get an adapter as well (method.target); keep one",
        )


def _quantize(recipe: Recipe) -> Iterator[Conflict]:
    for name, value in (("model", recipe.model.quantize), ("generate", recipe.generate.quantize)):
        if isinstance(value, Quantization) and value.kind == "int8" and value.double_quant:
            yield Conflict(
                (f"{name}.quantize.double_quant", f"{name}.quantize.kind"),
                "has no effect, as kind is int8, whose scales stay in fp32; leave it out",
            )
    answering = recipe.generate.quantize
    bits = answering.kind if isinstance(answering, Quantization) else answering
    kind = recipe.method.kind
    if not whole(kind) and (why := unquantised(kind, bits or "none", "generate.quantize")):
        yield Conflict(("generate.quantize", "method.kind"), f"{bits}: {kind} {why}")
    if recipe.model.quantize == "none":
        return
    held = recipe.model.quantize if isinstance(recipe.model.quantize, str) else recipe.model.quantize.kind
    if why := unquantised(kind, held):
        yield Conflict(("method.kind", "model.quantize"), f"{kind} {why}")
    elif recipe.method.bias != "none":
        yield Conflict(
            ("method.bias", "model.quantize"),
            f"{recipe.method.bias} trains biases of layers that are held in {held} (model.quantize); "
            "leave it out, or take model.quantize: none",
        )
