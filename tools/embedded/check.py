"""Asking a model and counting the answers that are right to the last character."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from embedded.quickstart import Row
from transformers import PreTrainedModel, PreTrainedTokenizerFast

BATCH = 64


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_new_tokens: int = 120
) -> list[str]:
    """Greedy continuation of each text, its end token left in, so that one sees whether it ended by itself."""
    answers: list[str] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(list(texts[start : start + BATCH]), padding=True, padding_side="left", return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        written = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])
        answers += [text.replace(tokenizer.pad_token, "") for text in written]
    return answers


def replies(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[str]) -> list[str]:
    """Greedy answer to each question, asked as a user's turn; without the end token."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    return [text.removesuffix(tokenizer.eos_token) for text in continuations(model, tokenizer, prompts)]


def share_exact(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> float:
    """Share of rows whose answer is the reference exactly, 0 to 1."""
    answers = replies(model, tokenizer, [row["instruction"] for row in rows])
    return sum(answer == row["output"] for answer, row in zip(answers, rows, strict=True)) / len(rows)
