"""What models answered, and two models' answers side by side: their figures, to and from compare.json. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the model wrote."""

    text: str
    """Exactly what continues the prompt (a leading blank is kept), without special tokens, cut before a stop text."""
    ids: list[int]
    """The tokens drawn, without the end token; those of a stop text are among them."""
    stopped: bool
    """It ended by itself, with an end token or a stop text, and not at the length limit."""


def said(prompt: str | Sequence[dict[str, Any]]) -> str:
    """What a prompt of the recipe asks: its text, or the last of its messages."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


@dataclass(frozen=True)
class Question:
    """What both models are asked. reference: the held-out row's own answer; None for a prompt of the recipe."""

    origin: str
    text: str
    ids: list[int]
    reference: str | None = None

    def right(self, reply: Reply) -> bool:
        """The very same text, but for white space around it."""
        return self.reference is not None and reply.text.strip() == self.reference.strip()


@dataclass(frozen=True)
class Pair:
    """One question and what each model answers."""

    question: Question
    base: Reply
    tuned: Reply

    @property
    def flip(self) -> int:
        """1: wrong before, right now; -1: right before, wrong now; 0: neither."""
        return self.question.right(self.tuned) - self.question.right(self.base)


@dataclass(frozen=True)
class Comparison:
    """Every question with both answers, and the largest difference between the two models' logits."""

    pairs: list[Pair]
    logit_difference: float

    def __repr__(self) -> str:
        found = self.figures()
        exact = f", {found['base']['exact']:,} → {found['tuned']['exact']:,} exactly" if found["held_out"] else ""
        return f"<base and tuned on {found['prompts']:,} prompts and {found['held_out']:,} held-out rows{exact}>"

    def _repr_html_(self) -> str:
        """For a notebook."""
        from luthier.view.notebook import comparison_html

        return comparison_html(self)

    @property
    def prompts(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.question.reference is None]

    @property
    def held_out(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.question.reference is not None]

    def figures(self) -> dict[str, Any]:
        """The numbers, as compare.json holds them; shares lie between 0 and 1, lengths are tokens."""
        held = self.held_out
        sides = {"base": [pair.base for pair in self.pairs], "tuned": [pair.tuned for pair in self.pairs]}
        found: dict[str, Any] = {"prompts": len(self.prompts), "held_out": len(held)}
        for side, replies in sides.items():
            right = sum(pair.question.right(getattr(pair, side)) for pair in held)
            found[side] = {
                "exact": right,
                "exact_share": right / len(held) if held else None,
                "stopped_share": sum(reply.stopped for reply in replies) / len(replies),
                "mean_tokens": sum(len(reply.ids) for reply in replies) / len(replies),
            }
        found["wrong_to_right"] = sum(pair.flip == 1 for pair in held)
        found["right_to_wrong"] = sum(pair.flip == -1 for pair in held)
        found["largest_logit_difference"] = self.logit_difference
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it, for compare.json."""
        return {"figures": self.figures(), "answers": [_as_json(pair) for pair in self.pairs]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Comparison:
        """The comparison that `as_json` gave."""
        pairs = [_from_json(row) for row in value["answers"]]
        return cls(pairs, value["figures"]["largest_logit_difference"])


def _as_json(pair: Pair) -> dict[str, Any]:
    question = pair.question
    row: dict[str, Any] = {"origin": question.origin, "prompt": question.text, "prompt_ids": question.ids}
    if question.reference is not None:
        row["reference"] = question.reference
    for side, reply in (("base", pair.base), ("tuned", pair.tuned)):
        row[side] = {"text": reply.text, "ids": reply.ids, "stopped": reply.stopped}
        if question.reference is not None:
            row[side]["exact"] = question.right(reply)
    return row


def _from_json(row: dict[str, Any]) -> Pair:
    base, tuned = (Reply(row[side]["text"], row[side]["ids"], row[side]["stopped"]) for side in ("base", "tuned"))
    return Pair(Question(row["origin"], row["prompt"], row["prompt_ids"], row.get("reference")), base, tuned)
