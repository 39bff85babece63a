"""From random weights to a model that speaks of the valley: one pass over fresh documents, never the same one twice."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterable, Iterator

import torch
from embedded.texts import END
from embedded.tokenizer import PAD
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

LONGEST = 512  # positions the model is made for; documents of the valley are rarely over 200 tokens
STEPS, WARMUP, RATE = 1800, 60, 4e-3
TOKENS_PER_STEP = 4096
POOL = 4096  # documents sorted by length at a time, so that a batch needs little padding

Batch = list[list[int]]


def make_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """1.5 M parameters in fp32."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: Tokenizer, documents: Iterable[str], seed: int) -> Iterator[Batch]:
    """Rows of similar length, about TOKENS_PER_STEP in all; without end."""
    rng, documents = random.Random(seed), iter(documents)
    while True:
        pool = [code.ids[:LONGEST] for code in tokenizer.encode_batch(list(itertools.islice(documents, POOL)))]
        pool.sort(key=len)
        made: list[Batch] = [[]]
        for row in pool:
            if (len(made[-1]) + 1) * len(row) > TOKENS_PER_STEP:
                made.append([])
            made[-1].append(row)
        rng.shuffle(made)
        yield from made


def padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels, [rows, longest]; labels are -100 on the padding."""
    rows = [torch.tensor(row) for row in batch]
    pad = lambda value: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)  # noqa: E731
    return pad(0), pad(-100)


def pretrain(tokenizer: Tokenizer, documents: Iterable[str], seed: int) -> LlamaForCausalLM:
    """STEPS steps of AdamW; a line of progress every hundred."""
    torch.manual_seed(seed)
    model = make_model(tokenizer)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    began, seen, running = time.time(), 0, 0.0
    for step, batch in enumerate(itertools.islice(batches(tokenizer, documents, seed), STEPS)):
        ids, labels = padded(batch)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = RATE * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        seen, running = seen + int((labels >= 0).sum()), running + float(loss.detach())
        if (step + 1) % 100 == 0:
            spent = time.time() - began
            print(f"step {step + 1}/{STEPS}  loss {running / 100:.3f}  {seen:,} tokens  {spent:.0f} s", flush=True)
            running = 0.0
    return model.eval()
