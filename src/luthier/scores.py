"""How well a model does its task, and what of general text it still knows: figures with bounds. Without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.replies import Question, Reply

RESAMPLES = 1000
LEVEL = 1.959964  # of a normal distribution, 95 % lie within so many standard deviations

Losses = list[tuple[float, int]]
"""Of each text: the sum of its cross entropies in nats, and over how many tokens."""
Bounds = tuple[float, float]
"""Lower and upper: of a hundred sets of rows drawn like these, in about 95 the figure lies between them."""


@dataclass(frozen=True)
class Score:
    """What one model came to, as it was measured."""

    rows: Losses
    """Of held-out rows, over their supervised tokens."""
    texts: Losses
    """Of general texts, over all tokens but the first."""
    replies: list[Reply]
    """Greedy, in the order of the questions."""


def figures(scores: Sequence[Score], base: Score, questions: Sequence[Question]) -> dict[str, Any]:
    """One model's score, or those of several seeds on the same rows, as numbers; None for what was not measured.

    loss: nats a supervised token. exact: held-out rows answered exactly, of `answered`. stopped_share: of these, or
    where there are none of all replies. perplexity: of the general texts; perplexity_change: against the base's, 0.1
    is a tenth more. Shares lie between 0 and 1; several seeds' figures are their means. `…_bounds` are `Bounds`: they
    tell what other rows and texts would change, not other seeds; those of the change are paired, as both models read
    the same texts.
    """
    rows, texts = _averaged([score.rows for score in scores]), _averaged([score.texts for score in scores])
    held = [i for i, question in enumerate(questions) if question.reference is not None]
    shares = _right(scores, questions)
    right = sum(shares[i] for i in held)
    ended = [score.replies[i].stopped for score in scores for i in held or range(len(questions))]
    return {
        "loss": mean(rows) if rows else None,
        "loss_bounds": resampled(mean, rows) if rows else None,
        "answered": len(held),
        "exact": right if held else None,
        "exact_share": right / len(held) if held else None,
        "exact_bounds": share_bounds(right, len(held)) if held else None,
        "stopped_share": sum(ended) / len(ended) if ended else None,
        "perplexity": math.exp(min(mean(texts), 700)),
        **_change(texts, base.texts),
    }


def differences(
    scores: Sequence[Score], others: Sequence[Score], questions: Sequence[Question]
) -> dict[str, Bounds | None]:
    """Bounds of how much more a model answers exactly (share) and loses (nats a token) than another on the same rows.

    Paired: by rows, so that what makes a row hard for both does not widen them. None for what was not measured.
    """
    here, there = _right(scores, questions), _right(others, questions)
    held = [(here[i] - there[i], 1) for i, question in enumerate(questions) if question.reference is not None]
    pairs = zip(_averaged([one.rows for one in scores]), _averaged([one.rows for one in others]), strict=True)
    lost = [(one - other, tokens) for (one, tokens), (other, _) in pairs]
    return {"exact": resampled(mean, held) if held else None, "loss": resampled(mean, lost) if lost else None}


def _right(scores: Sequence[Score], questions: Sequence[Question]) -> list[float]:
    """Of each question the share of the seeds that answer it exactly."""
    return [
        sum(question.right(score.replies[i]) for score in scores) / len(scores) for i, question in enumerate(questions)
    ]


def _averaged(losses: Sequence[Losses]) -> Losses:
    """Text by text the mean over seeds."""
    return [
        (math.fsum(loss for loss, _ in of_text) / len(of_text), of_text[0][1]) for of_text in zip(*losses, strict=True)
    ]


def _change(texts: Losses, base: Losses) -> dict[str, Any]:
    pairs = [(one - other, tokens) for (one, tokens), (other, _) in zip(texts, base, strict=True)]
    low, high = resampled(mean, pairs)
    return {
        "perplexity_change": math.expm1(min(mean(pairs), 700)),
        "perplexity_change_bounds": (math.expm1(min(low, 700)), math.expm1(min(high, 700))),
    }


def mean(losses: Sequence[tuple[float, float]]) -> float:
    """Nats a token."""
    return math.fsum(loss for loss, _ in losses) / sum(tokens for _, tokens in losses)


def resampled(figure: Callable[[Losses], float], losses: Losses) -> Bounds:
    """Percentile bootstrap over whole texts: tokens of one text are not independent. The same draws at every call."""
    draws = np.random.Generator(np.random.Philox(key=[0, 5])).integers(len(losses), size=(RESAMPLES, len(losses)))
    found = [figure([losses[i] for i in draw]) for draw in draws.tolist()]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def share_bounds(right: float, of: int) -> Bounds:
    """Wilson's interval of a share (Wilson 1927): unlike the bootstrap's not of width 0 where all or none are right."""
    square = LEVEL**2
    middle = (right + square / 2) / (of + square)
    reach = LEVEL / (of + square) * math.sqrt(right * (of - right) / of + square / 4)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def least(found: Mapping[float, Mapping[str, Any]]) -> float | None:
    """The least strength below 1 that does the task no worse than 1 and forgets less; None where there is none.

    No worse: as many rows exactly, at least; without answered rows a held-out loss within the bounds of that at 1. None
    as well where the bounds at 1 do not rule out that nothing is forgotten.
    """
    full = found[1.0]
    if full["perplexity_change_bounds"][0] <= 0:
        return None
    for at, here in sorted(found.items()):
        if not 0 < at < 1 or not here["perplexity_change"] < full["perplexity_change"]:
            continue
        if full["exact"] is not None:
            if here["exact"] >= full["exact"] > found[0.0]["exact"]:
                return at
        elif full["loss"] is not None and here["loss"] <= full["loss_bounds"][1] < found[0.0]["loss"]:
            return at
    return None
