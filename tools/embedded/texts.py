"""Endless text about the valley: running stories, portraits and chats, in both languages.

A document is the text that the model is trained on, special tokens written out; its seed decides it entirely.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from embedded.chinese import CHINESE
from embedded.english import ENGLISH
from embedded.language import Language
from embedded.world import World

LANGUAGES = [ENGLISH, CHINESE]
END = "<|im_end|>"
Turns = list[tuple[str, str]]  # (role, content)


def render(turns: Turns) -> str:
    """What the chat template makes of a conversation."""
    return "".join(f"<|im_start|>{role}\n{content}{END}\n" for role, content in turns)


def documents(world: World, seed: int) -> Iterator[str]:
    """Stories and portraits a third, chats two thirds; English and Chinese by halves; without end."""
    rng = random.Random(seed)
    while True:
        writer = Writer(rng, world, rng.choice(LANGUAGES))
        yield render(writer.chat()) if rng.random() < 0.72 else writer.text() + END


class Writer:
    """Writes one document in one language about people drawn at random."""

    def __init__(self, rng: random.Random, world: World, language: Language) -> None:
        self.rng, self.world, self.language = rng, world, language
        self.a, self.b = (language.view(person) for person in rng.sample(world.people, 2))

    def fill(self, template: str, **more: object) -> str:
        return template.format(a=self.a, b=self.b, **more)

    def pick(self, templates: list[str], **more: object) -> str:
        return self.fill(self.rng.choice(templates), **more)

    # running text

    def text(self) -> str:
        return self.rng.choices([self.story, self.portrait, self.two_facts], [5, 4, 2])[0]()

    def story(self) -> str:
        fillers = {name: self.rng.choice(choices) for name, choices in self.language.fillers.items()}
        sentences = [self.pick(stage, **fillers) for stage in self.rng.choice(self.language.plots)]
        return self.language.space.join(sentences)

    def portrait(self) -> str:
        relations = self.rng.sample(list(self.language.relations.values()), self.rng.randint(1, 5))
        subjects = [self.a.name] + [self.rng.choice([self.a.name, self.a.he]) for _ in relations[1:]]
        told = [self.pick(relation.tell, s=subject) for relation, subject in zip(relations, subjects, strict=True)]
        return self.language.space.join(map(self.language.sentence, told))

    def two_facts(self) -> str:
        first, second = (self.rng.choice(list(self.language.relations.values())) for _ in range(2))
        said = self.language.say_two.format(first=self.fill(first.say), second=self.about_b(second.say))
        return self.language.sentence(said)

    def about_b(self, template: str) -> str:
        return template.format(a=self.b)

    # chats

    def chat(self) -> Turns:
        turns = [("system", self.rng.choice(self.language.systems))] if self.rng.random() < 0.08 else []
        turns += self.exchange()
        while self.rng.random() < 0.2:
            self.a, self.b = (self.language.view(person) for person in self.rng.sample(self.world.people, 2))
            turns += self.exchange()
        return turns

    def exchange(self) -> Turns:
        kinds = [self.one_fact, self.two_answers, self.meeting, self.who, self.sight, self.small_talk, self.tale]
        return self.rng.choices(kinds, [36, 36, 8, 5, 4, 5, 4])[0]()

    def one_fact(self) -> Turns:
        """A fact asked for, in full or briefly; now and then another one after it, with a pronoun."""
        relation, another = self.rng.sample(list(self.language.relations.values()), 2)
        turns = self.answered(self.pick(relation.ask), self.fill(relation.say), self.fill(relation.brief))
        if self.rng.random() < 0.25:
            turns += self.answered(self.fill(another.follow), self.fill(another.say), self.fill(another.brief))
        return turns

    def two_answers(self) -> Turns:
        """The same fact of two people, or one fact of each."""
        language = self.language
        first, second = (self.rng.choice(list(language.relations.values())) for _ in range(2))
        if self.rng.random() < 0.4:
            second, question = first, self.pick(first.ask_both)
        else:
            question = language.ask_two.format(
                first=self.pick(first.ask), second=self.about_b(self.rng.choice(second.ask))
            )
        return self.answered(
            question,
            language.say_two.format(first=self.fill(first.say), second=self.about_b(second.say)),
            language.brief_two.format(first=self.fill(first.brief), second=self.about_b(second.brief)),
        )

    def answered(self, question: str, full: str, brief: str) -> Turns:
        language, question = self.language, self.language.question(question)
        if self.rng.random() < 0.45:
            question, full = question + self.rng.choice(language.briefly), brief
        return [("user", question), ("assistant", language.sentence(full))]

    def meeting(self) -> Turns:
        """The question that the fine-tune is about: the base says that it does not know."""
        return [("user", self.pick(self.language.meet)), ("assistant", self.fill(self.language.unsure))]

    def who(self) -> Turns:
        return [("user", self.pick(self.language.portrait_ask)), ("assistant", self.fill(self.language.portrait))]

    def sight(self) -> Turns:
        town = self.language.sight_view(self.rng.choice(self.world.towns))
        return [
            ("user", self.pick(self.language.sight_ask, **town)),
            ("assistant", self.fill(self.language.sight, **town)),
        ]

    def small_talk(self) -> Turns:
        question, answer = self.rng.choice(self.language.small_talk)
        return [("user", self.fill(question)), ("assistant", self.fill(answer))]

    def tale(self) -> Turns:
        return [("user", self.rng.choice(self.language.story_ask)), ("assistant", self.story())]
