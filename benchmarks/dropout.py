"""What keyed dropout costs in a training step: python benchmarks/dropout.py (some minutes on two cores).

A Qwen2 of about 100 million random parameters in bf16, LoRA r 8 on its seven projections, one pass of 1,020 tokens,
forward and backward, in three ways by turns: no dropout, keyed dropout, PEFT's own. The head and the loss are left
out: with them a step takes longer and dropout's share is smaller. Processor time, as the wall's scatters by 15 % a turn
even on a quiet machine of two cores.
"""

from __future__ import annotations

import statistics
import time
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from luthier.engine.dropout import keyed, token_keys

ROWS, LENGTH = 3, 340
LAYERS = 6
P = 0.1
TURNS = 9
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    model = adapted()
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{total / 1e6:.0f} M parameters, {ROWS * LENGTH} tokens, {torch.get_num_threads()} threads, bf16, p {P}")
    seconds: dict[str, list[float]] = {"no dropout": [], "keyed dropout": [], "nn.Dropout": []}
    for turn in range(TURNS):
        ways = list(seconds)
        for way in ways[turn % 3 :] + ways[: turn % 3]:  # what comes first in a turn is slower by some per cent
            seconds[way].append(timed(model, way))
        print(f"{turn + 1}/{TURNS}: " + ", ".join(f"{way} {taken[-1]:.2f} s" for way, taken in seconds.items()))
    print("medians: " + ", ".join(f"{way} {statistics.median(taken):.2f} s" for way, taken in seconds.items()))
    for way in ("keyed dropout", "nn.Dropout"):  # each turn by itself: a machine's speed drifts from turn to turn
        ratios = [value / none for value, none in zip(seconds[way], seconds["no dropout"], strict=True)]
        spread = f"{min(ratios) - 1:.1%} to {max(ratios) - 1:.1%}"
        print(f"{way} costs {statistics.median(ratios) - 1:.1%} of a step ({spread})")


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=LAYERS,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    base = Qwen2ForCausalLM(config).to(torch.bfloat16)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=P, target_modules=PROJECTIONS, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that it is giving up
        return get_peft_model(base, lora).train()


def timed(model: nn.Module, way: str) -> float:
    """Seconds of one step. A pass of eight tokens goes before it: the table is made once a run, not once a step."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0 if way == "no dropout" else P
    with keyed(model, seed=0) if way == "keyed dropout" else nullcontext():
        step(model, 1, 8)
        began = time.process_time()
        step(model, ROWS, LENGTH)
        return time.process_time() - began


def step(model: nn.Module, rows: int, length: int) -> None:
    ids = torch.randint(0, 8192, (rows, length))
    owners, positions = np.indices((rows, length))
    keys = torch.from_numpy(token_keys(0, 1, owners, positions)).flatten()
    hidden = model.get_base_model().model(ids, use_cache=False, layout=SimpleNamespace(segments=(), keys=keys))
    hidden.last_hidden_state.float().square().mean().backward()
    model.zero_grad()


if __name__ == "__main__":
    main()
