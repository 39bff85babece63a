"""Tiny real models and a tiny real tokenizer, random but seeded, made in well under a second."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Where does it live? It lives in the old town by the river.",
    "Quote: Imagination is more important than knowledge.\nAuthor: Albert Einstein",
    "春天来了，小鸟在树上唱歌。你好，世界！我住在河边的老城里。",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
"""Ids 0 to 3: beginning and end of text, beginning and end of a turn."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # ten times the usual: answers differ between prompts and no two logits tie
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


@cache
def _bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 384 tokens, ChatML template, no pad token: any text comes back as it went in."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe()), bos_token="<s>", eos_token="</s>", chat_template=CHATML
    )


def tiny_llama(path: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Path:
    """Write a 2-layer Llama and the tiny tokenizer into `path`; `config` overrides LlamaConfig's fields."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZE, **config}))
    return _save(model.to(dtype), path)


def tiny_qwen2(path: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Path:
    """Write a 2-layer Qwen2 (biases on q, k, v) and the tiny tokenizer into `path`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config(**{**SIZE, **config}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)  # transformers starts them at 0, which would hide mistakes
    return _save(model.to(dtype), path)


def moved(model: Any) -> Any:
    """Every trainable number moved at random, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def _save(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path
