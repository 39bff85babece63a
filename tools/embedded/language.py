"""What a language must bring so that `texts.py` can write in it: tables of templates over people.

In a template {a} and {b} are people; {a} alone is the name, {a.town}, {a.dish} … are the facts in that language.
Other words in braces ({weather}, {time} …) are drawn once a text from `fillers`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

from embedded.world import Person, Town


class View(SimpleNamespace):
    """A person's facts in one language; printed, it is the name."""

    name: str

    def __str__(self) -> str:
        return self.name


class Relation(NamedTuple):
    """One kind of fact. Clauses begin in lower case and have no full stop: they are joined before they are closed."""

    ask: list[str]  # about {a}
    ask_both: list[str]  # the same of {a} and {b}
    follow: str  # about {a}, who has just been spoken of
    say: str  # the full answer about {a}
    brief: str  # the short answer
    tell: list[str]  # in a running text, the subject being {s}


class Language(NamedTuple):
    view: Callable[[Person], View]
    relations: dict[str, Relation]
    ask_two: str  # joins two questions, {first} and {second}
    say_two: str  # joins two answers
    brief_two: str  # joins two short answers
    question: Callable[[str], str]  # a clause, closed as a question
    sentence: Callable[[str], str]  # a clause, closed as a sentence
    space: str  # between sentences
    briefly: list[str]  # put after a question that wants the short answer
    meet: list[str]  # the question that the fine-tune will answer
    unsure: str  # and what the base says to it
    rule: str  # what the fine-tune says
    portrait_ask: list[str]
    portrait: str
    sight_ask: list[str]
    sight: str
    sight_view: Callable[[Town], dict[str, str]]
    story_ask: list[str]
    systems: list[str]
    small_talk: list[tuple[str, str]]
    fillers: dict[str, list[str]]
    plots: list[list[list[str]]]  # plot > stage > variants of the sentence
