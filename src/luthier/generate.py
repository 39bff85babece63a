"""Prompts as ids → replies: batched, greedy unless asked otherwise, the same text alone or in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from luthier.engine.forward import base_of
from luthier.engine.soft import virtual_of
from luthier.errors import ModelError, RecipeError
from luthier.models.load import pad_id, window_of
from luthier.models.soft_prompts import alone, begun
from luthier.replies import Reply
from luthier.sections import GenerateSection

CONTEXT = 8
"""Prompt tokens that a reply is decoded with, so that SentencePiece keeps the blank before its first word."""
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class _Task:
    """One prompt on its way: `budget` is the most tokens that it may draw."""

    number: int
    ids: list[int]
    budget: int


def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    section: GenerateSection,
    end_ids: Sequence[int],
    on_text: Callable[[str], None] | None = None,
    batch: int = 16,
) -> list[Reply]:
    """Continue each prompt (a list of token ids); replies come in the order of the prompts.

    Only the section decides: the sampling fields of the model's own generation_config count for nothing. `on_text`
    receives the text of the one prompt piece by piece; the pieces joined are the reply's text. Sampling draws from
    `section.seed` (its result depends on the batch; greedy replies do not).
    Errors: RecipeError for an empty prompt or max_length that leaves no room, ModelError for one beyond the window.
    """
    assert on_text is None or len(prompts) == 1, "only one prompt can be streamed"
    window = _window(model)
    tasks = [_task(number, ids, section, window) for number, ids in enumerate(prompts)]
    ends = [*end_ids, *(tokenizer.convert_tokens_to_ids(text) for text in section.stop if _is_token(tokenizer, text))]
    replies: dict[int, Reply] = {}
    with _inference(model, section.seed):
        for group in _groups(tasks, batch, window, alike=alone(model)):
            stream = _Stream(tokenizer, group[0].ids, section.stop, ends, on_text) if on_text else None
            for task, drawn in zip(group, _draw(model, tokenizer, group, section, ends, stream), strict=True):
                replies[task.number] = _reply(tokenizer, task, drawn, section.stop, ends)
            if stream:
                stream.finish(replies[0].text)
    return [replies[number] for number in range(len(prompts))]


def check_prompts(model: PreTrainedModel, prompts: Sequence[list[int]], section: GenerateSection) -> None:
    """Errors: those of `generate` for a prompt without an answer, before any is drawn."""
    for number, ids in enumerate(prompts):
        _task(number, ids, section, _window(model))


def _window(model: PreTrainedModel | PeftModel) -> int | None:
    """Positions of a prompt and its answer together, behind a soft prompt's virtual tokens; None for any number."""
    window = window_of(model)
    return None if window is None else window - virtual_of(model).tokens


def _task(number: int, ids: list[int], section: GenerateSection, window: int | None) -> _Task:
    """Check a prompt against the limits. `window`: most positions that the model knows, None for any number."""
    if not ids:
        raise RecipeError(f"prompt {number + 1} is empty")
    if window is not None and len(ids) >= window:
        raise ModelError(
            f"prompt {number + 1} has {len(ids)} tokens; this model reads {window}, prompt and answer together"
        )
    budget = section.max_new_tokens
    if section.max_length is not None:
        budget = section.max_length - len(ids)
        if budget < 1:
            raise RecipeError(
                f"generate.max_length: {section.max_length} leaves no room for an answer: "
                f"prompt {number + 1} has {len(ids)} tokens"
            )
    return _Task(number, ids, budget if window is None else min(budget, window - len(ids)))


def _groups(tasks: Sequence[_Task], batch: int, window: int | None, alike: bool) -> Iterator[list[_Task]]:
    """Prompts that run together, longest first; `alike`: only those of one length.

    A group never runs past the window, not even for rows that are done: rotary scalings look at the longest position
    of the pass, and learned positions end there.
    """
    group: list[_Task] = []
    for task in sorted(tasks, key=lambda task: -len(task.ids)):
        longest = len(group[0].ids) + max(task.budget, *(other.budget for other in group)) if group else 0
        unlike = alike and group and len(task.ids) != len(group[0].ids)
        if len(group) == batch or unlike or (window is not None and longest > window):
            yield group
            group = []
        group.append(task)
    if group:
        yield group


@contextmanager
def _inference(model: PreTrainedModel | PeftModel, seed: int) -> Iterator[None]:
    """The model in eval mode, with settings of nobody but us; everything is put back after the block."""
    inner = base_of(model)
    training, settings = model.training, inner.generation_config
    device = inner.device
    model.eval()
    inner.generation_config = GenerationConfig()  # transformers fills our gaps from here, as repetition_penalty
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        inner.generation_config = settings
        model.train(training)


def _draw(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    group: list[_Task],
    section: GenerateSection,
    ends: list[int],
    stream: BaseStreamer | None,
) -> list[list[int]]:
    """The tokens drawn for each task: at most its budget, none after a stop text, any filler after an end token."""
    width, filler = len(group[0].ids), pad_id(tokenizer)
    ids = torch.tensor([[filler] * (width - len(task.ids)) + task.ids for task in group])
    mask = torch.tensor([[0] * (width - len(task.ids)) + [1] * len(task.ids) for task in group])
    sampling: dict[str, Any] = (
        {"temperature": section.temperature, "top_k": section.top_k or 0, "top_p": section.top_p or 1.0}
        if section.sample
        else {}
    )
    config = GenerationConfig(
        do_sample=section.sample,
        max_new_tokens=max(task.budget for task in group),
        eos_token_id=ends or None,
        pad_token_id=filler,
        use_cache=True,
        **sampling,
    )
    with torch.no_grad():
        start = begun(model, ids.to(model.device), mask.to(model.device))
    stopper = _StopTexts(tokenizer, section.stop, start.width)
    drawn = base_of(model).generate(
        **start.given,
        generation_config=config,
        stopping_criteria=[stopper] if section.stop else None,
        streamer=stream,
    )
    return [
        row[: min(task.budget, stopper.length.get(place, task.budget))]
        for place, (row, task) in enumerate(zip(drawn[:, start.width :].tolist(), group, strict=True))
    ]


def _reply(
    tokenizer: PreTrainedTokenizerFast, task: _Task, drawn: list[int], stop: Sequence[str], ends: Sequence[int]
) -> Reply:
    end = next((place for place, id in enumerate(drawn) if id in ends), None)
    ids = drawn[:end]
    text = _text(tokenizer, task.ids, ids)
    cut = min((text.index(mark) for mark in stop if mark in text), default=None)
    return Reply(text[:cut], ids, stopped=end is not None or cut is not None)


def _text(tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int]) -> str:
    """What `ids` add to the prompt's text."""
    before, whole = tokenizer.batch_decode(
        [prompt[-CONTEXT:], prompt[-CONTEXT:] + ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(whole)[len(before.rstrip(REPLACEMENT)) :]  # a prompt may end inside a character


def _is_token(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    """A stop text that is a special token is never in the decoded text: it stops by its id."""
    return text in tokenizer.get_added_vocab()


class _StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends a row when its last tokens complete a stop text; `length` has the tokens drawn until then, by row.

    Only the tail is decoded: every token is at least a byte, so a text of n bytes lies in the last n tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.tail = max((len(text.encode()) for text in stop), default=0) + CONTEXT
        self.length: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        tails = [row[self.width :][-self.tail :] for row in input_ids.tolist()]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for row, text in enumerate(texts):
            if any(mark in text for mark in self.stop):
                self.length.setdefault(row, input_ids.shape[1] - self.width)
        return torch.tensor([row in self.length for row in range(len(texts))], device=input_ids.device)


class _Stream(BaseStreamer):  # type: ignore[misc]
    """Hands on the text as far as no later token can change it: never half a character, never half a stop text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: list[int],
        stop: Sequence[str],
        ends: Sequence[int],
        on_text: Callable[[str], None],
    ) -> None:
        self.tokenizer, self.prompt, self.stop, self.ends, self.on_text = tokenizer, prompt, stop, ends, on_text
        self.ids: list[int] = []
        self.sent = 0
        self.begun = False

    def put(self, value: Tensor) -> None:
        """transformers puts the prompt first, then one token a call."""
        if self.begun:
            self.ids += [id for id in value.tolist() if id not in self.ends]
            self._send(self._settled(_text(self.tokenizer, self.prompt, self.ids)))
        self.begun = True

    def end(self) -> None:
        """The rest waits for `finish`: only the whole reply knows where a stop text cut it."""

    def finish(self, text: str) -> None:
        """Send what the whole reply has beyond what was sent."""
        self._send(text)

    def _send(self, text: str) -> None:
        if len(text) > self.sent:
            self.on_text(text[self.sent :])
            self.sent = len(text)

    def _settled(self, text: str) -> str:
        settled = text.rstrip(REPLACEMENT)
        held = max(
            (n for mark in self.stop for n in range(1, len(mark) + 1) if settled.endswith(mark[:n])),
            default=0,
        )
        cut = min((settled.index(mark) for mark in self.stop if mark in settled), default=len(settled) - held)
        return settled[:cut]
