"""Base against tuned on the same prompts: what changed, how often it is right, did it learn to stop.

`luthier.view.sidebyside` shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.encode import Encoder
from luthier.data.examples import Examples
from luthier.data.prepare import Data
from luthier.errors import DataError, RecipeError, RunError
from luthier.generate import generate
from luthier.loaded import Prompt, prompt_ids
from luthier.models.load import window_of
from luthier.replies import Comparison, Pair, Question, Reply
from luthier.sections import GenerateSection

HELD_OUT = 128  # rows of the eval part that are answered
PROBED_ROWS, PROBED_TOKENS = 32, 256  # beside the prompts, for the difference in logits


def compare(
    base: AbstractContextManager[Any],
    tuned: AbstractContextManager[Any],
    *,
    prompts: Sequence[Prompt],
    data: Data | None,
    encoder: Encoder,
    tokenizer: Any,
    section: GenerateSection,
    end_ids: Sequence[int],
    rows: int = HELD_OUT,
    say: Callable[[str], None],
) -> Comparison:
    """Ask both models the recipe's prompts, and up to `rows` rows of the eval part.

    base, tuned: each gives its model (for an adapter one model, off and on); tuned is entered first, and left before
    base is entered, so that two whole models need not be in memory at once.
    Errors: RecipeError where there is nothing to ask; RunError where the two models do not differ.
    """
    held = data.eval if data else None
    with tuned as model:
        room = room_of(model, section)
        kept, left_out = held_out(held, encoder, tokenizer, room, rows)
        questions = [*asked(prompts, encoder, section), *kept]
        long = f"; {left_out} left out, whose prompt fills the {room} tokens for prompt and answer" if left_out else ""
        if not questions:
            known = "give generate.prompts, or data.eval with rows that have an answer"
            raise RecipeError(f"nothing to compare: {known}{long}")
        say(f"compare: {len(prompts)} of the recipe's prompts, {len(kept)} of the held-out rows{long}")
        probe = probe_rows(questions[: len(prompts)], (held or data.train) if data else None)
        tuned_replies = answers(model, tokenizer, questions, section, end_ids)  # first: it refuses too long a prompt
        tuned_logits = last_logits(model, probe)
    with base as model:
        difference = largest_logit_difference(last_logits(model, probe), tuned_logits)
        base_replies = answers(model, tokenizer, questions, section, end_ids)
    pairs = [Pair(*three) for three in zip(questions, base_replies, tuned_replies, strict=True)]
    return Comparison(pairs, difference)


# -- what is asked ---------------------------------------------------------------------------------------------------


def asked(prompts: Sequence[Prompt], encoder: Encoder, section: GenerateSection) -> list[Question]:
    """The recipe's prompts."""
    return [
        Question(f"prompt {number}", _said(prompt), prompt_ids(encoder, prompt, section))
        for number, prompt in enumerate(prompts, start=1)
    ]


def room_of(model: Any, section: GenerateSection) -> int | None:
    """Most tokens of prompt and answer together: the model's window or generate.max_length; None for any number."""
    return min((limit for limit in (window_of(model), section.max_length) if limit is not None), default=None)


def held_out(
    rows: Examples | None, encoder: Encoder, tokenizer: Any, room: int | None, most: int
) -> tuple[list[Question], int]:
    """Up to `most` rows of the eval part, drawn by the data's seed, each prompt once: its ids up to the first answer.

    None where the whole text is taught: there is no answer then. A row whose prompt fills `room` is left out; behind
    the questions, how many were.
    """
    if not rows or encoder.section.supervise == "all" or encoder.template.raw:
        return [], 0
    order = np.random.Generator(np.random.Philox(key=[encoder.section.seed, 4])).permutation(len(rows))
    frame = _frame(encoder, tokenizer)
    found: dict[tuple[int, ...], Question] = {}
    left_out = 0
    for i in order.tolist():
        if len(found) == most:
            break
        ids, (start, stop) = rows[i].ids.tolist(), rows.spans(i)[0]
        if room is not None and start >= room:
            left_out += 1
            continue
        said, answer = _without(ids[:start], frame), ids[start:stop]
        question = Question(
            rows.origin(i), _decode(tokenizer, said).strip(), ids[:start], _decode(tokenizer, answer).strip()
        )
        found.setdefault(tuple(ids[:start]), question)
    return list(found.values()), left_out


def _said(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _frame(encoder: Encoder, tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the template writes before and behind every user's turn: where two prompts agree.

    White space between it and the turn is left to the turn: it may melt into the turn's own tokens.
    """
    try:
        one, other = (encoder.prompt(said, raw=False) for said in ("0", "x"))
    except DataError:  # a text pattern over several columns has no user's turn
        return [], []

    def kept(ids: list[int]) -> list[int]:
        last = (place for place in range(len(ids), 0, -1) if tokenizer.decode(ids[place - 1]).strip())
        return ids[: next(last, 0)]

    return kept(_common(one, other)), kept(_common(one[::-1], other[::-1]))[::-1]


def _common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _without(ids: list[int], frame: tuple[list[int], list[int]]) -> list[int]:
    head, tail = frame
    start = len(head) if ids[: len(head)] == head else 0
    return ids[start : len(ids) - len(tail)] if ids[len(ids) - len(tail) :] == tail else ids[start:]


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text without special tokens: an answer's end token goes with them."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# -- what is answered ------------------------------------------------------------------------------------------------


def answers(
    model: Any, tokenizer: Any, questions: Sequence[Question], section: GenerateSection, end_ids: Sequence[int]
) -> list[Reply]:
    """One model's replies, in order. Held-out rows are answered greedily whatever the section says: no lucky draws."""
    greedy = section.model_copy(update={"sample": False})
    prompts = [question.ids for question in questions if question.reference is None]
    held = [question.ids for question in questions if question.reference is not None]
    first = iter(generate(model, tokenizer, prompts, section, end_ids))
    second = iter(generate(model, tokenizer, held, greedy, end_ids))
    return [next(first if question.reference is None else second) for question in questions]


def probe_rows(questions: Sequence[Question], rows: Examples | None) -> list[list[int]]:
    """Texts on which the two models are held against each other: the prompts, and some whole rows."""
    whole = [rows[i].ids.tolist() for i in range(min(len(rows), PROBED_ROWS))] if rows else []
    return [ids[:PROBED_TOKENS] for ids in [*(question.ids for question in questions), *whole]]


@torch.inference_mode()
def last_logits(model: Any, rows: Sequence[list[int]]) -> Tensor:
    """Logits behind each row's last token: fp32 [rows, vocabulary], on the CPU."""

    def each() -> Iterator[Tensor]:
        for ids in rows:
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
            yield logits[0, -1].float().cpu()

    return torch.stack(list(each()))


def largest_logit_difference(base: Tensor, tuned: Tensor) -> float:
    """Largest absolute difference of two models' logits, each fp32 [rows, vocabulary].

    Errors: RunError when it is 0 (the tuning has no effect) or a logit is not finite.
    """
    for name, logits in (("base", base), ("tuned", tuned)):
        if not bool(torch.isfinite(logits).all()):
            raise RunError(f"the {name} model's logits are not finite: try model.dtype: fp32")
    difference = float((base - tuned).abs().max())
    if difference == 0:
        raise RunError(
            f"the adapter has no effect: base and tuned give the very same logits on {len(base)} texts; "
            "train longer or with a higher train.lr, and see that metrics.jsonl shows a falling loss"
        )
    return difference
