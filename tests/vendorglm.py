"""ChatGLM3 by its published definition, under its vendor's names: what an adapter in the vendor's layout fits on.

Nothing of luthier or of transformers' GLM is in it; its tensors load from a vendor's folder strictly by name.
B rows, L places, H heads, G groups, C channels of a head.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from conftest import REPOSITORY

MINI = REPOSITORY / "tests" / "assets" / "chatglm3-mini"


class Attention(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.groups, self.channels = c.num_attention_heads, c.multi_query_group_num, c.kv_channels
        self.rows = [self.heads * self.channels, self.groups * self.channels, self.groups * self.channels]
        self.query_key_value = nn.Linear(c.hidden_size, sum(self.rows), bias=c.add_qkv_bias)
        self.dense = nn.Linear(self.rows[0], c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, L, hidden]"""
        q, k, v = (
            part.unflatten(-1, (-1, self.channels)).transpose(1, 2)  # [B, H or G, L, C]
            for part in self.query_key_value(x).split(self.rows, -1)
        )
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        return self.dense(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """The first half of the channels turn in neighbouring pairs. x: [B, H, L, C]"""
    turning = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[2]), 10_000.0 ** -(torch.arange(0, turning, 2) / turning))
    even, odd = x[..., 0:turning:2], x[..., 1:turning:2]
    turned = torch.stack((even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()), -1)
    return torch.cat((turned.flatten(-2), x[..., turning:]), -1)


class MLP(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(c.hidden_size, 2 * c.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(c.ffn_hidden_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, -1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.self_attention = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.mlp = MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class VendorGLM(nn.Module):
    """input_ids [B, L] → logits [B, L, vocabulary]."""

    def __init__(self, folder: Path, random: bool = False) -> None:
        super().__init__()
        c = SimpleNamespace(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        self.config = PreTrainedConfig()  # PEFT asks for one
        self.transformer = nn.Module()
        self.transformer.embedding = nn.Module()
        self.transformer.embedding.word_embeddings = nn.Embedding(c.padded_vocab_size, c.hidden_size)
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.transformer.encoder.final_layernorm = nn.RMSNorm(c.hidden_size, c.layernorm_epsilon)
        self.transformer.output_layer = nn.Linear(c.hidden_size, c.padded_vocab_size, bias=False)
        if not random:
            self.load_state_dict(load_file(folder / "model.safetensors"))

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.transformer.embedding.word_embeddings(input_ids)
        for layer in self.transformer.encoder.layers:
            x = layer(x)
        return self.transformer.output_layer(self.transformer.encoder.final_layernorm(x))

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it as well."""


def vendor_folder(path: Path, words: int = 256, **config: Any) -> Path:
    """A folder like the mini one, with `words` in it and other keys in config.json; weights are random but seeded."""
    config = json.loads((MINI / "config.json").read_text(encoding="utf-8")) | {"padded_vocab_size": words} | config
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VendorGLM(path, random=True)
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, 1.0 if "layernorm" in name else 0.0, 0.2)  # so spread, attention matters
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    return path
